"""Plans on what they were not found for: other labels or prompts, seeds, guidance; beside plans that were found for these.

    python benchmarks/evidence_transfer.py dit --tools TOOLS
    python benchmarks/evidence_transfer.py mmdit32 --tools TOOLS

What is there already is not made again. `perceptual.py`: see README.md.
"""

from dataclasses import replace
from typing import Any

import budget
import typer
from evidence import Bench, Judge, Run, Tools, left, write
from evidence_techniques import INPUTS, LABELS, PROMPTS

import arrowhead as ah

NAME = budget.Name
IMAGES = 12
HOME = {
    NAME.DIT: Run(tuple(LABELS.calibration[:INPUTS]), 20, 3.0, budget.SEED),
    NAME.MMDIT32: Run(tuple(PROMPTS.calibration[:INPUTS]), 28, 4.0, budget.SEED),
}
OTHERS = {
    NAME.DIT: {
        "other labels": replace(HOME[NAME.DIT], asked=tuple(LABELS.calibration[-INPUTS:])),
        "other seeds": replace(HOME[NAME.DIT], seed=2 * budget.SEED),
        "guidance 1.5": replace(HOME[NAME.DIT], guidance=1.5),
        "guidance 6": replace(HOME[NAME.DIT], guidance=6.0),
    },
    NAME.MMDIT32: {
        "other prompts": replace(HOME[NAME.MMDIT32], asked=tuple(PROMPTS.calibration[-INPUTS:])),
        "other seeds": replace(HOME[NAME.MMDIT32], seed=2 * budget.SEED),
        "guidance 2": replace(HOME[NAME.MMDIT32], guidance=2.0),
        "guidance 8": replace(HOME[NAME.MMDIT32], guidance=8.0),
    },
}
SEARCHES: dict[NAME, dict[str, dict[str, Any]]] = {
    NAME.DIT: {
        "greedy D4": {"strategy": "greedy", "threshold": "D4"},
        "budget 40%": {"budget": ah.Budget(module_flops=0.4)},
    },
    NAME.MMDIT32: {
        "headwise 0.6": {"strategy": "headwise", "threshold": 0.6},
        "budget 40%": {"budget": ah.Budget(module_flops=0.4)},
    },
}


def pictures_of(run: Run) -> Run:
    """Twelve pictures of what a calibration was asked for, with its guidance and seeds of their own."""
    asked = tuple(run.asked[i % len(run.asked)] for i in range(IMAGES))
    return replace(run, asked=asked, seed=0 if run.seed == budget.SEED else run.seed + 1000)


def main(name: budget.Name, tools: Tools) -> None:
    """Find the plans, make the pictures of every kind by the plan of home and by the one that was found for them."""
    bench, judge, home = Bench(name, "transfer"), Judge(tools), HOME[name]
    kinds = {"home": home, **OTHERS[name]}
    table: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for kind, run in kinds.items():
        raw = bench.pictures(f"raw, {kind}", pictures_of(run))
        for search, how in SEARCHES[name].items():
            for which, made_for in {"home": home, kind: run}.items():
                extra = {"table": f"table, {which}"} if "budget" in how else {}
                plan = bench.plan(f"{search}, for {which}", made_for, **extra, **how)
                images = bench.pictures(f"{search}, for {which}, on {kind}", pictures_of(run), plan)
                table[kind][f"{search}, found for {which}"] = left(plan) | judge(images, raw)
    runs = {f"calibration, {kind}": run for kind, run in kinds.items()}
    runs |= {f"pictures, {kind}": pictures_of(run) for kind, run in kinds.items()}
    write(f"transfer_{name}", runs, {"pictures": table}, model=f"tiny:{name}")


if __name__ == "__main__":
    typer.run(main)
