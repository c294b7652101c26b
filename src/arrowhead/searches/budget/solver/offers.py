"""What a problem offers at a multiplier."""

from collections.abc import Callable
from dataclasses import dataclass

from arrowhead.plans.cells import Cell
from arrowhead.searches.budget.sensitivity.table import Floats

Column = tuple[Cell, ...]
"""A site's cells over the steps."""


@dataclass(frozen=True)
class Offer:
    """The columns of least error + multiplier · cost, with the error and the cost of each unit (units,).

    A unit is a site, or a block with the sites within it, or all sites where they do the same in a step. The cost is a fraction
    of the uncompressed run's, the error the predicted squared error (see `Table`). `column` gives the cells of a site by its
    number in `Problem.sites`; None where the block around it has a column, or the sites within it have.
    """

    multiplier: float
    error: Floats
    cost: Floats
    column: Callable[[int], Column | None]

    @property
    def total_error(self) -> float:
        """The error of all units."""
        return float(self.error.sum())

    @property
    def total_cost(self) -> float:
        """The cost of all units."""
        return float(self.cost.sum())
