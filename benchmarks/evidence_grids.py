"""Grids of pictures and maps of plans for docs/results.md, from the work folders; see evidence_figures.py."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import budget
import evidence_failures
import evidence_negative
import typer
from evidence import FIGURES, Bench
from evidence_techniques import runs_of
from shards import load_images
from torch import Tensor

import arrowhead as ah
from arrowhead.analysis import draw
from arrowhead.searches.api import THRESHOLDS

COLUMNS = 8
FEW = 8


def named(case: Any, asked: Sequence[Any]) -> list[str]:
    """What stands above the columns: the class, or the prompt."""
    return [ah.tiny.CIFAR10[one] if case.asks == "class_labels" else one.replace(" of a ", "\n") for one in asked[:COLUMNS]]


def made(bench: Bench, name: str) -> Tensor:
    """Pictures that are there; nothing is generated here."""
    if not (bench.work / name).is_dir():
        raise FileNotFoundError(2, "not made yet", str(bench.work / name))
    return load_images(bench.work / name)


def shown(rows: Mapping[str, Tensor], columns: list[str], name: str, title: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw.image_grid({row: images[:COLUMNS] for row, images in rows.items()}, columns, FIGURES / f"{name}.png", title)


def failures(name: budget.Name) -> None:
    """Raw above, compressed below: hardly anything left, then few steps."""
    whole, few, run = Bench(name, "techniques"), Bench(name, "failures"), runs_of(name)["pictures"]
    rows = {f"raw, {run.steps} steps": made(whole, "raw")}
    for what in ("all D6", "budget 25%", "budget 10%"):
        plan = ah.Plan.load(whole.work / f"{what}.json")
        rows[f"{what.replace('all', 'greedy')}\n({plan.flops().module:.0%} left)"] = made(whole, what)
    if (few.work / f"raw {FEW}").is_dir():
        rows[f"raw, {FEW} steps"] = made(few, f"raw {FEW}")
        for what in evidence_failures.SEARCHES:
            plan = ah.Plan.load(few.work / f"{what}, {FEW}.json")
            rows[f"{what}, {FEW} steps\n({plan.flops().module:.0%} left)"] = made(few, f"{what}, {FEW} steps")
    title = f"tiny:{name}, the same seed in each column; in brackets what is left of the attention modules' FLOPs"
    shown(rows, named(whole.case, run.asked), f"failures_{name}", title)


def negative() -> None:
    """Without and with the negative prompt, raw and compressed."""
    bench = Bench(evidence_negative.NAME, "negative")
    rows = {"raw": made(bench, "raw"), "raw, negative": made(bench, "raw, steered")}
    for what in ("greedy D6", "budget 25%"):
        rows[what] = made(bench, f"{what}, found without")
        rows[f"{what}, negative"] = made(bench, f"{what}, found without, steered")
    title = f"tiny:mmdit32, without and with the negative prompt “{evidence_negative.NEGATIVE}”, the same seed in each column"
    shown(rows, named(bench.case, evidence_negative.PLAIN.asked), "negative_pictures", title)


def plans() -> None:
    """DiTFastAttn's plans for the MMDiT (its Figure 5): D1 to D6 where budget.py has found them, else those at hand."""
    work = budget.work_of(budget.Name.MMDIT32)
    found = {name: ah.Plan.load(path) for name in THRESHOLDS if (path := work / f"greedy {name}.json").exists()}
    if len(found) < len(THRESHOLDS):
        typer.echo("plans: not all of D1 to D6 are there; budget.py search mmdit32 finds them")
        work = Bench(budget.Name.MMDIT32, "techniques").work
        found = {name: ah.Plan.load(path) for name in THRESHOLDS if (path := work / f"all {name}.json").exists()}
    steps = next(iter(found.values())).steps
    title = f"DiTFastAttn's plans for the MMDiT on emoji, {steps} steps, six layers"
    draw.plan_map(found, FIGURES / "plans_mmdit32.png", title)


def draw_all() -> None:
    """All of them; where a part has not been made, its grid is left out."""
    for draw_one in (partial(failures, budget.Name.DIT), partial(failures, budget.Name.MMDIT32), negative, plans):
        try:
            draw_one()
        except FileNotFoundError as missing:
            typer.echo(f"{missing.filename} is not there, left out")
