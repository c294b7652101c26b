"""Maps of a plan's cells, in the coordinates of an SVG: steps to the right, and sites or the heads of one site downwards."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from arrowhead.analysis.palette import COLOURS, MEANINGS, ink, opacity
from arrowhead.plans.cells import (
    Arrow,
    Attend,
    Box,
    Cell,
    Coefficient,
    Method,
    Radius,
    Reuse,
    branch_coefficients,
    method_name,
    paper_name,
)
from arrowhead.plans.layout import Site
from arrowhead.plans.plan import Plan

Place = tuple[int, int]  # step, row
CELL = 18  # width and height of a cell in the SVG


@dataclass(frozen=True)
class Area:
    """All equal cells of a map: the name of their kind, a description, their opacity and their places."""

    name: str
    description: str
    opacity: float
    places: tuple[Place, ...]

    @property
    def ink(self) -> str:
        """The text colour that is readable on the area."""
        return ink(self.name, self.opacity)

    @property
    def middles(self) -> Mapping[str, str]:
        """The centres of the cells, as the lists of x and y that an SVG text element takes."""
        steps, rows = zip(*self.places, strict=True)
        return {"x": _spaced(step * CELL + CELL / 2 for step in steps), "y": _spaced(row * CELL + 12.5 for row in rows)}

    @property
    def outline(self) -> str:
        """An SVG path around the cells, in units of a cell. Neighbouring cells of a row are one rectangle."""
        return "".join(f"M{step} {row}h{length}v1h-{length}z" for step, row, length in self._runs())

    def _runs(self) -> list[tuple[int, int, int]]:
        runs: list[tuple[int, int, int]] = []
        for step, row in sorted(self.places, key=lambda place: place[::-1]):
            if runs and (runs[-1][0] + runs[-1][2], runs[-1][1]) == (step, row):
                runs[-1] = (runs[-1][0], row, runs[-1][2] + 1)
            else:
                runs.append((step, row, 1))
        return runs


@dataclass(frozen=True)
class Map:
    """Rows × steps of cells. `rows` are the full names of the rows, `labels` the short ones. Sizes are in SVG units."""

    rows: tuple[str, ...]
    labels: tuple[str, ...]
    steps: int
    areas: tuple[Area, ...]

    @property
    def shares(self) -> Mapping[str, float]:
        """The fraction of the cells of each kind, in the order of the palette."""
        count: Counter[str] = Counter()
        for area in self.areas:
            count[area.name] += len(area.places)
        return {name: count[name] / count.total() for name in COLOURS if count[name]}

    @property
    def left(self) -> int:
        """The x at which the cells begin, after the labels."""
        return 12 + 7 * max(map(len, self.labels))

    @property
    def width(self) -> int:
        """The width of labels and cells."""
        return self.left + self.steps * CELL

    @property
    def height(self) -> int:
        """The height of the cells and the step numbers below them."""
        return len(self.rows) * CELL + 36

    @property
    def lines(self) -> str:
        """An SVG path of the lines between cells, in units of a cell."""
        down = "".join(f"M{step} 0V{len(self.rows)}" for step in range(1, self.steps))
        return down + "".join(f"M0 {row}H{self.steps}" for row in range(1, len(self.rows)))


def site_map(plan: Plan) -> Map:
    """The map of a plan's sites over its steps."""
    paths = tuple(site.path for site in plan.target.sites)
    return _map(paths, _short(paths), plan.columns)


def head_maps(plan: Plan) -> Mapping[str, Map]:
    """For each site with a head-wise cell, by path: the map of its heads over the steps."""
    return {
        site.path: _map(
            [f"{site.path}, head {head}" for head in range(site.heads)],
            [f"head {head}" for head in range(site.heads)],
            _by_head(site, column),
        )
        for site, column in zip(plan.target.sites, plan.columns, strict=True)
        if any(isinstance(cell, Attend) and isinstance(cell.method, tuple) for cell in column)
    }


def _by_head(site: Site, column: Sequence[Cell]) -> list[list[Cell]]:
    return [[cell.of_head(head) if isinstance(cell, Attend) else cell for cell in column] for head in range(site.heads)]


def _map(rows: Sequence[str], labels: Sequence[str], cells: Sequence[Sequence[Cell]]) -> Map:
    """Group the cells of rows × steps into areas of equal cells."""
    places: dict[Cell, list[Place]] = {}
    for row, line in enumerate(cells):
        for step, cell in enumerate(line):
            places.setdefault(cell, []).append((step, row))
    radii = {radius for cell in places if (radius := _radius(cell)) is not None}
    areas = tuple(
        Area(paper_name(cell), _description(cell), opacity(_radius(cell), radii), tuple(where))
        for cell, where in places.items()
    )
    return Map(tuple(rows), tuple(labels), len(cells[0]), areas)


def _numbers(coefficient: Coefficient) -> str:
    conditional, unconditional = branch_coefficients(coefficient)
    return f"{conditional:.3g}" if conditional == unconditional else f"{conditional:.3g} and {unconditional:.3g}"


def _description(cell: Cell) -> str:
    """A cell in words: its name and meaning, its radius, and how much of the slope it extrapolates."""
    name = paper_name(cell)
    if isinstance(cell, Reuse):
        slope = "" if cell.extrapolate in (0, 1) else f", {_numbers(cell.extrapolate)} of the slope"
        return f"{name}: {MEANINGS[name]}{slope}" + ("" if cell.scale == 1 else f", the output times {_numbers(cell.scale)}")
    if isinstance(cell.method, tuple):
        count = Counter(map(_method_text, cell.method))
        return f"{name}: " + ", ".join(f"{n} × {text}" for text, n in count.most_common())
    radius = _radius(cell)
    unit = "frames, rows and columns" if isinstance(radius, Box) else "tokens"
    return f"{name}: {MEANINGS[name]}" + ("" if radius is None else f", {radius} {unit} on each side")


def _method_text(method: Method) -> str:
    return method_name(method) + (f" of {method.radius}" if isinstance(method, Arrow) else "")


def _radius(cell: Cell) -> Radius | None:
    return cell.method.radius if isinstance(cell, Attend) and isinstance(cell.method, Arrow) else None


def _spaced(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _short(paths: Sequence[str]) -> list[str]:
    """Paths without the components that all of them begin with."""
    parts = [path.split(".") for path in paths]
    shared = 0
    while len({tuple(path[: shared + 1]) for path in parts}) == 1 and all(len(path) > shared + 1 for path in parts):
        shared += 1
    return [".".join(path[shared:]) for path in parts]


__all__ = ["CELL", "Area", "Map", "head_maps", "site_map"]
