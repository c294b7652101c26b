"""Each of DiTFastAttn's techniques alone, and all together, beside both other searches: what they leave, lose and take.

    python benchmarks/evidence_techniques.py dit --tools TOOLS
    python benchmarks/evidence_techniques.py mmdit32 --tools TOOLS

All searches of a model see the same two inputs: a greedy one costs as much as generating its inputs twenty times. What is there
already is not made again. `perceptual.py`: see README.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import budget
import typer
from evidence import Bench, Judge, Run, Tools, left, right_class, write

import arrowhead as ah
from arrowhead.layout import Tokens
from arrowhead.methods import ASC, AST, Arrow, Attend, Cell, wa_rs

TECHNIQUES: dict[str, tuple[str, ...]] = {
    "all": ("AST", "WA-RS+ASC", "WA-RS", "ASC"),
    "AST": ("AST",),
    "ASC": ("ASC",),
    "WA-RS": ("WA-RS",),
    "WA": ("WA",),
    "all, no residual": ("AST", "WA+ASC", "WA", "ASC"),
}
LEVELS = ("D2", "D4", "D6")
INPUTS, IMAGES = 2, {budget.Name.DIT: 20, budget.Name.MMDIT32: 16}
THRESHOLDS, BUDGETS = (0.2, 0.6, 1.0), (0.7, 0.55, 0.4, 0.25, 0.1)
LABELS, PROMPTS = budget.CASES[budget.Name.DIT], budget.CASES[budget.Name.MMDIT32]
RUNS = {
    budget.Name.DIT: {
        "calibration": Run(tuple(LABELS.calibration[:INPUTS]), 20, 3.0, budget.SEED),
        "pictures": Run(tuple(LABELS.images[: IMAGES[budget.Name.DIT]]), 20, 3.0),
    },
    budget.Name.MMDIT32: {
        "calibration": Run(tuple(PROMPTS.calibration[:INPUTS]), 28, 4.0, budget.SEED),
        "pictures": Run(tuple(PROMPTS.images[: IMAGES[budget.Name.MMDIT32]]), 28, 4.0),
    },
}


@dataclass(frozen=True)
class Offered(ah.Greedy):
    """DiTFastAttn's search with these candidates, in this order, with its radius of an eighth."""

    only: tuple[str, ...] = TECHNIQUES["all"]

    def candidates(self, tokens: Tokens, guided: bool) -> Sequence[Cell]:
        """The cells that are tried; both models are guided."""
        assert guided
        radius = tokens.visual // 8
        window, shared = Attend(Arrow(radius)), Attend(Arrow(radius), share_cfg=True)
        cells: dict[str, Cell] = {"AST": AST, "ASC": ASC, "WA": window, "WA+ASC": shared}
        cells |= {"WA-RS": wa_rs(radius), "WA-RS+ASC": wa_rs(radius, share_cfg=True)}
        return [cells[name] for name in self.only]


def plans(bench: Bench, name: budget.Name) -> Iterator[tuple[str, ah.Plan]]:
    """Every setting's plan."""
    run = RUNS[name]["calibration"]
    for technique, only in TECHNIQUES.items():
        for level in LEVELS:
            what = f"{technique} {level}"
            yield what, bench.plan(what, run, strategy=Offered(only=only), threshold=level)
    for threshold in THRESHOLDS:
        what = f"headwise {threshold}"
        yield what, bench.plan(what, run, strategy="headwise", threshold=threshold)
    for share in BUDGETS:
        what = f"budget {share:.0%}"
        yield what, bench.plan(what, run, table="table", budget=ah.Budget(module_flops=share))


def main(name: budget.Name, tools: Tools) -> None:
    """Find the plans, make the pictures, compare them with the raw ones of the same seeds."""
    bench, judge, runs, table = Bench(name, "techniques"), Judge(tools), RUNS[name], {}
    run = runs["pictures"]
    raw = bench.pictures("raw", run)
    for what, plan in plans(bench, name):
        images = bench.pictures(what, run, plan)
        table[what] = left(plan) | judge(images, raw)
        if name is budget.Name.DIT:
            table[what]["accuracy"] = right_class(images, run.asked)
    said = {"raw_cpu_seconds": bench.raw_seconds(runs["calibration"]), "settings": table}
    if name is budget.Name.DIT:
        said["raw_accuracy"] = right_class(raw, run.asked)
    write(f"techniques_{name}", runs, said, model=f"tiny:{name}", techniques=TECHNIQUES)


if __name__ == "__main__":
    typer.run(main)
