"""The smallest values of a plan: what one head does (a *method*), and what one site does in one step (a *cell*).

The names of DiTFastAttn (V1, arXiv:2406.08552) and DiTFastAttnV2 (V2, arXiv:2503.22796), and the same cells here:

=========  =================================================  ================================================
papers     what is computed                                   cell
=========  =================================================  ================================================
full       attention over all tokens, output O                ``FULL``, the same as ``Attend(Full())``
WA         window attention, output W                         ``Attend(Arrow(radius))``
WA-RS      W + (O_r − W_r), r the last full step before       ``wa_rs(radius)``
AST        the site's last output again                       ``AST``, the same as ``Reuse()``
ASC        conditional half alone, its output for both        ``ASC``; ``share_cfg=True`` adds it to any cell
arrow      V2's band among visual tokens, text dense          ``Attend(Arrow(radius))`` at a site with text
cached     V2's head-wise caching                             ``Cached()`` among the methods of a cell's heads
=========  =================================================  ================================================

Cells that neither paper has: a box in place of a band (`Box`), scores in int8 (`Precision`), and an output that is
extrapolated instead of repeated (``EXTRAPOLATE``).

>>> paper_name(Attend(Arrow(radius=128, residual=True)))
'WA-RS'
>>> paper_name(Attend((Full(), Arrow(128), Cached(), Arrow(64))))
'head-wise'
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

Precision = Literal["native", "int8"]
"""How the scores Q·Kᵀ are multiplied: in the pipeline's own dtype, or in 8-bit integers (see `kernels/int8.py`)."""


@dataclass(frozen=True)
class Full:
    """A head attends over all tokens. In native precision the pipeline's own attention computes it."""

    precision: Precision = "native"

    def __post_init__(self) -> None:
        _require_known(self.precision)


@dataclass(frozen=True)
class Box:
    """A radius along each axis of the visual tokens' grid: frames, rows and columns. None stands for the whole axis.

    An image has one frame. Along frames a query sees the frames at most `frames` away. Rows are cut into blocks of `rows` rows
    (the last one may be smaller), and a query sees all rows of its block and of the two neighbouring blocks: at least `rows`
    away, and less than 2 · `rows`. The same holds for columns. With 0, a row (or column) sees itself alone.

    Blocks are seen whole or not at all, as in Sliding Tile Attention (arXiv:2502.04507), so that no masked pair is computed.

    Raises:
        ValueError: a radius is neither None nor a whole number of 0 or more.

    >>> str(Box(frames=1, rows=4))
    '1x4xall'
    """

    frames: int | None = None
    rows: int | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        if any(reach is not None and (type(reach) is not int or reach < 0) for reach in self.reaches):
            raise ValueError(f"got {self}, wanted numbers of frames, rows and columns of 0 or more, or None for all")

    @property
    def reaches(self) -> tuple[int | None, int | None, int | None]:
        """The radii along frames, rows and columns."""
        return self.frames, self.rows, self.columns

    def __str__(self) -> str:
        return "x".join("all" if reach is None else str(reach) for reach in self.reaches)


Radius = int | Box
"""How far a band reaches: visual tokens on each side of a query in the flattened sequence, or a box in the grid."""


@dataclass(frozen=True)
class Arrow:
    """A head attends within a band: arrow attention (V2), which without text tokens is window attention (WA of V1).

    Visual query i sees visual key j if |i − j| ≤ `radius`, so 2 · `radius` + 1 visual keys at most; or if j lies in the `Box`
    around i. Text queries see all keys, and all queries see the text keys.

    With `residual` the head's stored residual is added to its visual rows: W + (O_r − W_r), where O is full attention, W the
    same band, and r the last step in which the head was full (WA-RS).

    Raises:
        ValueError: the radius is neither a Box nor a whole number of 0 or more.
    """

    radius: Radius
    residual: bool = False
    precision: Precision = "native"

    def __post_init__(self) -> None:
        _require_known(self.precision)
        if not isinstance(self.radius, Box) and (type(self.radius) is not int or self.radius < 0):
            raise ValueError(f"a band's radius is a number of tokens; got {self.radius!r}, wanted 0 or more, or a Box")
        if not isinstance(self.residual, bool):
            raise ValueError(f"got residual={self.residual!r}, wanted True or False")


@dataclass(frozen=True)
class Cached:
    """A head repeats its last computed output, taken before the output projection (head-wise caching of V2)."""


Method = Full | Arrow | Cached
"""What one head does."""
Each = TypeVar("Each", bound=Hashable)


def _require_known(precision: str) -> None:
    if not isinstance(precision, str) or precision not in get_args(Precision):
        raise ValueError(f"got precision {precision!r}, wanted one of {', '.join(get_args(Precision))}")


@dataclass(frozen=True)
class Attend:
    """A site computes: all heads with one `method`, or each head with its own, in a tuple.

    With `share_cfg` only the conditional branch of the CFG batch is computed, projections included, and both branches get its
    output (ASC of V1). A tuple of equal methods becomes one method, so that equal cells compare equal:

    >>> Attend((Full(), Full())) == Attend(Full())
    True

    A feed-forward, a cross-attention or a block is computed by ``Attend(Full())``, with `share_cfg` or without.

    Raises:
        ValueError: `method` is something else, or an empty tuple.
    """

    method: Method | tuple[Method, ...] = Full()
    share_cfg: bool = False

    def __post_init__(self) -> None:
        methods = self.method if isinstance(self.method, tuple) else (self.method,)
        if not all(isinstance(method, Method) for method in methods) or not isinstance(self.share_cfg, bool):
            raise ValueError(f"got {self}, wanted a method such as Full(), or a tuple of them, and share_cfg=True or False")
        if not methods:
            raise ValueError("got no methods, wanted one for each head")
        if len(set(methods)) == 1:
            object.__setattr__(self, "method", methods[0])

    def methods(self, heads: int) -> tuple[Method, ...]:
        """The method of each of a site's `heads` heads."""
        return self.method if isinstance(self.method, tuple) else (self.method,) * heads

    def of_head(self, head: int) -> "Attend":
        """The cell for one head: a cell of one method."""
        return Attend(self.method[head], self.share_cfg) if isinstance(self.method, tuple) else self


@dataclass(frozen=True)
class Reuse:
    """A site computes nothing and gives its last computed output, taken after the output projection (AST of V1).

    With `extrapolate` the output is extrapolated from the last two computed ones: the later one, plus `extrapolate` times the
    change per step between them, times the steps since the later one (the first order of TaylorSeer, arXiv:2503.06923).
    Fractions damp the change, because outputs hold noise, and extrapolation multiplies it. Where the later output was shared
    by both CFG branches, the change is that of the conditional branch. With `scale` the later output is multiplied by it.

    Either is one number, or a pair: for the conditional branch, and for the unconditional one. The output is

        scale · O_j + extrapolate · (t − j) · (O_j − O_i) / (j − i)

    in step t, where i < j are the last two steps that computed an output.

    Raises:
        ValueError: `extrapolate` is not within −4 to 4, or `scale` not within 0 to 2.

    >>> paper_name(Reuse()), paper_name(Reuse(extrapolate=0.5))
    ('AST', 'extrapolate')
    >>> Reuse(extrapolate=(0.8, 0.8)) == Reuse(extrapolate=0.8)
    True
    """

    extrapolate: "Coefficient" = 0.0
    scale: "Coefficient" = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "extrapolate", _coefficient("extrapolate", self.extrapolate, -4, 4))
        object.__setattr__(self, "scale", _coefficient("scale", self.scale, 0, 2))

    def of_head(self, _head: int) -> "Reuse":
        """The cell for one head: the same for all heads."""
        return self

    def sloped(self, times: float) -> "Reuse":
        """The cell with its change per step multiplied, within what a cell allows."""
        conditional, unconditional = (min(4.0, max(-4.0, times * each)) for each in branch_coefficients(self.extrapolate))
        return replace(self, extrapolate=(conditional, unconditional))


Cell = Attend | Reuse
"""What one site does in one step."""
Coefficient = float | tuple[float, float]
"""A number for both CFG branches, or one for the conditional and one for the unconditional branch."""


def _coefficient(name: str, value: Any, least: float, most: float) -> Coefficient:
    """A coefficient as it is kept: equal numbers for both branches become one.

    Raises:
        ValueError: it is neither a number nor a pair of numbers, or outside of the bounds.
    """
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(part, int | float) and least <= part <= most for part in pair):
        raise ValueError(f"got {name}={value!r}, wanted a number from {least} to {most}, or one for each CFG branch")
    return float(pair[0]) if pair[0] == pair[1] else (float(pair[0]), float(pair[1]))


def branch_coefficients(value: Coefficient) -> tuple[float, float]:
    """A coefficient's numbers for the conditional and the unconditional branch.

    >>> branch_coefficients(0.5)
    (0.5, 0.5)
    """
    return value if isinstance(value, tuple) else (value, value)


FULL = Attend()
ASC = Attend(share_cfg=True)
AST = Reuse()
EXTRAPOLATE = Reuse(extrapolate=1.0)


def precision_of(method: Method) -> Precision:
    """The precision in which a method multiplies queries and keys; native for a cached head, which multiplies none."""
    return "native" if isinstance(method, Cached) else method.precision


def wa_rs(radius: Radius, share_cfg: bool = False) -> Attend:
    """The cell of window attention with residual sharing (WA-RS), for both branches or shared by them.

    >>> paper_name(wa_rs(128)), paper_name(wa_rs(128, share_cfg=True))
    ('WA-RS', 'WA-RS+ASC')
    """
    return Attend(Arrow(radius, residual=True), share_cfg)


def radius_sort_key(radius: Radius) -> tuple[float, ...]:
    """A sort key that puts radii in tokens, and boxes, in ascending order."""
    return (radius,) if isinstance(radius, int) else tuple(math.inf if reach is None else reach for reach in radius.reaches)


def refreshes_residual(cell: Cell) -> bool:
    """Whether residuals can be made in a cell of one method, because the full output O is computed.

    Full attention in int8 does not count: O_int8 − W would carry the rounding error into every step that adds the residual.
    """
    return isinstance(cell, Attend) and cell.method == Full()


def residual_radius(cell: Cell) -> Radius | None:
    """The radius of the residual that a cell of one method adds, or None."""
    if isinstance(cell, Attend) and isinstance(cell.method, Arrow) and cell.method.residual:
        return cell.method.radius
    return None


def reads_head_output(cell: Cell) -> bool:
    """Whether a cell of one method repeats the head's last output."""
    return isinstance(cell, Attend) and isinstance(cell.method, Cached)


def extrapolates(cell: Cell) -> bool:
    """Whether a cell extrapolates from two earlier outputs."""
    return isinstance(cell, Reuse) and cell.extrapolate != 0


def uses_box(method: Method) -> bool:
    """Whether a method needs the grid of the visual tokens."""
    return isinstance(method, Arrow) and isinstance(method.radius, Box)


def method_name(method: Method) -> str:
    """The papers' name of a method: full, WA, WA-RS or cached; box and box-RS for boxes; with -int8 for that precision."""
    if isinstance(method, Cached):
        return "cached"
    name = "full" if isinstance(method, Full) else ("box" if uses_box(method) else "WA") + "-RS" * method.residual
    return name if method.precision == "native" else f"{name}-{method.precision}"


def paper_name(cell: Cell) -> str:
    """The papers' name of a cell: AST, extrapolate, ASC, or the name of its heads' method, +ASC where it is shared.

    A cell whose heads differ is "head-wise".
    """
    if isinstance(cell, Reuse):
        return "extrapolate" if cell.extrapolate else "AST"
    name = "head-wise" if isinstance(cell.method, tuple) else method_name(cell.method)
    if cell.share_cfg:
        return "ASC" if name == "full" else f"{name}+ASC"
    return name


def grouped(of_heads: Sequence[Each]) -> Iterator[tuple[Each, tuple[int, ...]]]:
    """Yields each distinct value of `of_heads`, one value a head, with the heads that have it.

    >>> list(grouped(["full", "WA", "full"]))
    [('full', (0, 2)), ('WA', (1,))]
    """
    for value in dict.fromkeys(of_heads):
        yield value, tuple(head for head, other in enumerate(of_heads) if other == value)


def dit_fast_attn_candidates(radii: Sequence[Radius], guided: bool) -> Sequence[Cell]:
    """The cells that DiTFastAttn's search tries, in its order: AST, WA-RS + ASC, WA-RS, ASC.

    Without guidance there is one branch, so nothing is shared.
    """
    bands = [wa_rs(radius) for radius in radii]
    if guided:
        return AST, *(wa_rs(radius, share_cfg=True) for radius in radii), *bands, ASC
    return AST, *bands
