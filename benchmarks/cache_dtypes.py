"""What caches in 8 bits cost: error and LPIPS of eight images against the same plan with native caches, and bytes.

    python benchmarks/cache_dtypes.py --tools TOOLS

On both bundled models, one calibration each, solved for two budgets, in step and by head. Plans are judged on seeds and inputs
that the calibration has not seen. `one scale a token` is what `engine/cache_encoding.py` would do if all channels of a
module's output shared a scale, instead of the channels of one head. TOOLS holds `perceptual.py`, see benchmarks/README.md;
without it LPIPS is left out.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Annotated, Any
from unittest.mock import patch

import budget
import torch
import typer
from torch import Tensor
from tqdm import tqdm

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.searches.budget.config import Granularity
from arrowhead.searches.budget.validation import errors_of
from arrowhead.versions import versions

BUDGETS, GRANULARITIES = (0.4, 0.25), tuple[Granularity, ...](("step", "head"))
STEPS, IMAGES, BATCH = 20, 8, 4
NAMES = (budget.Name.DIT, budget.Name.MMDIT32)

HERE = Path(__file__).parent


@contextmanager
def one_scale() -> Iterator[None]:
    """Encode with one scale for each token of a module's output."""
    with patch("arrowhead.engine.cache_encoding.groups", lambda *_: 1), patch("arrowhead.plans.memory.groups", lambda *_: 1):
        yield


KEPT: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]] = {
    "native": ({}, nullcontext),
    "int8": ({"cache_dtype": "int8"}, nullcontext),
    "int8, one scale a token": ({"cache_dtype": "int8"}, one_scale),
    "fp8": ({"cache_dtype": "fp8"}, nullcontext),
    "fp8, one scale a token": ({"cache_dtype": "fp8"}, one_scale),
}


def calls(name: budget.Name) -> list[dict[str, Any]]:
    """Arguments of the calls that plans are judged by, with generators of their own."""
    case = budget.CASES[name]
    return [
        {**case.common, "num_inference_steps": STEPS, case.asks: case.images[start : start + BATCH], "generator": start + 1}
        for start in range(0, IMAGES, BATCH)
    ]


def generated(pipe: Any, inputs: list[dict[str, Any]]) -> list[Tensor]:
    """Final latents of each call; those of the bundled models are pixels in [−1, 1]."""
    seeded = ({**call, "generator": torch.Generator().manual_seed(call["generator"])} for call in inputs)
    return [driver_of(pipe, call).final_latents() for call in seeded]


def compared(made: list[Tensor], other: list[Tensor], lpips: Callable[..., Tensor] | None) -> dict[str, float]:
    """Means over the batches."""
    errors = [errors_of(*pair) for pair in zip(made, other, strict=True)]
    found = {"error": mean(each.error for each in errors), "detail": mean(each.detail for each in errors)}
    if lpips is not None:
        found["lpips"] = float(lpips(*(torch.cat(each).clamp(-1, 1) for each in (made, other))).mean())
    return found


def judged(name: budget.Name, lpips: Callable[..., Tensor] | None) -> dict[str, Any]:
    """One model's plans, each with every way to keep its caches."""
    pipe, case = ah.tiny.load(name), budget.CASES[name]
    pipe.set_progress_bar_config(disable=True)
    inputs = calls(name)
    raw = generated(pipe, inputs)
    calibration = budget.calibration(case) | {"num_inference_steps": STEPS, case.asks: case.calibration[:BATCH]}
    table = ah.calibrate(pipe, calibration)
    results: dict[str, Any] = {}
    for granularity in GRANULARITIES:
        for left in tqdm(BUDGETS, desc=f"{name} by {granularity}"):
            plan, native = ah.solve(table, ah.Budget(module_flops=left, granularity=granularity)), None
            rows = results.setdefault(f"by {granularity}", {}).setdefault(f"{left:.0%}", {})
            for kept, (settings, around) in KEPT.items():
                with around(), ah.applied(pipe, plan, **settings) as run:
                    made = generated(pipe, inputs)
                    peak = run.summary().peak_cache_bytes
                    predicted = plan.memory(BATCH, torch.float32, **settings)
                    halves = plan.memory(1, torch.bfloat16, **settings)
                native = native or made
                rows[kept] = {
                    "peak_bytes": peak,
                    "predicted_bytes": predicted.peak,
                    "of": dict(predicted.of),
                    "bytes_an_image_in_bfloat16": halves.peak,
                    "to raw": compared(made, raw, lpips),
                    "to native": compared(made, native, lpips),
                }
    return results


def main(tools: Annotated[Path | None, typer.Option(help="folder of perceptual.py")] = None) -> None:
    """Calibrate, solve, generate; write the table."""
    torch.set_num_threads(1)
    lpips = None
    if tools is not None:
        sys.path.insert(0, str(tools))
        lpips = importlib.import_module("perceptual").LPIPS()
    about = {
        "command": "python benchmarks/cache_dtypes.py --tools TOOLS",
        "date": datetime.now(UTC).date().isoformat(),
        "device": "cpu, float32, one thread",
        "steps": STEPS,
        "images": IMAGES,
        "batch": BATCH,
        "versions": versions(),
    }
    path, results = HERE / "results/cache_dtypes.json", dict[str, Any]()
    for name in NAMES:
        results[f"tiny:{name}"] = judged(name, lpips)
        path.write_text(json.dumps(about | results, indent=1, allow_nan=False) + "\n")  # written after each model


if __name__ == "__main__":
    typer.run(main)
