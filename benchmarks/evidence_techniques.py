"""Each of DiTFastAttn's techniques alone, all together, and both other searches: FLOPs left, quality, and search time.

    python benchmarks/evidence_techniques.py dit --tools TOOLS
    python benchmarks/evidence_techniques.py mmdit32 --tools TOOLS

All searches of a model see the same two inputs: a greedy one costs as much as generating its inputs twenty times. Files that
exist are not made again. `perceptual.py`: see README.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import budget
import typer
from evidence import Bench, Judge, Run, Tools, left, right_class, write

import arrowhead as ah
from arrowhead.plans.cells import ASC, AST, Arrow, Attend, Cell, wa_rs
from arrowhead.plans.layout import Tokens

TECHNIQUES: dict[str, tuple[str, ...]] = {
    "all": ("AST", "WA-RS+ASC", "WA-RS", "ASC"),
    "AST": ("AST",),
    "ASC": ("ASC",),
    "WA-RS": ("WA-RS",),
    "WA": ("WA",),
    "all, no residual": ("AST", "WA+ASC", "WA", "ASC"),
}
LEVELS = {budget.Name.DIT: ("D4", "D6"), budget.Name.MMDIT32: ("D6",)}
INPUTS, IMAGES, STEPS = 2, 12, {budget.Name.DIT: 20, budget.Name.MMDIT32: 14}
THRESHOLDS, BUDGETS = (0.2, 0.6, 1.0), (0.7, 0.55, 0.4, 0.25, 0.1)


def runs_of(name: budget.Name, steps: int | None = None, images: int = IMAGES, inputs: int = INPUTS) -> dict[str, Run]:
    """What is generated for a search and for the comparison."""
    case, steps = budget.CASES[name], steps or STEPS[name]
    guidance = case.common["guidance_scale"]
    return {
        "calibration": Run(tuple(case.calibration[:inputs]), steps, guidance, budget.SEED),
        "pictures": Run(tuple(case.images[:images]), steps, guidance),
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
    run = runs_of(name)["calibration"]
    for technique, only in TECHNIQUES.items():
        for level in ("D2", "D4", "D6") if technique == "all" else LEVELS[name]:
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
    bench, judge, runs, table = Bench(name, "techniques"), Judge(tools), runs_of(name), {}
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
