"""What is counted as cost: FLOPs in closed form, or seconds measured on this device side by side with full attention."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from arrowhead.calibration.run import CalibrationRun
from arrowhead.engine.cache import Output
from arrowhead.engine.execute_site import SitePass, execute_site
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.stats import Stats
from arrowhead.errors import NotIntercepted
from arrowhead.models.find import find
from arrowhead.plans.cells import AST, EXTRAPOLATE, FULL, Arrow, Attend, Cell, Full, Radius, extrapolates
from arrowhead.plans.flops import site_flops
from arrowhead.plans.layout import Site, Tokens, outermost
from arrowhead.plans.lifetimes import FOREVER, Residual, Writes
from arrowhead.searches.budget.solver.states import Choices

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

Measure = Literal["attention", "module", "transformer"]
ROUNDS = 5


class Costs(Protocol):
    """Costs of one step: of a site under a cell, and of all that lies outside of the sites."""

    @property
    def other(self) -> float:
        """What no cell changes."""

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """A site's."""


@dataclass(frozen=True)
class FlopCosts:
    """FLOPs of one image, of attention's matmuls alone, or of whole modules; of the `transformer`: with `outside`."""

    measure: Measure
    tokens: Tokens
    samples: int
    outside: float = 0.0

    @property
    def other(self) -> float:
        """What the transformer multiplies outside of the sites."""
        return self.outside if self.measure == "transformer" else 0.0

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """In closed form, see `cost.site_flops`."""
        flops = site_flops(site, self.tokens, cell, writes, self.samples)
        return flops.attention if self.measure == "attention" else flops.module


Shape = Site
"""A site without its path; of sites that are alike one is timed."""


@dataclass(frozen=True)
class SecondCosts:
    """Seconds of one step with the inputs that were timed: cells, residuals made (radius, for one branch alone), and other.

    A difference of two outputs, which lines need, is a matter of two passes over them, and left out.
    """

    cells: Mapping[tuple[Shape, Cell], float]
    residuals: Mapping[tuple[Shape, Radius, bool], float]
    other: float

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """As measured at the first site of its shape."""
        shape, shared = shape_of(site), isinstance(cell, Attend) and cell.share_cfg
        cell = EXTRAPOLATE if extrapolates(cell) else cell  # the slope's size makes no difference
        made = sum(self.residuals[shape, r.radius, r.conditional_only or shared] for r in writes.residuals)
        return self.cells[shape, cell] + made


def shape_of(site: Site) -> Shape:
    """The site without its path."""
    return replace(site, path="", within=tuple(map(shape_of, site.within)))
