"""How attention can be computed at one site in one step: the values that every other file speaks of.

A *method* says what a head does: which query–key pairs it looks at, or that it repeats itself. A *cell* says what a site does
in a step: attend with a method for each head, perhaps for the conditional branch only, or reuse what it gave before.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

Precision = Literal["native", "int8"]
"""Of the product Q·Kᵀ: the pipeline's own, or 8-bit integers after smoothing, see `kernels/quantise.py`."""


@dataclass(frozen=True)
class Full:
    """Every query sees every key; by the pipeline's own attention unless `precision` is another than its."""

    precision: Precision = "native"

    def __post_init__(self) -> None:
        _require_known(self.precision)


@dataclass(frozen=True)
class Box:
    """A radius in frames, rows and columns of the visual tokens' grid; None: all of them. An image has one frame.

    Frames are whole as they are: those at most `frames` away are seen. Rows are cut into blocks of `rows`, columns into blocks
    of `columns`, and a query sees all of its own block and of those beside it: at least the radius, and less than twice as far
    (the last block may be smaller). So whole blocks of queries see whole blocks of keys, as in Sliding Tile Attention
    (arXiv:2502.04507), and nothing is computed to be masked away. With 0 a row, or column, sees itself alone.
    """

    frames: int | None = None
    rows: int | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        if any(reach is not None and (type(reach) is not int or reach < 0) for reach in self.reaches):
            raise ValueError(f"got {self}, wanted numbers of frames, rows and columns of 0 or more, or None for all")

    @property
    def reaches(self) -> tuple[int | None, int | None, int | None]:
        """Of frames, rows and columns."""
        return self.frames, self.rows, self.columns

    def __str__(self) -> str:
        return "x".join("all" if reach is None else str(reach) for reach in self.reaches)


Radius = int | Box
"""How far a band reaches: in tokens of the flattened sequence, or in the grid that they come from."""


@dataclass(frozen=True)
class Arrow:
    """Band of `radius` visual tokens on each side of a query, or a box around it; text rows and text columns stay dense.

    Without text tokens the former is the window attention of DiTFastAttn (WA). With `residual` the output of the last full
    step minus its band, O_r − W_r, is added to it (WA-RS of DiTFastAttn).
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
    """The head's last computed output, from before the output projection (head-wise caching of DiTFastAttnV2)."""


Method = Full | Arrow | Cached
Each = TypeVar("Each", bound=Hashable)


def _require_known(precision: str) -> None:
    if not isinstance(precision, str) or precision not in get_args(Precision):
        raise ValueError(f"got precision {precision!r}, wanted one of {', '.join(get_args(Precision))}")


@dataclass(frozen=True)
class Attend:
    """Compute attention with `method`, or with a method for each head where it is a tuple.

    With `share_cfg` only the conditional half of the CFG batch is computed, projections included, and its output serves
    both halves (attention sharing across CFG, the ASC of DiTFastAttn). A tuple of equal methods becomes one method, so that
    equal cells compare equal.
    """

    method: Method | tuple[Method, ...] = Full()
    share_cfg: bool = False

    def __post_init__(self) -> None:
        own = self.method
        known = all(isinstance(method, Method) for method in own) if isinstance(own, tuple) else isinstance(own, Method)
        if not known or not isinstance(self.share_cfg, bool):
            raise ValueError(f"got {self}, wanted a method such as Full(), or a tuple of them, and share_cfg=True or False")
        if isinstance(self.method, tuple):
            if not self.method:
                raise ValueError("got no methods, wanted one for each head")
            if len(set(self.method)) == 1:
                object.__setattr__(self, "method", self.method[0])

    def methods(self, heads: int) -> tuple[Method, ...]:
        """The method of each of `heads` heads."""
        return self.method if isinstance(self.method, tuple) else (self.method,) * heads

    def of_head(self, head: int) -> "Attend":
        """The cell as one head sees it."""
        return Attend(self.method[head], self.share_cfg) if isinstance(self.method, tuple) else self


@dataclass(frozen=True)
class Reuse:
    """Return the module's last computed output, after the output projection (attention sharing across timesteps, AST).

    With `extrapolate` it is the line through the last two computed outputs, at this step, counted in steps (the first order of
    TaylorSeer's forecasts); where the later of the two served both branches, through the conditional branch's. A fraction takes
    so much of the line's slope: outputs hold noise, too, which a line carries on and multiplies.
    """

    extrapolate: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.extrapolate, int | float) or not 0 <= self.extrapolate <= 1:
            raise ValueError(f"got extrapolate={self.extrapolate!r}, wanted the part of a slope: 0 (repeat) to 1")
        object.__setattr__(self, "extrapolate", float(self.extrapolate))


Cell = Attend | Reuse
FULL = Attend()
ASC = Attend(share_cfg=True)
AST = Reuse()
EXTRAPOLATE = Reuse(extrapolate=1.0)


def precision_of(method: Method) -> Precision:
    """How a method multiplies queries and keys."""
    return "native" if isinstance(method, Cached) else method.precision


def wa_rs(radius: Radius, share_cfg: bool = False) -> Attend:
    """Window attention with residual sharing, for both branches or for the conditional one."""
    return Attend(Arrow(radius, residual=True), share_cfg)


def radius_sort_key(radius: Radius) -> tuple[float, ...]:
    """By which bands are put in order: radii in tokens, and boxes."""
    return (radius,) if isinstance(radius, int) else tuple(math.inf if own is None else own for own in radius.reaches)


def refreshes_residual(cell: Cell) -> bool:
    """Whether a cell of one method has the full output at hand, so that residuals can be made from it.

    That of int8 is not what is taken for it: O_int8 − W would carry the rounding's error into every step that adds it.
    """
    return isinstance(cell, Attend) and cell.method == Full()


def residual_radius(cell: Cell) -> Radius | None:
    """The radius of the residual that a cell of one method reads, or None."""
    if isinstance(cell, Attend) and isinstance(cell.method, Arrow) and cell.method.residual:
        return cell.method.radius
    return None


def reads_head_output(cell: Cell) -> bool:
    """Whether a cell of one method repeats what its head gave before."""
    return isinstance(cell, Attend) and isinstance(cell.method, Cached)


def extrapolates(cell: Cell) -> bool:
    """Whether a cell continues the line through two outputs."""
    return isinstance(cell, Reuse) and cell.extrapolate > 0


def in_box(method: Method) -> bool:
    """Whether a head has to know the grid."""
    return isinstance(method, Arrow) and isinstance(method.radius, Box)


def method_name(method: Method) -> str:
    """The papers' name of what a head does: full, WA, WA-RS or cached, with -int8 where that is its precision.

    In boxes, which the papers do not have: box and box-RS.
    """
    if isinstance(method, Cached):
        return "cached"
    name = "full" if isinstance(method, Full) else ("box" if in_box(method) else "WA") + "-RS" * method.residual
    return name if method.precision == "native" else f"{name}-{method.precision}"


def paper_name(cell: Cell) -> str:
    """The papers' name: full, ASC, WA, WA-RS, cached, head-wise where heads differ, with +ASC where shared; AST; extrapolate.

    Of heads in int8: full-int8, WA-int8, WA-RS-int8, shared or not. In a box: box and box-RS in place of WA and WA-RS.
    """
    if isinstance(cell, Reuse):
        return "extrapolate" if cell.extrapolate else "AST"
    name = "head-wise" if isinstance(cell.method, tuple) else method_name(cell.method)
    if cell.share_cfg:
        return "ASC" if name == "full" else f"{name}+ASC"
    return name


def grouped(of_heads: Sequence[Each]) -> Iterator[tuple[Each, tuple[int, ...]]]:
    """Each distinct method, or what else is said of heads, with the heads that it is said of."""
    for each in dict.fromkeys(of_heads):
        yield each, tuple(head for head, own in enumerate(of_heads) if own == each)


def dit_fast_attn_candidates(radii: Sequence[Radius], guided: bool) -> Sequence[Cell]:
    """The cells that DiTFastAttn tries, in its order, each with these radii; without guidance there is no branch to share."""
    bands = [wa_rs(radius) for radius in radii]
    if guided:
        return AST, *(wa_rs(radius, share_cfg=True) for radius in radii), *bands, ASC
    return AST, *bands
