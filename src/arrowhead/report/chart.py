"""Scatter charts with labelled points, in the coordinates of an SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 346, 10, 198  # edges of the plotting area
LINE, LETTER = 13, 6.5  # height of a label, and the approximate width of a letter


@dataclass(frozen=True)
class Point:
    """A point, its name, the position of the name, and a description with both figures."""

    name: str
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str
    description: str


@dataclass(frozen=True)
class Chart:
    """Named points, ticks as (position, text) on both axes, and the names of points that are left out."""

    x_title: str
    y_title: str
    y_unit: str
    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    left_out: tuple[str, ...]

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM


def chart(x_title: str, y: tuple[str, str], values: Mapping[str, tuple[float, float]]) -> Chart:
    """Lay out a chart of points (x, y) by name. x is a fraction; `y` is the title and unit of the y axis.

    Points that are not finite are not drawn; their names are in `left_out`.
    """
    drawn = {name: value for name, value in values.items() if all(map(math.isfinite, value))}
    xs, ys = zip(*drawn.values(), strict=True) if drawn else ((), ())
    x_ticks, y_ticks = ticks([0, 1, *xs]), ticks(ys or [0, 1])

    def across(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]), 1)

    def up(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    points: list[Point] = []
    for name, (left, value) in sorted(drawn.items(), key=lambda item: -item[1][1]):  # from top to bottom
        description = f"{name}: {value:.4g}{y[1]} at {left:.1%}"
        points.append(_labelled(name, across(left), up(value), description, points))
    return Chart(
        x_title,
        *y,
        tuple(points),
        tuple((across(left), f"{left:.0%}") for left in x_ticks),
        tuple((up(value), f"{value:.6g}") for value in y_ticks),
        tuple(name for name in values if name not in drawn),
    )


def _labelled(name: str, x: float, y: float, description: str, above: Sequence[Point]) -> Point:
    """A point with its label on the side of the chart's middle, moved down where it would overlap a label above."""
    length, ends = LETTER * len(name), x > (LEFT + RIGHT) / 2
    label_x, label_y = (x - 8, y + 4) if ends else (x + 8, y + 4)
    start = label_x - length if ends else label_x
    for other in above:
        others = other.label_x - (LETTER * len(other.name) if other.anchor == "end" else 0)
        if start < others + LETTER * len(other.name) and others < start + length:
            label_y = max(label_y, other.label_y + LINE)
    return Point(name, x, y, label_x, label_y, "end" if ends else "start", description)


def ticks(values: Sequence[float], about: int = 5) -> list[float]:
    """Evenly spaced round numbers, from at most the smallest to at least the largest value."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    rough = (high - low if high - low > 1e-4 * size else size or 1) / about  # closer values would get equal labels
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
