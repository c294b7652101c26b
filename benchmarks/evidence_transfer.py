"""Plans on other labels or prompts, seeds and guidance than they were found for, and plans that were found for these.

    python benchmarks/evidence_transfer.py dit --tools TOOLS
    python benchmarks/evidence_transfer.py mmdit32 --tools TOOLS

Files that exist are not made again. `perceptual.py`: see README.md.
"""

from dataclasses import replace
from typing import Any

import budget
import typer
from evidence import Bench, Judge, Run, Tools, left, write
from evidence_techniques import runs_of

import arrowhead as ah

IMAGES = 6
GUIDANCE = {budget.Name.DIT: (1.5, 6.0), budget.Name.MMDIT32: (2.0, 8.0)}
SEARCHES: dict[str, dict[str, Any]] = {
    "headwise 0.6": {"strategy": "headwise", "threshold": 0.6},
    "budget 40%": {"budget": ah.Budget(module_flops=0.4)},
}


def kinds_of(name: budget.Name) -> dict[str, Run]:
    """What plans are found for: home, and what differs from it in one thing."""
    home, case = runs_of(name)["calibration"], budget.CASES[name]
    return {
        "home": home,
        "other inputs": replace(home, asked=tuple(case.calibration[4:6]), seed=2 * budget.SEED),
        **{f"guidance {scale:g}": replace(home, guidance=scale) for scale in GUIDANCE[name]},
    }


def pictures_of(run: Run) -> Run:
    """Pictures of what a calibration was asked for, with its guidance; their seeds are no calibration's."""
    asked = tuple(run.asked[i % len(run.asked)] for i in range(IMAGES))
    return replace(run, asked=asked, seed=0 if run.seed == budget.SEED else run.seed + 1000)


def main(name: budget.Name, tools: Tools) -> None:
    """Find the plans, make the pictures of every kind by the plan of home and by the one that was found for them."""
    bench, judge, kinds = Bench(name, "transfer"), Judge(tools), kinds_of(name)
    table: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for kind, run in kinds.items():
        raw = bench.pictures(f"raw, {kind}", pictures_of(run))
        for search, how in SEARCHES.items():
            for which, made_for in {"home": kinds["home"], kind: run}.items():
                extra = {"table": f"table, {which}"} if "budget" in how else {}
                plan = bench.plan(f"{search}, for {which}", made_for, **extra, **how)
                images = bench.pictures(f"{search}, for {which}, on {kind}", pictures_of(run), plan)
                table[kind][f"{search}, found for {which}"] = left(plan) | judge(images, raw)
    runs = {f"calibration, {kind}": run for kind, run in kinds.items()}
    runs |= {f"pictures, {kind}": pictures_of(run) for kind, run in kinds.items()}
    write(f"transfer_{name}", runs, {"pictures": table}, model=f"tiny:{name}")


if __name__ == "__main__":
    typer.run(main)
