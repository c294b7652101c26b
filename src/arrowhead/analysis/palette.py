"""A colour for every kind of cell: dark where much is computed, light where little is, and paler for narrower bands."""

from collections.abc import Collection

from arrowhead.plans.cells import Radius, radius_sort_key
from arrowhead.plans.foreign_text import visible

COLOURS = {
    "full": "#1f3a5f",
    "ASC": "#3f7cac",
    "WA": "#8a5a83",
    "WA+ASC": "#c48bb0",
    "WA-RS": "#2e8b6f",
    "WA-RS+ASC": "#8fc9a8",
    "full-int8": "#46536b",
    "full-int8+ASC": "#7d97ab",
    "WA-int8": "#6d5a7d",
    "WA-int8+ASC": "#ab94b8",
    "WA-RS-int8": "#4d8072",
    "WA-RS-int8+ASC": "#9dbcae",
    "box": "#6b4c9a",
    "box+ASC": "#b39bd1",
    "box-RS": "#5f8a2f",
    "box-RS+ASC": "#b0cc8a",
    "box-int8": "#5d4f78",
    "box-int8+ASC": "#a198b8",
    "box-RS-int8": "#66804d",
    "box-RS-int8+ASC": "#adbb9c",
    "head-wise": "#c8553d",
    "head-wise+ASC": "#e8a598",
    "cached": "#d98e04",
    "cached+ASC": "#edc27a",
    "AST": "#f2d16b",
    "extrapolate": "#f7ecc6",
}
"""The colour of each kind of cell, in the order of legends."""
MEANINGS = {
    "full": "computed in full",
    "ASC": "shared across CFG branches",
    "WA": "window",
    "WA+ASC": "window, shared across CFG branches",
    "WA-RS": "window with residual",
    "WA-RS+ASC": "window with residual, shared across CFG branches",
    "full-int8": "computed in full, scores in int8",
    "full-int8+ASC": "computed in full, scores in int8, shared across CFG branches",
    "WA-int8": "window, scores in int8",
    "WA-int8+ASC": "window, scores in int8, shared across CFG branches",
    "WA-RS-int8": "window with residual, scores in int8",
    "WA-RS-int8+ASC": "window with residual, scores in int8, shared across CFG branches",
    "box": "box in the grid",
    "box+ASC": "box in the grid, shared across CFG branches",
    "box-RS": "box in the grid with residual",
    "box-RS+ASC": "box in the grid with residual, shared across CFG branches",
    "box-int8": "box in the grid, scores in int8",
    "box-int8+ASC": "box in the grid, scores in int8, shared across CFG branches",
    "box-RS-int8": "box in the grid with residual, scores in int8",
    "box-RS-int8+ASC": "box in the grid with residual, scores in int8, shared across CFG branches",
    "head-wise": "each head its own way",
    "head-wise+ASC": "each head its own way, shared across CFG branches",
    "cached": "heads' outputs of an earlier step, projected again",
    "cached+ASC": "heads' outputs of an earlier step, projected again, shared across CFG branches",
    "AST": "reused from an earlier step",
    "extrapolate": "extrapolated from two earlier steps",
}
"""What each kind of cell means, for legends."""


def figure_text(text: str) -> str:
    r"""Text for matplotlib that is drawn as it is: dollars enclose no formula, control characters are escapes."""
    return visible(text).replace("$", r"\$")


def opacity(radius: Radius | None, among: Collection[Radius]) -> float:
    """The opacity of a cell's colour on white: 1 without a band, and less for narrower bands among those of the map."""
    wider = 0 if radius is None else sum(radius_sort_key(other) > radius_sort_key(radius) for other in among)
    return round(1 - 0.6 * wider / max(len(among), 1), 2)


def ink(name: str, opacity: float = 1) -> str:
    """The text colour, black or white, with more contrast (WCAG 2) to a kind's colour at this opacity on white."""
    channels = [1 - opacity * (1 - int(COLOURS[name][i : i + 2], 16) / 255) for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"
