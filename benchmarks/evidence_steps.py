"""Few steps and many: DiTFastAttn's search and a budget of the same FLOPs, against raw pictures of as many steps.

    python benchmarks/evidence_steps.py dit --tools TOOLS
    python benchmarks/evidence_steps.py mmdit32 --tools TOOLS

Files that exist are not made again. `--only` takes some numbers of steps. `perceptual.py`: see README.md.
"""

from typing import Annotated, Any

import budget
import typer
from evidence import Bench, Judge, Tools, left, write
from evidence_techniques import runs_of

import arrowhead as ah

STEPS = {budget.Name.DIT: (20, 50, 100, 200), budget.Name.MMDIT32: (14, 28, 56)}
THRESHOLD, IMAGES, INPUTS = "D6", 6, 1


def of_steps(bench: Bench, judge: Judge, name: budget.Name, steps: int) -> dict[str, Any]:
    """Both searches' plans at this number of steps, and what their pictures have lost."""
    runs = runs_of(name, steps, IMAGES, INPUTS)
    raw = bench.pictures(f"raw {steps}", runs["pictures"])
    greedy = bench.plan(f"greedy {steps}", runs["calibration"], strategy="greedy", threshold=THRESHOLD)
    limit = ah.Budget(module_flops=greedy.flops().module)
    spent = bench.plan(f"budget {steps}", runs["calibration"], table=f"table {steps}", budget=limit)
    found: dict[str, Any] = {"raw_cpu_seconds_of_calibration": bench.raw_seconds(runs["calibration"])}
    for what, plan in (("greedy", greedy), ("budget", spent)):
        found[what] = left(plan) | judge(bench.pictures(f"{what} {steps}", runs["pictures"], plan), raw)
    return found


def main(
    name: budget.Name,
    tools: Tools,
    only: Annotated[list[int] | None, typer.Option(help="numbers of steps; all when there is none")] = None,
) -> None:
    """Find the plans, make the pictures, compare them with the raw ones of the same seeds and steps."""
    bench, judge = Bench(name, "steps"), Judge(tools)
    chosen = [steps for steps in STEPS[name] if not only or steps in only]
    table = {str(steps): of_steps(bench, judge, name, steps) for steps in chosen}
    most = bench.pictures(f"raw {chosen[-1]}", runs_of(name, chosen[-1], IMAGES, INPUTS)["pictures"])
    for steps in chosen[:-1]:
        fewer = bench.pictures(f"raw {steps}", runs_of(name, steps, IMAGES, INPUTS)["pictures"])
        table[str(steps)][f"raw against raw of {chosen[-1]} steps"] = judge(fewer, most)
    runs = {f"{what}, {steps} steps": run for steps in chosen for what, run in runs_of(name, steps, IMAGES, INPUTS).items()}
    write(f"steps_{name}", runs, {"steps": table}, model=f"tiny:{name}", threshold=THRESHOLD)


if __name__ == "__main__":
    typer.run(main)
