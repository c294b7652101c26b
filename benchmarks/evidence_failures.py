"""Where compression fails: in few steps, from which little can be reused.

    python benchmarks/evidence_failures.py dit --tools TOOLS
    python benchmarks/evidence_failures.py mmdit32 --tools TOOLS

evidence_techniques.py has the plans that leave hardly any FLOPs; evidence_figures.py draws pictures of both. Files that exist
are not made again. `perceptual.py`: see README.md.
"""

from typing import Any

import budget
import typer
from evidence import Bench, Judge, Tools, left, write
from evidence_techniques import runs_of

import arrowhead as ah

STEPS, IMAGES = (4, 8), 8
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy D6": {"strategy": "greedy", "threshold": "D6"},
    **{f"budget {share:.0%}": {"budget": ah.Budget(module_flops=share)} for share in (0.5,)},
}


def main(name: budget.Name, tools: Tools) -> None:
    """Find plans for few steps, make the pictures, compare them with the raw ones of the same seeds and steps."""
    bench, judge = Bench(name, "failures"), Judge(tools)
    table: dict[str, Any] = {}
    for steps in STEPS:
        runs = runs_of(name, steps, IMAGES)
        raw = bench.pictures(f"raw {steps}", runs["pictures"])
        table[str(steps)] = {}
        for what, how in SEARCHES.items():
            extra = {"table": f"table {steps}"} if "budget" in how else {}
            plan = bench.plan(f"{what}, {steps}", runs["calibration"], **extra, **how)
            images = bench.pictures(f"{what}, {steps} steps", runs["pictures"], plan)
            table[str(steps)][what] = left(plan) | judge(images, raw)
    runs = {f"{what}, {steps} steps": run for steps in STEPS for what, run in runs_of(name, steps, IMAGES).items()}
    write(f"failures_{name}", runs, {"steps": table}, model=f"tiny:{name}")


if __name__ == "__main__":
    typer.run(main)
