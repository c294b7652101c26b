"""Groups of heads that have columns of their own, where that is better than one column for their whole site."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import InputsInvalid
from arrowhead.plans import flops
from arrowhead.plans.cells import Attend, Cached, Cell, Method, Reuse
from arrowhead.plans.layout import Site
from arrowhead.plans.lifetimes import Writes
from arrowhead.searches.budget.config import Granularity
from arrowhead.searches.budget.sensitivity.site_outputs import ExtrapolatedOutput
from arrowhead.searches.budget.sensitivity.table import Floats, Table
from arrowhead.searches.budget.solver.costs import FlopCosts
from arrowhead.searches.budget.solver.dynamic_program import DynamicProgram, Numbers
from arrowhead.searches.budget.solver.held import held_for
from arrowhead.searches.budget.solver.offers import Column, Offer
from arrowhead.searches.budget.solver.states import Choices

Flags = NDArray[np.bool_]


class HeadGroups:
    """The groups of heads of all attention sites of a table.

    A site computes both branches or the conditional one alone, for all of its heads at once. So which steps share is taken from
    the column that is best for the whole site. Under these shares each group's column is exact.

    Args:
        table: the table. `sites` are the numbers of its attention sites.
        choices: what the groups may choose from. Outputs of groups are not extrapolated: `slopes` are ().
        costs: FLOPs. Seconds of heads do not add up.
        granularity: the size of the groups.
        whole_run: the cost of the uncompressed run.
    """

    def __init__(self, table: Table, choices: Choices, costs: FlopCosts, granularity: Granularity, whole_run: float) -> None:
        self._table, self._costs, self._whole_run = table, costs, whole_run
        self._samples = 2 if table.branches.guided else 1
        self.sites = [i for i, site in enumerate(table.target.sites) if site.kind == "self_attention"]
        self._groups = list(_grouped(table, self.sites, granularity))
        self._site_of = np.searchsorted(self.sites, [site for site, _ in self._groups])  # of each group, among `sites`
        self._program = DynamicProgram(choices, table.switch)
        self._outputs = [output for output in self._program.outputs if not isinstance(output, ExtrapolatedOutput)]  # all
        numbers = {output: number for number, output in enumerate(self._outputs)}
        self._shared_number = np.array([numbers[output.shared_if(choices.share_cfg)] for output in self._outputs])
        self._errors = table.predicted_errors([heads for _, heads in self._groups], self._outputs)  # (S, outputs, groups)
        sizes = [(table.target.sites[site], len(heads)) for site, heads in self._groups]
        self._held = held_for(self._outputs, sizes, table)
        costs_of = [[self._cost(site, size, *writing) for site, size in sizes] for writing in self._program.writings]
        self._group_costs = np.array(costs_of) / whole_run  # (writings, groups), besides what their sites cost in any case

    def improved(self, whole: Offer, shared: Flags, memory_price: float) -> Offer:
        """The offer with columns of groups at those sites where they are better than the column of the whole site.

        Args:
            whole: columns of whole sites.
            shared: (S, sites), whether the whole site's column shares its branches in a step.
            memory_price: see `Problem.offer`.
        """
        sharing = shared[:, self._site_of]  # (S, groups)
        held = memory_price * self._held if memory_price else None
        chosen = self._program.solve(self._errors_where(sharing), self._group_costs, whole.multiplier, held)
        reused = self._program.reuses[chosen.transitions]  # (S, groups)
        idle = np.stack([reused[:, self._site_of == i].all(1) for i in range(len(self.sites))], 1)  # (S, sites)
        rows = np.where(idle, 0, np.where(shared, 1, self._samples))  # that the site computes besides its heads
        rest = [self._rest(self._table.target.sites[i]) for i in self.sites]
        error, cost = whole.error.copy(), whole.cost.copy()
        error[self.sites] = np.bincount(self._site_of, self._errors_of(chosen.transitions, sharing, idle[:, self._site_of]))
        cost[self.sites] = np.bincount(self._site_of, chosen.cost) + rows.sum(0) * rest / self._whole_run
        better = error + whole.multiplier * cost < whole.error + whole.multiplier * whole.cost

        def column(site: int) -> Column | None:
            return self._column(site, chosen.transitions) if better[site] else whole.column(site)

        return Offer(whole.multiplier, np.where(better, error, whole.error), np.where(better, cost, whole.cost), column)

    def _errors_where(self, sharing: Flags) -> Floats:
        """The errors (S, outputs, groups) under these shares, infinite for outputs that cannot be computed under them.

        Where a step shares, what a group repeats serves both branches, whether it was shared when it was computed or not.
        """
        found = self._errors.copy()
        for number, output in enumerate(self._outputs):
            if output.lag == 0:
                found[:, number][sharing != output.share] = np.inf
            else:
                found[:, number][sharing] = self._errors[:, self._shared_number[number]][sharing]
        return found

    def _errors_of(self, transitions: Numbers, sharing: Flags, idle: Flags) -> Floats:
        """The errors (groups,) of columns; all arguments are (S, groups).

        A step in which all groups of a site reuse is a step that reuses the site's stored output. It gives both branches what
        the last other step gave them.
        """
        groups = np.arange(transitions.shape[1])
        found, serves_both = np.zeros(len(groups)), np.zeros(len(groups), dtype=bool)
        for step, outputs in enumerate(self._program.output_of[transitions]):
            serves_both = np.where(idle[step], serves_both, sharing[step])
            found += self._errors[step, np.where(serves_both, self._shared_number[outputs], outputs), groups]
        return found

    def _column(self, site: int, transitions: Numbers) -> Column:
        """A site's cells: those of its groups put together."""
        mine = [
            (self._program.cells(transitions[:, g]), len(heads)) for g, (of, heads) in enumerate(self._groups) if of == site
        ]
        sizes = [size for _, size in mine]
        return tuple(_merged(cells, sizes) for cells in zip(*(column for column, _ in mine), strict=True))

    def _cost(self, site: Site, heads: int, cell: Cell, writes: Writes) -> float:
        if isinstance(cell, Reuse):
            return 0.0
        rows = 1 if cell.share_cfg else self._samples
        return (self._costs.of(site, cell, writes) - rows * self._rest(site)) * heads / site.heads

    def _rest(self, site: Site) -> float:
        """What a site costs for one sample besides its heads, in a step that computes any of them."""
        if self._costs.measure == "attention":
            return 0.0
        return flops.projection_flops(site, self._table.tokens, 0 if site.separable_heads else site.heads)


def group_size(granularity: Granularity, site: Site) -> int:
    """How many heads of a site do the same.

    Raises:
        InputsInvalid: the number does not divide the site's heads.
    """
    whole = {"step": site.heads, "site": site.heads, "head": 1}
    size = whole.get(granularity, granularity) if isinstance(granularity, str) else granularity
    if not isinstance(size, int) or size < 1 or site.heads % size:
        raise InputsInvalid(
            f"got granularity={granularity!r}, wanted 'step', 'site', 'head', or a number that divides {site.path}'s "
            f"{site.heads} heads"
        )
    return size


def _grouped(table: Table, sites: Sequence[int], granularity: Granularity) -> Iterator[tuple[int, range]]:
    """Each group's site, and its heads among those of all sites."""
    for i in sites:
        heads, size = table.heads(i), group_size(granularity, table.target.sites[i])
        yield from ((i, heads[start : start + size]) for start in range(0, len(heads), size))


def _merged(cells: Sequence[Cell], sizes: Sequence[int]) -> Cell:
    """The cell of a site whose groups of heads do these; a group that reuses beside others that do not is cached."""
    if len(set(cells)) == 1:
        return cells[0]
    methods: list[Method] = []
    for cell, size in zip(cells, sizes, strict=True):
        methods += [Cached()] * size if isinstance(cell, Reuse) else cell.methods(size)
    return Attend(tuple(methods), any(isinstance(cell, Attend) and cell.share_cfg for cell in cells))
