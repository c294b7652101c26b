"""Times every configuration of the fused kernel's launch table, so that the table can be set from measurements.

    python benchmarks/tune.py

For each head dim and length: the configurations of all its rows, for Ampere and for Hopper, and the warp-specialized one,
whichever the table would choose. Cases: full heads, bands, and heads of several kinds beside text, by attention alone, and
outputs with residuals. bfloat16 on a CUDA device, CUDA events, medians over rounds of ratios to cuDNN's dense attention. Where
a device refuses one, its message is noted. `--small` has Triton's interpreter run one size on the CPU (TRITON_INTERPRET=1).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import typer
from kernels import BATCH_AND_HEADS, TEXT, Case, on_backend, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend
from tqdm import tqdm

from arrowhead.kernels.triton import launch_table, ops
from arrowhead.kernels.triton.launch_table import AMPERE, FULL, HEAD_DIMS, HOPPER, SPECIALISED, Config
from arrowhead.plans.layout import Tokens
from arrowhead.versions import versions

HERE = Path(__file__).parent
LENGTHS = {"cuda": (1024, 4096, 16384), "cpu": (64,)}


def configs(dim: int, capability: tuple[int, int]) -> tuple[Config, ...]:
    """All that the table has for a head dim and that the architecture knows."""
    rows = [AMPERE[dim], *([HOPPER[dim]] if capability[0] == 9 else [])]
    found = [config for row in rows for config in (row.short, row.long, row.spare)]
    return tuple(dict.fromkeys([*found, *([SPECIALISED[dim]] if capability[0] == 9 else [])]))


def cases(n: int, dim: int, heads: int) -> Iterator[Case]:
    yield Case("dense", Tokens(n), dim, (None,) * heads)
    yield Case("window N/16", Tokens(n), dim, (n // 16,) * heads)
    yield Case("mixed heads with text", Tokens(n, min(TEXT, n)), dim, (None, n // 16, n // 32, n // 64) * (heads // 4))


def runs(case: Case, device: str) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    """The baseline, and the kernel's two operators where there is something for both to do."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, heads = BATCH_AND_HEADS[device]
    shape = (batch, case.tokens.total, heads, case.head_dim)
    q, k, v, out = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4))
    policy = torch.tensor([[FULL if r is None else r, 0] for r in case.radii], dtype=torch.int32, device=device)
    image = case.tokens.visual, case.tokens.visual_slice.start
    scale = case.head_dim**-0.5
    found: dict[str, Callable[[], Any]] = {"arrow": partial(ops.arrow, out, q, k, v, policy, None, None, *image, scale)}
    if any(radius is not None for radius in case.radii):
        residual = torch.empty_like(q[:, :, case.tokens.visual_slice])
        found["full_and_residual"] = partial(ops.full_and_residual, out, residual, q, k, v, policy, None, *image, scale)
    return partial(dense, q, k, v), found


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.is_cuda:
        return on_backend(SDPBackend.CUDNN_ATTENTION, q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def measure(case: Case, device: str, capability: tuple[int, int], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each configuration and operator."""
    baseline, operators = runs(case, device)
    base = [seconds(baseline, device) for _ in range(rounds + 1)][1:]
    about = {"case": case.name, "tokens": case.tokens.visual, "text": case.tokens.text, "head_dim": case.head_dim}
    about |= {"density": round(case.density, 4), "dense_seconds": median(base)}
    for name, run in operators.items():
        for config in configs(case.head_dim, capability):
            if name != "arrow" and config.variant == "specialised":
                continue  # it has no loops for residuals
            row = {"operator": name, **about, "config": asdict(config)}
            with patch.object(launch_table, "chosen", lambda *_, own=config, **__: own):
                try:
                    run()  # compiles
                    taken = [(seconds(run, device), seconds(baseline, device)) for _ in range(rounds)]
                except torch.AcceleratorError:  # nothing can be measured after it
                    raise
                except Exception as error:  # Triton has one for every kind of resource that is short
                    yield {**row, "refused": f"{type(error).__name__}: {str(error)[:200]}"}
                    continue
            yield {
                **row,
                "seconds": median(own for own, _ in taken),
                "time_by_cudnn": round(median(a / b for a, b in taken), 4),
            }


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case the quickest configuration, with what the table's slowest would have taken beside it."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "seconds" in row:
            groups.setdefault((row["head_dim"], row["tokens"], row["case"], row["operator"]), []).append(row)
    return [
        {
            **dict(zip(("head_dim", "tokens", "case", "operator"), key, strict=True)),
            "config": min(some, key=lambda row: row["seconds"])["config"],
            "time_by_slowest": round(min(r["seconds"] for r in some) / max(r["seconds"] for r in some), 3),
        }
        for key, some in groups.items()
    ]


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file; results/tune_cuda.json where it is not given")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="some of the head dims; all where it is not given")] = None,
    rounds: Annotated[int, typer.Option(help="rounds, of ten calls each")] = 5,
    small: Annotated[bool, typer.Option(help="interpreted, on the CPU, 64 tokens; needs --out")] = False,
) -> None:
    """Measure, and write the results after every head dim; other head dims that a result file has are kept in it."""
    if small and out is None:
        raise typer.BadParameter("--small is no result to keep; name a file with --out")
    device = "cpu" if small else "cuda"
    capability = (9, 0) if small else torch.cuda.get_device_capability()
    out = out or HERE / "results/tune_cuda.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    for dim in head_dim or HEAD_DIMS:
        rows = [row for row in rows if row["head_dim"] != dim]
        own = [case for n in LENGTHS[device] for case in cases(n, dim, BATCH_AND_HEADS[device][1])]
        for case in tqdm(own, desc=f"head dim {dim}", mininterval=10):
            rows += measure(case, device, capability, rounds)
        result = {
            "command": "python benchmarks/tune.py",
            "date": datetime.now(UTC).date().isoformat(),
            "device": "cpu, interpreted" if small else torch.cuda.get_device_name(),
            "batch_and_heads": BATCH_AND_HEADS[device],
            "versions": versions(),
            "best": best(rows),
            "rows": rows,
        }
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
