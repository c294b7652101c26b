"""Each kernel's time divided by torch's dense attention's, over sizes, head dimensions and policies of heads; with a figure.

    python benchmarks/kernels.py

The baseline on the CPU is plain SDPA, in float32, with one thread and process time. On CUDA (`--device cuda`) the baselines
are cuDNN's and FlashAttention 2's SDPA, in bfloat16, with CUDA events. Every round runs baselines and kernels one after the
other; a figure is the median over the rounds of its ratio to the same round's baseline. Where a kernel refuses a case, its
message is noted. The first call of each, which compiles, is not counted.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import dispatch
from arrowhead.plans.cells import Arrow, Full, Precision
from arrowhead.plans.flops import pairs
from arrowhead.plans.layout import Tokens
from arrowhead.versions import versions

HERE = Path(__file__).parent
TEXT = 333  # tokens of Stable Diffusion 3's prompts
SIZES = {"cpu": (1024, 4096, 16384), "cuda": (1024, 2048, 4096, 8192, 16384, 32768)}
HEAD_DIMS = {"cpu": (64, 72), "cuda": (64, 72, 80, 96, 128)}
BATCH_AND_HEADS = {"cpu": (1, 4), "cuda": (2, 16)}
COLOURS = {"chunked": "#c8553d", "flex": "#3f7cac", "fused": "#2e8b6f", "fused int8": "#7a5195"}
MARKERS = "osD^vP"

Call = Callable[[], Tensor]
Radii = tuple[int | None, ...]


@dataclass(frozen=True)
class Case:
    """One layout of tokens, and what each head looks at."""

    name: str
    tokens: Tokens
    head_dim: int
    radii: Radii

    @property
    def density(self) -> float:
        """Pairs that are kept, of all."""
        kept = [pairs(Full() if radius is None else Arrow(radius), self.tokens) for radius in self.radii]
        return sum(kept) / len(kept) / self.tokens.total**2


def cases(heads: int, sizes: Sequence[int], head_dims: Sequence[int]) -> Iterator[Case]:
    for n in sizes:
        for dim in head_dims:
            yield Case("dense", Tokens(n), dim, (None,) * heads)
            for part in (8, 16, 32):
                yield Case(f"window N/{part}", Tokens(n), dim, (n // part,) * heads)
            yield Case("mixed heads", Tokens(n), dim, (None, n // 8, n // 16, n // 32) * (heads // 4))
            yield Case("arrow N/8", Tokens(n, TEXT), dim, (n // 8,) * heads)
            yield Case("mixed heads with text", Tokens(n, TEXT), dim, (None, n // 8, n // 16, n // 32) * (heads // 4))


def on_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def label(name: str, precision: Precision) -> str:
    """What rows call a kernel."""
    return name if precision == "native" else f"{name} {precision}"


def calls(case: Case, device: str, names: Sequence[str], precision: Precision) -> tuple[dict[str, Call], dict[str, Call]]:
    """The baselines, and the kernels of these names, all heads in one precision."""
    batch, heads = BATCH_AND_HEADS[device]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (batch, case.tokens.total, heads, case.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in "qkv")  # as processors have them
    baselines: dict[str, Call] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    if device == "cuda":
        baselines = {
            "cudnn": lambda: on_backend(SDPBackend.CUDNN_ATTENTION, q, k, v),
            "fa2": lambda: on_backend(SDPBackend.FLASH_ATTENTION, q, k, v),
        }
    run = partial(dispatch.arrow, q, k, v, case.tokens, case.radii, precision=precision)
    kernels = {label(name, precision): partial(run, kernel=name) for name in names}
    return baselines, dict[str, Call](kernels)


def seconds(call: Call, device: str) -> float:
    """Of one call: process time, or the mean of ten by CUDA's own clock."""
    if device == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(10):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e4


def refusal(call: Call) -> str | None:
    """Why a call cannot be made, in the words of whoever refuses it. The first call compiles."""
    try:
        call()
    except torch.AcceleratorError:  # nothing can be measured after it
        raise
    except Exception as error:  # torch, Triton and the compiler each have their own
        kind = "" if isinstance(error, KernelUnavailable) else f"{type(error).__name__}: "
        return kind + str(error)[:300]
    return None


def measure(case: Case, device: str, names: Sequence[str], rounds: int, precision: Precision) -> Iterator[dict[str, Any]]:
    """A row for each kernel."""
    baselines, kernels = calls(case, device, names, precision)
    refused = {}
    for name, call in (baselines | kernels).items():
        if (why := refusal(call)) is not None:
            refused[name] = why
            (baselines if name in baselines else kernels).pop(name)
    taken = [{name: seconds(call, device) for name, call in (baselines | kernels).items()} for _ in range(rounds)]
    policy = {"radii": case.radii, "density": round(case.density, 4)}
    about = {"case": case.name, "tokens": case.tokens.visual, "text": case.tokens.text, "head_dim": case.head_dim, **policy}
    for name in kernels:
        time_by = {base: round(median(one[name] / one[base] for one in taken), 4) for base in baselines}
        yield {"kernel": name, **about, "time_by": time_by, "seconds": median(one[name] for one in taken), "rounds": rounds}
    for name, why in refused.items():
        yield {"kernel": name, **about, "refused": why}


def draw(result: dict[str, Any], path: Path) -> None:
    """Speed-up over the first baseline by density, one panel for each head dimension."""
    rows = [row for row in result["rows"] if "time_by" in row]
    dims, sizes = (sorted({row[what] for row in rows}) for what in ("head_dim", "tokens"))
    figure, axes = plt.subplots(
        1, len(dims), figsize=(1 + 4 * len(dims), 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, dim in zip(axes[0], dims, strict=True):
        own = [row for row in rows if row["head_dim"] == dim]
        axis.axline((1, 1), (0.1, 10), color="0.6", lw=1, label="ideal: 1 / density")
        for name in dict.fromkeys(row["kernel"] for row in own):
            for size, marker in zip(sizes, MARKERS, strict=False):
                some = [row for row in own if (row["kernel"], row["tokens"]) == (name, size)]
                points = [(row["density"], 1 / next(iter(row["time_by"].values()))) for row in some]
                axis.scatter(*zip(*points, strict=True), color=COLOURS.get(name, "0.3"), marker=marker, s=22, alpha=0.8)
        for name in dict.fromkeys(row["kernel"] for row in own):
            axis.scatter([], [], color=COLOURS.get(name, "0.3"), label=name)
        for size, marker in zip(sizes, MARKERS, strict=False):
            axis.scatter([], [], color="0.3", marker=marker, label=f"{size} tokens")
        axis.set(xscale="log", yscale="log", xlabel="density: pairs kept, of all", title=f"head dimension {dim}")
        axis.set(xlim=(0.05, 1.1), ylim=(0.7, 20))
        axis.set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
        axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"speed-up over {next(iter(rows[0]['time_by']))}")
    axes[0, -1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file; results/kernels_DEVICE.json where it is not given")] = None,
    rounds: Annotated[int, typer.Option(help="rounds at 16384 tokens and above; four times as many below")] = 3,
    size: Annotated[list[int] | None, typer.Option(help="some of the numbers of tokens; all where it is not given")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="some of the head dims; all where it is not given")] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="some of the kernels; all but the oracle where it is not given")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="of all heads' scores")] = "native",
) -> None:
    """Measure, write the results after every case, and draw them. What a result file has of other cases is kept in it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = out or HERE / f"results/kernels_{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes, dims = size or SIZES[device], head_dim or HEAD_DIMS[device]
    names = kernel or [name for name in dispatch.KERNELS if name != "reference"]
    found = json.loads(out.read_text())["rows"] if out.exists() else []
    labels = [label(name, precision) for name in names]
    rows = [row for row in found if row["tokens"] not in sizes or row["head_dim"] not in dims or row["kernel"] not in labels]
    with torch.no_grad():
        for case in tqdm([*cases(BATCH_AND_HEADS[device][1], sizes, dims)], mininterval=10):
            own = rounds if case.tokens.visual >= 16384 else 4 * rounds
            rows += measure(case, device, names, own, precision)
            out.write_text(json.dumps(about(device) | {"rows": rows}, indent=1) + "\n")
    draw({"rows": rows}, out.with_suffix(".png"))


def about(device: str) -> dict[str, Any]:
    """How the rows were measured."""
    on_cpu = f"CPU {platform.machine()}, one thread of {os.cpu_count()} cores, float32, process time"
    return {
        "command": f"python benchmarks/kernels.py --device {device}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": on_cpu if device == "cpu" else f"{torch.cuda.get_device_name()}, bfloat16, CUDA events",
        "baseline": "plain SDPA" if device == "cpu" else "SDPA by cuDNN and by FlashAttention 2",
        "batch_and_heads": BATCH_AND_HEADS[device],
        "versions": versions(),
    }


if __name__ == "__main__":
    typer.run(main)
