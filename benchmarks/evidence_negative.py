"""Negative prompts under compression: how far they move the pictures, raw and by plans that were found without one, or with it.

    python benchmarks/evidence_negative.py --tools TOOLS

On the MMDiT at 32 × 32. Files that exist are not made again. `perceptual.py`: see README.md.
"""

from dataclasses import replace
from typing import Any

import budget
import typer
from evidence import Bench, Judge, Tools, left, write
from evidence_techniques import Offered, runs_of
from torch import Tensor

import arrowhead as ah

NEGATIVE = "a noto of a yellow face"
NAME, IMAGES = budget.Name.MMDIT32, 8
CALIBRATION, PLAIN = runs_of(NAME, images=IMAGES).values()
STEERED = replace(PLAIN, negative=NEGATIVE)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy D6": {"strategy": Offered(), "threshold": "D6"},
    "budget 40%": {"table": "table", "budget": ah.Budget(module_flops=0.4)},
    "budget 25%": {"table": "table", "budget": ah.Budget(module_flops=0.25)},
}
AGAIN = ("greedy D6",)
"""What is searched for with the negative prompt, too."""


def alignment(moved: Tensor, raw: Tensor) -> float:
    """The cosine between what a negative prompt changes under compression and what it changes raw, a mean over pictures."""
    a, b = moved.flatten(1), raw.flatten(1)  # (n, 3·H·W)
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


def main(tools: Tools) -> None:
    """Find the plans, make the pictures with and without the negative prompt, compare them."""
    home, bench, judge = Bench(NAME, "techniques"), Bench(NAME, "negative"), Judge(tools)
    plain, steered = bench.pictures("raw", PLAIN), bench.pictures("raw, steered", STEERED)
    table: dict[str, Any] = {"raw": {"effect": judge(steered, plain)}}
    for what, how in SETTINGS.items():
        of_home = what.replace("greedy", "all")  # the same plans as in evidence_techniques.py
        found = {"found without": home.plan(of_home, CALIBRATION, **how)}
        if what in AGAIN:
            found["found with"] = bench.plan(what, replace(CALIBRATION, negative=NEGATIVE), **how)
        for which, plan in found.items():
            label = f"{what}, {which}"
            a, b = bench.pictures(label, PLAIN, plan), bench.pictures(f"{label}, steered", STEERED, plan)
            table[label] = left(plan) | {
                "effect": judge(b, a),
                "direction": alignment(b - a, steered - plain),
                "error without": judge(a, plain),
                "error with": judge(b, steered),
            }
    runs = {"calibration": CALIBRATION, "without": PLAIN, "with": STEERED}
    write("negative", runs, {"negative_prompt": NEGATIVE, "settings": table}, model=f"tiny:{NAME}")


if __name__ == "__main__":
    typer.run(main)
