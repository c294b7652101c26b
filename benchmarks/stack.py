"""Plans for a watched stack beside the budget's search over single sites, at equal FLOPs of the transformer.

    python benchmarks/stack.py dit --tools TOOLS
    python benchmarks/stack.py mmdit32 --tools TOOLS

Plans are found on four inputs, by `strategy="stack"` without checks and with them, and by `strategy="budget"` with its own
checks. They are judged on inputs and seeds that no search has seen, by LPIPS and PSNR to the untouched pictures; a difference
is paired. A search's cost is in process time of one untouched generation of its inputs. TOOLS holds `perceptual.py`, see
benchmarks/README.md. What is finished is not made again.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import budget
import torch
import typer
from torch import Tensor
from tqdm import tqdm

import arrowhead as ah
from arrowhead.metrics.images import decibels, squared_errors
from arrowhead.plans.cells import Reuse
from arrowhead.versions import versions

LEFT = (0.55, 0.4, 0.3, 0.2, 0.15)
HERE = Path(__file__).parent


def found(pipe: Any, case: budget.Case, method: str, left: float, table: ah.Table | None) -> ah.Plan:
    """The plan of a method, on four inputs."""
    inputs = {**case.common, case.asks: case.calibration[:4], "generator": torch.Generator().manual_seed(budget.SEED)}
    if method == "sites":
        return ah.search(pipe, inputs, strategy="budget", budget=ah.Budget(transformer_flops=left), table=table, progress=False)
    asked = ah.Budget(transformer_flops=left, corrections=0 if method == "stack" else 2)
    return ah.search(pipe, inputs, strategy="stack", budget=asked, progress=False)


def images(pipe: Any, case: budget.Case, count: int) -> Tensor:
    """Held-out pictures (count, 3, H, W), each of a seed of its own."""
    made = []
    for begin in range(0, count, case.batch):
        asked = [case.images[i % len(case.images)] for i in range(begin, min(begin + case.batch, count))]
        seeds = [torch.Generator().manual_seed(i) for i in range(begin, begin + len(asked))]
        made.append(torch.as_tensor(pipe(**{**case.common, case.asks: asked, "generator": seeds})[0]))
    return torch.cat(made)


def mean_and_error(values: Tensor) -> dict[str, float]:
    """The mean, and its standard error."""
    return {"mean": float(values.mean()), "standard_error": float(values.std() / len(values) ** 0.5)}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the process time that it took."""
    started = time.process_time()
    return work(), time.process_time() - started


def main(
    name: budget.Name,
    tools: Annotated[Path, typer.Option(help="folder of perceptual.py")],
    count: Annotated[int, typer.Option(help="held-out pictures")] = 32,
) -> None:
    """Search, generate, measure; write the table after each row."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(tools))
    lpips = importlib.import_module("perceptual").LPIPS()
    path, case, pipe = HERE / f"results/stack_{name}.json", budget.CASES[name], ah.tiny.load(name)
    pipe.set_progress_bar_config(disable=True)
    about = {
        "command": f"python benchmarks/stack.py {name} --tools TOOLS --count {count}",
        "date": datetime.now(UTC).date().isoformat(),
        "model": f"tiny:{name}, {case.common['num_inference_steps']} steps, guidance {case.common['guidance_scale']}",
        "inputs": 4,
        "pictures": count,
        "device": "cpu, float32, one thread",
        "versions": versions(),
    }
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    calibrating = {**case.common, case.asks: case.calibration[:4], "generator": torch.Generator().manual_seed(budget.SEED)}
    pipe(**{**calibrating, "num_inference_steps": 2})
    _, raw_seconds = timed(lambda: pipe(**calibrating))
    table, table_seconds = timed(lambda: ah.calibrate(pipe, calibrating, progress=False))
    raw = images(pipe, case, count)
    for left in tqdm(LEFT):
        for method in ("stack", "stack, checked", "sites"):
            if (row := f"{left:.0%} {method}") in rows:
                continue
            plan, seconds = timed(lambda method=method, left=left: found(pipe, case, method, left, table))  # type: ignore[misc]
            with ah.applied(pipe, plan):
                made = images(pipe, case, count)
            distances = lpips(made * 2 - 1, raw * 2 - 1).flatten()
            rows[row] = {
                "transformer_flops": plan.about["search"]["transformer_flops"],
                "predicted_error": plan.about["search"]["predicted_error"],
                "search_by_raw": (seconds + table_seconds * (method == "sites")) / raw_seconds,
                "lpips": mean_and_error(distances),
                "lpips_median": float(distances.median()),
                "psnr": mean_and_error(decibels(squared_errors(made, raw))),
                "steps": "".join("." if all(isinstance(cell, Reuse) for cell in step) else "F" for step in plan.cells),
            }
            path.write_text(json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
