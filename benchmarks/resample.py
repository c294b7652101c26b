"""Plans derived for other steps or another resolution, and plans that were searched for there, at the same FLOPs.

    python benchmarks/resample.py dit --tools TOOLS
    python benchmarks/resample.py mmdit32 --tools TOOLS

A calibration at 20 steps and one at 40, of two images each, solved for two budgets; each plan is derived for the other's steps
(`Plan.resample`), and the other's table is solved for the derived plan's FLOPs. A third plan is full in evenly spaced steps,
and reuses in the others. For `mmdit32`, too: its plans on `mmdit`, which has the same blocks and sampler, other weights, and
four times the tokens. Judged on four seeds and inputs (two of `mmdit`) that no calibration has seen, by the error of the final
latents and of their detail, and by LPIPS where TOOLS holds `perceptual.py`, see benchmarks/README.md.
"""

import importlib
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import budget
import torch
import typer
from torch import Tensor
from tqdm import tqdm

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.plans.cells import AST
from arrowhead.searches.budget.validation import errors_of
from arrowhead.versions import versions

BUDGETS = (0.4, 0.25)
STEPS = (20, 40)

HERE = Path(__file__).parent
Lpips = Callable[[Tensor, Tensor], Tensor] | None


def inputs(name: budget.Name, steps: int, images: int, *, held_out: bool) -> dict[str, Any]:
    """Arguments of a call, with a generator of its own."""
    case = budget.CASES[name]
    asked = case.images if held_out else case.calibration
    seed = 1 if held_out else budget.SEED
    call = {**case.common, case.asks: asked[:images], "generator": torch.Generator().manual_seed(seed)}
    return call | {"num_inference_steps": steps}


def judged(
    pipe: Any, call: Callable[[], dict[str, Any]], plans: dict[str, ah.Plan], raw: Tensor, lpips: Lpips
) -> dict[str, Any]:
    """FLOPs of each plan, and how far it strays."""
    rows = {}
    for name, plan in plans.items():
        with ah.applied(pipe, plan):
            made = driver_of(pipe, call()).final_latents()
        errors = errors_of(made, raw)
        rows[name] = {"module_flops": plan.flops().module, "error": errors.error, "detail": errors.detail}
        if lpips is not None:
            rows[name]["lpips"] = float(lpips(made.clamp(-1, 1), raw.clamp(-1, 1)).mean())
    return rows


def beside(derived: ah.Plan, table: ah.Table) -> dict[str, ah.Plan]:
    """The derived plan, the one that is searched for at its FLOPs, and full attention evenly."""
    left = derived.flops().module
    searched = ah.solve(table, ah.Budget(module_flops=left, granularity="step"))
    return {"derived": derived, "searched": searched, "evenly": budget.uniform(searched, left, AST)}


def main(name: budget.Name, tools: Annotated[Path | None, typer.Option(help="folder of perceptual.py")] = None) -> None:
    """Calibrate, solve, derive, generate; write the table."""
    torch.set_num_threads(1)
    lpips: Lpips = None
    if tools is not None:
        sys.path.insert(0, str(tools))
        lpips = importlib.import_module("perceptual").LPIPS()
    about = {
        "command": f"python benchmarks/resample.py {name} --tools TOOLS",
        "date": datetime.now(UTC).date().isoformat(),
        "model": f"tiny:{name}",
        "device": "cpu, float32, one thread",
        "versions": versions(),
    }
    path, results = HERE / f"results/resample_{name}.json", dict[str, Any]()
    pipe = ah.tiny.load(name)
    pipe.set_progress_bar_config(disable=True)
    tables = {steps: ah.calibrate(pipe, inputs(name, steps, 2, held_out=False)) for steps in STEPS}
    plans = {
        (steps, left): ah.solve(table, ah.Budget(module_flops=left, granularity="step"))
        for steps, table in tables.items()
        for left in BUDGETS
    }
    for before, after in (STEPS, STEPS[::-1]):
        call = partial(inputs, name, after, 4, held_out=True)
        raw = driver_of(pipe, call()).final_latents()
        for left in tqdm(BUDGETS, desc=f"{before} to {after} steps"):
            found = beside(plans[before, left].resample(steps=after), tables[after])
            results.setdefault(f"{before} to {after} steps", {})[f"{left:.0%}"] = judged(pipe, call, found, raw, lpips)
            path.write_text(json.dumps(about | results, indent=1, allow_nan=False) + "\n")  # written after each part
    if name != budget.Name.MMDIT32:
        return
    larger = ah.tiny.load("mmdit")
    larger.set_progress_bar_config(disable=True)
    table = ah.calibrate(larger, inputs(name, STEPS[0], 2, held_out=False))
    call = partial(inputs, name, STEPS[0], 2, held_out=True)
    raw = driver_of(larger, call()).final_latents()
    for left in tqdm(BUDGETS, desc="256 to 1024 tokens"):
        found = beside(plans[STEPS[0], left].resample(tokens=table.tokens), table)
        results.setdefault("256 to 1024 tokens", {})[f"{left:.0%}"] = judged(larger, call, found, raw, lpips)
        path.write_text(json.dumps(about | results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
