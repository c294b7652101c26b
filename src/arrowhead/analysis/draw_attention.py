"""Draws the arrays of an analysis: attention maps, errors of reuse, similarities, and locality."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from arrowhead.analysis.arrays import REUSED, Analysis, Floats
from arrowhead.analysis.draw import save_figure
from arrowhead.analysis.palette import COLOURS, figure_text
from arrowhead.plans import atomic_write, masks
from arrowhead.plans.layout import Tokens

matplotlib.use("agg")
BAND = "#35c9ff"
PANELS = 24
"""The most panels in one figure. Of more sites, evenly spaced ones are drawn."""
LABELS = {
    "output": ("output of the step before (AST, cached)", "cached"),
    "window": ("window's output of the step before, this step's residual", "WA"),
    "residual": ("this step's window, residual of the step before (WA-RS)", "WA-RS"),
    "no residual": ("this step's window alone (WA)", "full"),
}
"""For each of `REUSED`: its label, and the kind of cell whose colour it has."""


def attention_map(analysis: Analysis) -> Figure:
    """The attention map of each requested head, with the edges of the arrow's band over it (DiTFastAttn, Figure 3a)."""
    at = analysis.attention_map
    assert at is not None
    figure, axes = _panels(len(at.heads), size=3.6, extra=0.9)
    least = 0.01 / at.tokens.total
    norm = LogNorm(least, max(float(at.weights.max()), 2 * least))
    shades = plt.get_cmap("magma", 12)  # few shades keep the SVG small
    for axis, head, weights in zip(axes, at.heads, at.weights, strict=True):
        image = axis.imshow(np.maximum(weights, least), norm=norm, cmap=shades, interpolation="nearest")
        _edges(axis, at.tokens, analysis.radius)
        axis.set_title(
            f"head {head}: {_mass_inside(weights, at.tokens, analysis.radius):.0%} of the image's attention inside", fontsize=10
        )
        axis.set(xlabel="key token", ylabel="query token")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, extend="min")
    bar.set_label(f"attention weight (uniform: {1 / at.tokens.total:.1g})")
    inside = f"inside: from an image token to those at most {analysis.radius} before or after it"
    edges = [Line2D([], [], color=BAND, label=inside)]
    if at.tokens.text:
        to_text = f"and to the {at.tokens.text} text tokens, which {'end' if at.tokens.text_first else 'begin'} here"
        edges.append(Line2D([], [], color=BAND, linestyle="--", label=to_text))
    figure.legend(handles=edges, loc="outside lower left", frameon=False, fontsize=9)
    branch = ", conditional branch" if analysis.guided else ""
    where = f"site {at.site} ({analysis.sites[at.site]}), step {at.step} of 0 to {analysis.steps - 1}{branch}"
    figure.suptitle(figure_text(f"Where heads look: {where}"), fontsize=11)
    return figure


def _edges(axis: Axes, tokens: Tokens, radius: int) -> None:
    """Draw the edges of the band over the image's tokens, and lines between image and text."""
    visual = tokens.visual_slice
    first, last = visual.start - 0.5, visual.stop - 0.5
    half = radius + 0.5
    for rows, columns in (((first + half, last), (first, last - half)), ((first, last - half), (first + half, last))):
        axis.plot(columns, rows, color=BAND, linewidth=1.2)
    if tokens.text:
        border = first if tokens.text_first else last
        axis.axhline(border, color=BAND, linewidth=0.8, linestyle="--")
        axis.axvline(border, color=BAND, linewidth=0.8, linestyle="--")
    axis.set(xlim=(-0.5, tokens.total - 0.5), ylim=(tokens.total - 0.5, -0.5))


def _mass_inside(weights: Floats, tokens: Tokens, radius: int) -> float:
    """The fraction of the image's attention in a map (N, N) that lies within the band or on the text."""
    inside = weights * masks.arrow(tokens, radius).numpy()
    return float(inside[tokens.visual_slice].sum() / tokens.visual)


def reuse_errors(analysis: Analysis) -> Figure:
    """Errors of heads that reuse part of the step before, over the steps (DiTFastAttn, Figure 3b)."""
    assert analysis.reuse_errors is not None
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    steps = np.arange(1, analysis.steps)
    for name, errors in zip(REUSED, analysis.reuse_errors, strict=True):
        label, colour = LABELS[name]
        low, middle, high = np.percentile(np.maximum(errors[:, 1:], 1e-12), [25, 50, 75], axis=0)
        axis.plot(steps, middle, color=COLOURS[colour], label=label, marker="o", markersize=3)
        axis.fill_between(steps, low, high, color=COLOURS[colour], alpha=0.18, linewidth=0)
    axis.set(yscale="log", xlabel="step", ylabel="relative squared error of a head's output")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    axis.set_title(
        f"What it costs to reuse: {analysis.reuse_errors.shape[1]} heads of {len(analysis.sites)} sites, "
        f"window of {analysis.radius} tokens on each side",
        loc="left",
        fontsize=11,
    )
    heading = "A head gives (median over heads, shaded from 25 % to 75 % of them):"
    figure.legend(title=heading, alignment="left", loc="outside lower left", frameon=False, fontsize=9, title_fontsize=9)
    return figure


def similarity(analysis: Analysis) -> Figure:
    """Similarity of site outputs to the step before, and of the CFG branches, sites over steps (DiTFastAttn, Figure 4)."""
    panels: list[tuple[str, Floats]] = []
    if analysis.step_similarity is not None:
        panels.append(("to the output of the step before", analysis.to_step_before))
    if analysis.branch_similarity is not None:
        panels.append(("of the two CFG branches", analysis.branch_similarity))
    size = (1.2 + 5 * len(panels), max(3, 1.9 + 0.17 * len(analysis.sites)))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    least = min(float(np.nanmin(values)) for _, values in panels)
    for axis, (title, values) in zip(axes[0], panels, strict=True):
        image = axis.imshow(values, vmin=least, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_title(f"{title}: median {np.nanmedian(values):.3f}", loc="left", fontsize=10)
        axis.set(xlabel="step", ylabel="site, in the order they run")
        axis.set_facecolor("0.85")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes).set_label("cosine similarity")
    no_guidance = "" if analysis.guided else "\n(no guidance: there is only one branch)"
    figure.suptitle(f"How alike a site's outputs are{no_guidance}", x=0.01, ha="left", fontsize=11)
    return figure


def steps(analysis: Analysis) -> Figure:
    """Similarity of a site's outputs in all pairs of steps, with a panel for each site (DiTFastAttn, Figure 4)."""
    assert analysis.step_similarity is not None
    count = len(analysis.sites)
    chosen = np.unique(np.linspace(0, count - 1, min(count, PANELS)).round().astype(int))
    figure, axes = _panels(len(chosen), size=1.9, extra=0.8)
    values = analysis.step_similarity[chosen]
    for axis, site, matrix in zip(axes, chosen, values, strict=True):
        image = axis.imshow(matrix, vmin=float(values.min()), vmax=1, cmap="viridis", interpolation="nearest")
        axis.set_title(f"site {site}", fontsize=9)
        axis.tick_params(labelsize=7)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("step", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("cosine similarity")
    some = f" ({len(chosen)} of {count})" if len(chosen) < count else ""
    figure.suptitle(f"How alike a site's outputs are in any two steps, site by site{some}", fontsize=11)
    return figure


def locality(analysis: Analysis) -> Figure:
    """The fraction of the image's attention that an arrow keeps, heads over steps."""
    assert analysis.band_mass is not None
    assert analysis.text_mass is not None
    inside, heads = analysis.band_mass + analysis.text_mass, sum(analysis.heads)
    figure, axis = plt.subplots(figsize=(8, min(2.2 + 0.06 * heads, 14)), layout="constrained")
    image = axis.imshow(inside, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
    ends = np.cumsum(analysis.heads)
    for end in ends[:-1]:
        axis.axhline(end - 0.5, color="white", linewidth=0.8)
    every = -(-len(ends) // 30)  # at most about 30 labels
    axis.set_yticks(((ends + ends - analysis.heads - 1) / 2)[::every], [str(i) for i in range(0, len(ends), every)])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="step", ylabel="site, a row for each head")
    tokens, radius = analysis.tokens, analysis.radius
    even = (masks.pairs(tokens, radius) - tokens.text * tokens.total) / (tokens.visual * tokens.total)
    on_text = f" or on text ({np.median(analysis.text_mass):.0%})" if tokens.text else ""
    title = f"Attention within {radius} tokens on each side{on_text}: median {np.median(inside):.0%} (if uniform: {even:.0%})"
    axis.set_title(f"How local heads are\n{title}", loc="left", fontsize=10)
    figure.colorbar(image, ax=axis).set_label("share of the image's attention")
    return figure


def draw(analysis: Analysis, folder: str | Path) -> list[Path]:
    """Draw every figure that the analysis has arrays for, as PNG and SVG. Returns the files."""
    figures: dict[str, tuple[bool, Callable[[Analysis], Figure]]] = {
        "attention_map": (analysis.attention_map is not None, attention_map),
        "reuse_errors": (analysis.reuse_errors is not None, reuse_errors),
        "similarity": (analysis.step_similarity is not None or analysis.branch_similarity is not None, similarity),
        "steps": (analysis.step_similarity is not None, steps),
        "locality": (analysis.band_mass is not None, locality),
    }
    atomic_write.make_folder(folder)
    files = []
    for name in [name for name, (there, _) in figures.items() if there]:
        figure = figures[name][1](analysis)
        for ending in ("png", "svg"):
            files.append(Path(folder) / f"{name}.{ending}")
            save_figure(figure, files[-1], dpi=110)
            figure.set_layout_engine("none")  # the second file keeps the layout of the first
        plt.close(figure)
    return files


def _panels(count: int, size: float, extra: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` square panels, wider than high, and the axes of the panels."""
    columns = count if count <= 4 else round((1.7 * count) ** 0.5)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns + 1.2, size * rows + extra), squeeze=False, layout="compressed"
    )
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]
