"""Pictures of plans and of what they do to images, from values alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from arrowhead.analysis.palette import COLOURS, MEANINGS, opacity
from arrowhead.plans.cells import Arrow, Attend, Cell, Radius, method_name, paper_name, radius_sort_key
from arrowhead.plans.plan import Plan

matplotlib.use("agg")


def plan_map(plans: Mapping[str, Plan], path: str | Path, title: str = "") -> None:
    """Each plan as a map of sites over steps, one colour per kind of cell (DiTFastAttn, Figure 5)."""
    present = {paper_name(cell) for plan in plans.values() for row in plan.cells for cell in row}
    names = [name for name in COLOURS if name in present]
    height = sum(0.9 + 0.13 * len(plan.target.sites) for plan in plans.values())
    figure, axes = plt.subplots(len(plans), 1, figsize=(9, height + 0.7), squeeze=False, layout="constrained")
    colours = ListedColormap([COLOURS[name] for name in names])
    for axis, (name, plan) in zip(axes[:, 0], plans.items(), strict=True):
        grid = [[names.index(paper_name(cell)) for cell in column] for column in plan.columns]  # sites × steps
        axis.imshow(grid, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", interpolation="nearest")
        axis.set_xticks([x - 0.5 for x in range(plan.steps + 1)], minor=True)
        axis.set_yticks([y - 0.5 for y in range(len(plan.target.sites) + 1)], minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
        axis.tick_params(which="minor", length=0)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(integer=True))
        left = plan.flops()
        kinds = {site.kind for site in plan.target.sites}
        besides = "projections" if kinds == {"self_attention"} else "all sites"
        axis.set_title(f"{name}: {left.attention:.0%} of attention FLOPs left, {left.module:.0%} with {besides}", loc="left")
        axis.set_xlabel("step")
        axis.set_ylabel("site")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles = [Patch(color=COLOURS[name], label=f"{name}: {MEANINGS[name]}") for name in names]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def head_map(plan: Plan, site: int, path: str | Path) -> None:
    """What every head of one site does over the steps: heads × steps, arrows the lighter the narrower they are."""
    at = plan.target.sites[site]
    rows = [[_word(cell, head) for cell in plan.columns[site]] for head in range(at.heads)]
    words = sorted(
        {word for row in rows for word in row}, key=lambda word: (word[0], [-reach for reach in radius_sort_key(word[1])])
    )
    colours = ListedColormap([_shade(word, words) for word in words])
    figure, axis = plt.subplots(figsize=(9, 1.3 + 0.22 * at.heads), layout="constrained")
    grid = [[words.index(word) for word in row] for row in rows]
    axis.imshow(grid, cmap=colours, vmin=-0.5, vmax=len(words) - 0.5, aspect="auto", interpolation="nearest")
    axis.set_xticks([x - 0.5 for x in range(plan.steps + 1)], minor=True)
    axis.set_yticks([y - 0.5 for y in range(at.heads + 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="step", ylabel="head")
    axis.set_title(at.path, loc="left")
    handles = [Patch(color=_shade(word, words), label=_said(word)) for word in words]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=140)
    plt.close(figure)


Word = tuple[str, Radius]  # a name of the palette, and an arrow's radius or 0


def _word(cell: Cell, head: int) -> Word:
    if isinstance(cell, Attend):
        method = cell.of_head(head).method
        assert not isinstance(method, tuple)
        return method_name(method), method.radius if isinstance(method, Arrow) else 0
    return paper_name(cell), 0


def _shade(word: Word, words: list[Word]) -> Any:
    """The palette's colour, towards white for the narrower of several arrows."""
    name, radius = word
    laid_on = opacity(radius, [other for of, other in words if of == name])
    return tuple(1 - laid_on * (1 - part) for part in to_rgb(COLOURS[name]))


def _said(word: Word) -> str:
    return f"{word[0]}, {word[1]} on each side" if word[1] else word[0]


def sweep_curve(plans: Mapping[str, Plan], measure: str, path: str | Path) -> None:
    """Predicted error of the final latents over what is left of the FLOPs, for plans found under a budget."""
    left, errors = ([plan.about["search"][what] for plan in plans.values()] for what in (measure, "predicted_error"))
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(left, errors, marker="o", color=COLOURS["AST"])
    axis.set(xlabel=f"{measure.replace('_', ' ')} left", ylabel="predicted error", xlim=(0, 1.02), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def image_grid(rows: Mapping[str, Tensor], columns: list[str], path: str | Path, title: str = "") -> None:
    """Rows of images, (n, C, H, W) in [0, 1] each, one row a setting, with the same seed in each column."""
    shape = (len(rows), len(columns))
    size = (1.1 * shape[1] + 1.9, 1.15 * shape[0] + 0.3)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")  # (H, W, C)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=8)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)
