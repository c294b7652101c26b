"""What is counted as cost: FLOPs in closed form, or seconds measured on this device side by side with full attention."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from arrowhead.plans.cells import EXTRAPOLATE, Attend, Cell, Radius, extrapolates
from arrowhead.plans.flops import site_flops
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import Writes

if TYPE_CHECKING:  # diffusers takes seconds to import
    pass

Measure = Literal["attention", "module", "transformer"]
ROUNDS = 5


class Costs(Protocol):
    """The costs of one step: of a site that runs a cell, and of everything outside of the sites."""

    @property
    def other(self) -> float:
        """The cost outside of the sites, which no cell changes."""

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """The cost of a site that runs this cell and writes this."""


@dataclass(frozen=True)
class FlopCosts:
    """FLOPs of one image in one step.

    The `measure` says which ones: those of attention's two matmuls, of whole modules, or of the transformer, which are those of
    whole modules and `outside` of them.
    """

    measure: Measure
    tokens: Tokens
    samples: int
    outside: float = 0.0

    @property
    def other(self) -> float:
        """FLOPs of the transformer outside of the sites."""
        return self.outside if self.measure == "transformer" else 0.0

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """FLOPs in closed form, see `plans.flops.site_flops`."""
        flops = site_flops(site, self.tokens, cell, writes, self.samples)
        return flops.attention if self.measure == "attention" else flops.module


Shape = Site
"""A site without its path; of sites that are alike one is timed."""


@dataclass(frozen=True)
class SecondCosts:
    """Measured seconds of one step, with the inputs that were timed.

    `cells` are the seconds of a cell at a site of this shape, `residuals` those that making a residual adds (by its radius, and
    whether for the conditional branch alone), `other` those outside of the sites. The slope that a computed output stores for
    later extrapolation takes one pass over two outputs, and is left out.
    """

    cells: Mapping[tuple[Shape, Cell], float]
    residuals: Mapping[tuple[Shape, Radius, bool], float]
    other: float

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """Seconds as measured at the first site of its shape."""
        shape, shared = shape_of(site), isinstance(cell, Attend) and cell.share_cfg
        cell = EXTRAPOLATE if extrapolates(cell) else cell  # the slope's size makes no difference
        made = sum(self.residuals[shape, r.radius, r.conditional_only or shared] for r in writes.residuals)
        return self.cells[shape, cell] + made


def shape_of(site: Site) -> Shape:
    """The site without its path."""
    return replace(site, path="", within=tuple(map(shape_of, site.within)))
