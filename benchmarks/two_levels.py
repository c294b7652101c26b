"""Two levels beside the stack alone on `mmdit`, 1024 tokens and 20 steps, at equal FLOPs of the transformer.

    python benchmarks/two_levels.py --tools TOOLS

The budgets are what 5, 7 and 3 computed steps cost, so that the stack alone leaves nothing of them. Plans are found on four
inputs, and judged by LPIPS and PSNR on inputs and seeds that no search has seen; a difference is paired. What was learnt, found
and generated is kept in `checkpoints/two_levels`, and not made again. TOOLS holds `perceptual.py`, see benchmarks/README.md.
"""

import importlib
import json
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import budget as budgets
import headwise
import torch
import typer
from stack import mean_and_error
from torch import Tensor

import arrowhead as ah
from arrowhead.calibration.driver import Driver, driver_of
from arrowhead.metrics.images import decibels, squared_errors
from arrowhead.plans.cells import FULL, Box
from arrowhead.searches.budget.sensitivity.recording import record
from arrowhead.searches.stack.levels import KINDS, LevelSolver, tried_levels
from arrowhead.versions import versions

COMPUTED, STEPS, BATCH = (5, 7, 3), 20, 4
RADII = (64, Box(1, 8, 8), Box(1, 4, 4))
WORK, RESULT = Path("checkpoints/two_levels"), Path(__file__).parent / "results/two_levels_mmdit.json"
COMMON = {"num_inference_steps": STEPS, "guidance_scale": headwise.GUIDANCE, "output_type": "pt"}


def learnt(pipe: Any, driver: Driver, inputs: dict[str, Any]) -> tuple[LevelSolver, Tensor]:
    """The profile and the table of four inputs, and their final latents."""
    profile, table, final = (WORK / name for name in ("mmdit.profile", "table.safetensors", "final.pt"))
    if not profile.exists():
        ah.profile(pipe, inputs).save(profile)
    if not (table.exists() and final.exists()):
        recording = record(driver, ah.Extent(radii=RADII, ages=1, kinds=KINDS))
        torch.save(recording.final, final)
        recording.table.save(table)
    return LevelSolver(ah.Profile.load(profile), ah.Table.load(table)), torch.load(final)


def plans(driver: Driver, solver: LevelSolver, final: Tensor, computed: int) -> dict[str, ah.Plan]:
    """The plan of the stack alone, and that of two levels, for what so many computed steps cost."""
    part = computed / STEPS
    allowed = ah.Budget(transformer_flops=part + (1 - part) * solver.known.skipped_flops + 1e-9)
    path = WORK / f"{computed}.json"
    if not path.exists():
        tried_levels(driver, allowed, solver, final).save(path)
    return {"stack": solver.plan(allowed, solver.alone(allowed)), "two levels": ah.Plan.load(path)}


def images(pipe: Any, name: str, plan: ah.Plan | None, count: int) -> Tensor:
    """Held-out pictures (count, 3, H, W), each of a seed of its own."""
    made = []
    for begin in range(0, count, BATCH):
        path, some = WORK / f"{name} {begin}.pt", range(begin, begin + BATCH)
        if not path.exists():
            seeds = [torch.Generator().manual_seed(i) for i in some]
            with nullcontext() if plan is None else ah.applied(pipe, plan):
                out = pipe(**COMMON, prompt=[headwise.PROMPTS[i] for i in some], generator=seeds)[0]
            torch.save(torch.as_tensor(out), path)
        made.append(torch.load(path))
    return torch.cat(made)


def main(
    tools: Annotated[Path, typer.Option(help="folder of perceptual.py")],
    count: Annotated[int, typer.Option(help="held-out pictures, a multiple of 4")] = 16,
) -> None:
    """Learn, search, generate, measure; write the table after each budget."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(tools))
    lpips = importlib.import_module("perceptual").LPIPS()
    pipe = ah.tiny.load("mmdit")
    WORK.mkdir(parents=True, exist_ok=True)
    seed = torch.Generator().manual_seed(budgets.SEED)
    inputs = {**COMMON, "prompt": headwise.CALIBRATION[:4], "generator": seed}
    driver = driver_of(pipe, inputs)
    solver, final = learnt(pipe, driver, inputs)
    raw = images(pipe, "raw", None, count)
    about = {
        "command": f"python benchmarks/two_levels.py --tools TOOLS --count {count}",
        "date": datetime.now(UTC).date().isoformat(),
        "model": f"tiny:mmdit, {STEPS} steps, guidance {headwise.GUIDANCE}",
        "inputs": 4,
        "pictures": count,
        "radii": [str(radius) for radius in RADII],
        "device": "cpu, float32, one thread",
        "versions": versions(),
    }
    rows: dict[str, Any] = {}
    for computed in COMPUTED:
        distances = {}
        for name, plan in plans(driver, solver, final, computed).items():
            made = images(pipe, f"{computed} {name}", plan, count)
            distances[name] = lpips(made * 2 - 1, raw * 2 - 1).flatten()
            search = plan.about["search"]
            rows[f"{computed} steps' FLOPs, {name}"] = {
                **{key: search[key] for key in ("transformer_flops", "computed", "arrows", "predicted_error")},
                "tried": search.get("tried", []),
                "lpips": mean_and_error(distances[name]),
                "lpips_median": float(distances[name].median()),
                "psnr": mean_and_error(decibels(squared_errors(made, raw))),
                "steps": "".join("F" if FULL in row else "." for row in plan.cells),
            }
        rows[f"{computed} steps' FLOPs, two levels less the stack"] = mean_and_error(
            distances["two levels"] - distances["stack"]
        )
        RESULT.write_text(json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
