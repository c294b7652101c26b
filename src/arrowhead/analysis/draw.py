"""Draws plans, sweeps and grids of images with matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from arrowhead.analysis.palette import COLOURS, MEANINGS, figure_text, opacity
from arrowhead.errors import InputsInvalid
from arrowhead.plans import atomic_write
from arrowhead.plans.cells import Arrow, Attend, Cell, Radius, method_name, paper_name, radius_sort_key
from arrowhead.plans.plan import Plan

matplotlib.use("agg")


def save_figure(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a figure, in the format that the ending of `path` names, completely or not at all.

    Raises:
        FileUnwritable: the file cannot be written, or the disk is full.
        InputsInvalid: the ending names no format that matplotlib can write.
    """
    ending, known = Path(path).suffix.removeprefix(".").lower(), figure.canvas.get_supported_filetypes()
    if ending not in known:
        raise InputsInvalid(f"got {path} for a figure, wanted a file that ends in .{', .'.join(sorted(known))}")
    with atomic_write.replacing(path) as file:
        figure.savefig(file, format=ending, dpi=dpi)


def plan_map(plans: Mapping[str, Plan], path: str | Path, title: str = "") -> None:
    """Draw each plan as a map of sites over steps, with one colour for each kind of cell (DiTFastAttn, Figure 5)."""
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
        counted = "projections" if kinds == {"self_attention"} else "all sites"
        shares = f"{left.attention:.0%} of attention FLOPs left, {left.module:.0%} with {counted}"
        axis.set_title(f"{figure_text(name)}: {shares}", loc="left")
        axis.set_xlabel("step")
        axis.set_ylabel("site")
    if title:
        figure.suptitle(figure_text(title), x=0.01, ha="left", fontsize=11)
    handles = [Patch(color=COLOURS[name], label=f"{name}: {MEANINGS[name]}") for name in names]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path, dpi=140)
    plt.close(figure)


def head_map(plan: Plan, site: int, path: str | Path) -> None:
    """Draw what every head of one site does, heads over steps. Narrower arrows are paler."""
    at = plan.target.sites[site]
    rows = [[_head_kind(cell, head) for cell in plan.columns[site]] for head in range(at.heads)]
    kinds = sorted({kind for row in rows for kind in row}, key=lambda kind: (kind[0], [-r for r in radius_sort_key(kind[1])]))
    colours = ListedColormap([_shade(kind, kinds) for kind in kinds])
    figure, axis = plt.subplots(figsize=(9, 1.3 + 0.22 * at.heads), layout="constrained")
    grid = [[kinds.index(kind) for kind in row] for row in rows]
    axis.imshow(grid, cmap=colours, vmin=-0.5, vmax=len(kinds) - 0.5, aspect="auto", interpolation="nearest")
    axis.set_xticks([x - 0.5 for x in range(plan.steps + 1)], minor=True)
    axis.set_yticks([y - 0.5 for y in range(at.heads + 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="step", ylabel="head")
    axis.set_title(figure_text(at.path), loc="left")
    handles = [Patch(color=_shade(kind, kinds), label=_label(kind)) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    save_figure(figure, path, dpi=140)
    plt.close(figure)


HeadKind = tuple[str, Radius]
"""What a head does in a step: a name of the palette, and the radius of an arrow or 0."""


def _head_kind(cell: Cell, head: int) -> HeadKind:
    """What a head does in a cell."""
    if isinstance(cell, Attend):
        method = cell.of_head(head).method
        assert not isinstance(method, tuple)
        return method_name(method), method.radius if isinstance(method, Arrow) else 0
    return paper_name(cell), 0


def _shade(kind: HeadKind, kinds: list[HeadKind]) -> Any:
    """The palette's colour, paler for the narrower of several arrows."""
    name, radius = kind
    alpha = opacity(radius, [r for other, r in kinds if other == name])
    return tuple(1 - alpha * (1 - part) for part in to_rgb(COLOURS[name]))


def _label(kind: HeadKind) -> str:
    return f"{kind[0]}, {kind[1]} on each side" if kind[1] else kind[0]


def sweep_curve(plans: Mapping[str, Plan], measure: str, path: str | Path) -> None:
    """Draw the predicted error of plans found under budgets over their fraction of FLOPs, `measure`."""
    left, errors = ([plan.about["search"][what] for plan in plans.values()] for what in (measure, "predicted_error"))
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(left, errors, marker="o", color=COLOURS["AST"])
    axis.set(xlabel=f"{measure.replace('_', ' ')} left", ylabel="predicted error", xlim=(0, 1.02), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=140)
    plt.close(figure)


def image_grid(rows: Mapping[str, Tensor], columns: list[str], path: str | Path, title: str = "") -> None:
    """Draw images (n, C, H, W) in [0, 1], one row for each setting, with the same seed in each column."""
    shape = (len(rows), len(columns))
    size = (1.1 * shape[1] + 1.9, 1.15 * shape[0] + 0.3)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")  # (H, W, C)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(figure_text(name), rotation=0, ha="right", va="center", fontsize=9)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(figure_text(column), fontsize=8)
    if title:
        figure.suptitle(figure_text(title), x=0.01, ha="left", fontsize=10)
    save_figure(figure, path, dpi=140)
    plt.close(figure)
