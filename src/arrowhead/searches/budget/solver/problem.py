"""A sensitivity table with a budget's choices and costs: the columns that it offers for all sites at a multiplier."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from arrowhead.plans.cells import FULL
from arrowhead.plans.layout import Site, outermost
from arrowhead.plans.lifetimes import Writes
from arrowhead.searches.budget.config import Budget, Granularity
from arrowhead.searches.budget.sensitivity.table import Floats, Table
from arrowhead.searches.budget.solver.costs import Costs, FlopCosts, Measure, SecondCosts
from arrowhead.searches.budget.solver.dynamic_program import DynamicProgram, Numbers
from arrowhead.searches.budget.solver.head_groups import HeadGroups
from arrowhead.searches.budget.solver.held import held_for
from arrowhead.searches.budget.solver.offers import Column, Offer
from arrowhead.searches.budget.solver.states import Choices


def choices_of(budget: Budget, table: Table) -> Choices:
    """What a budget and a table leave open."""
    return Choices(
        table.radii,
        table.ages,
        share_cfg=budget.share_cfg and table.branches.guided,
        residual=budget.residual,
        reuse=budget.reuse,
        slopes=budget.slopes if budget.extrapolate else (),
        precisions=table.precisions if budget.precision else (),
    )


def problem_of(budget: Budget, table: Table, seconds: SecondCosts | None = None) -> "Problem":
    """The problem of a budget's first granularity; `seconds` are the measured costs that a speedup is counted in.

    Raises:
        InputsInvalid: the budget is of attention alone, and the table has none.
    """
    granularity = budget.granularities[0]
    kind = InStep if granularity == "step" else Problem
    if seconds is not None:
        return kind(table, choices_of(budget, table), seconds, granularity)
    measure: Measure = "transformer"
    if budget.attention_flops is not None or budget.module_flops is not None:
        table, measure = table.attention_alone(), "module" if budget.attention_flops is None else "attention"
    samples = table.branches.samples * table.branches.calls
    costs = FlopCosts(measure, table.tokens, samples, table.other_flops)
    return kind(table, choices_of(budget, table), costs, granularity)


@dataclass(frozen=True)
class _Part:
    """Sites that share a dynamic program, by their numbers; errors (S, outputs, C) and costs (writings, C) of its columns.

    `held` (outputs, C): what the caches hold for an output, see `held_for`.
    """

    sites: list[int]
    program: DynamicProgram
    errors: Floats
    costs: Floats
    held: Floats


class Problem:
    """What a plan may do at each site, what it costs, and what error it makes. Each site has a column of its own.

    `sites` are those that plans speak of. `fixed` is the fraction of the cost that no choice changes: what the transformer
    computes outside of these sites. Costs are fractions of the uncompressed run's.
    """

    def __init__(self, table: Table, choices: Choices, costs: Costs, granularity: Granularity = "site") -> None:
        self.table, self.choices, self.granularity = table, choices, granularity
        self.costs, self.sites = costs, self._sites_of(table)
        self._units = [self.sites.index(site) for site in outermost(self.sites)]
        self._within = {
            i: inner for i in self._units if (inner := [j for j, s in enumerate(self.sites) if self.sites[i].contains(s)])
        }
        units = sum(map(self._full_cost, outermost(self.sites)))
        known = sum(map(self._full_cost, outermost(table.target.sites)))
        other = max(costs.other + known - units, 0.0)  # blocks compute some of what is outside of the table's sites
        self._whole_run = table.steps * (other + units)
        self.fixed = table.steps * other / self._whole_run

    def _sites_of(self, table: Table) -> tuple[Site, ...]:
        """The sites that a plan speaks of."""
        return table.target.sites

    def _full_cost(self, site: Site) -> float:
        """The cost of a site in a step of full attention that writes nothing."""
        return self.costs.of(site, FULL, Writes())

    def offer(self, multiplier: float, memory_price: float = 0.0) -> Offer:
        """The best column of every site at this multiplier; exact where a site has one column, else see `HeadGroups`.

        Either a block has a column, or the sites within it have, if that is better.

        `memory_price` is the error that holding the elements of one image's latents for a step is worth.
        """
        error, cost = np.zeros(len(self.sites)), np.zeros(len(self.sites))
        chosen: dict[int, tuple[DynamicProgram, Numbers]] = {}
        for part in self._parts:
            held = memory_price * part.held if memory_price else None
            solution = part.program.solve(part.errors, part.costs, multiplier, held)
            error[part.sites], cost[part.sites] = solution.error, solution.cost
            chosen |= {site: (part.program, own) for site, own in zip(part.sites, solution.transitions.T, strict=True)}

        def column(site: int) -> Column:
            program, transitions = chosen[site]
            return program.cells(transitions)

        offer = Offer(multiplier, error, cost, column)
        if self._groups:
            shared = np.stack([program.shares[own] for program, own in map(chosen.__getitem__, self._groups.sites)], 1)
            offer = self._groups.improved(offer, shared, memory_price)
        return self._of_units(offer)

    @property
    def untouched(self) -> tuple[Column | None, ...]:
        """Full attention everywhere."""
        full = (FULL,) * self.table.steps
        return tuple(None if site in self._within else full for site in range(len(self.sites)))

    def unit_of(self, site: int) -> int:
        """The place among the units of the unit that a site belongs to."""
        return next(u for u, i in enumerate(self._units) if i == site or site in self._within.get(i, ()))

    def _of_units(self, sites: Offer) -> Offer:
        """From the columns of all sites those of blocks, or of the sites within them."""
        error, cost, absent = sites.error.copy(), sites.cost.copy(), set()
        for block, within in self._within.items():
            beside = self._full_cost(self.sites[block]) - sum(self._full_cost(self.sites[i]) for i in within)
            beside = self.table.steps * beside / self._whole_run  # of the block, besides the sites within it
            apart = sites.error[within].sum(), sites.cost[within].sum() + max(beside, 0.0)
            if apart[0] + sites.multiplier * apart[1] <= error[block] + sites.multiplier * cost[block]:
                error[block], cost[block] = apart
                absent.add(block)
            else:
                absent |= set(within)

        def column(site: int) -> Column | None:
            return None if site in absent else sites.column(site)

        return Offer(sites.multiplier, error[self._units], cost[self._units], column)

    def without_extrapolation(self) -> "Problem":
        """The same problem without extrapolated outputs, for which the caches hold twice as much."""
        return type(self)(self.table, replace(self.choices, slopes=()), self.costs, self.granularity)

    @property
    def multiplier_of_least_cost(self) -> float:
        """A multiplier that is so large that cost alone decides."""
        error = max(part.errors[np.isfinite(part.errors)].max(initial=1e-300) for part in self._parts)
        least = min(np.diff(np.unique(part.costs.round(15))).min(initial=1.0) for part in self._parts)  # between two costs
        return float(1e3 * self.table.steps * error / least)

    @cached_property
    def _parts(self) -> list[_Part]:
        """Attention sites, and others."""
        kinds = {True: self._attention_program, False: self._module_program}
        numbers = {
            attends: [i for i, s in enumerate(self.sites) if (s.kind == "self_attention") == attends] for attends in kinds
        }
        return [self._part(sites, kinds[attends]) for attends, sites in numbers.items() if sites]

    def _part(self, sites: list[int], program: DynamicProgram) -> _Part:
        errors = self.table.predicted_errors([self.table.heads(i) for i in sites], program.outputs)
        costs = [[self.costs.of(self.sites[i], *writing) for i in sites] for writing in program.writings]
        held = held_for(program.outputs, [(self.sites[i], self.sites[i].heads) for i in sites], self.table)
        return _Part(sites, program, errors, np.array(costs) / self._whole_run, held)

    @cached_property
    def _attention_program(self) -> DynamicProgram:
        return DynamicProgram(self.choices, self.table.switch)

    @cached_property
    def _module_program(self) -> DynamicProgram:
        """Of sites without pairs of tokens."""
        return DynamicProgram(replace(self.choices, radii=(), precisions=()), self.table.switch)

    @cached_property
    def _groups(self) -> HeadGroups | None:
        """Groups of heads, if they may have columns of their own and there are attention sites."""
        if self.granularity in ("step", "site") or all(site.kind != "self_attention" for site in self.sites):
            return None
        assert isinstance(self.costs, FlopCosts)  # Budget refuses groups for a speedup: seconds of heads do not add up
        return HeadGroups(self.table, replace(self.choices, slopes=()), self.costs, self.granularity, self._whole_run)


class InStep(Problem):
    """All sites do the same in a step: one unit, and one column. Its sites' changes are added before they are squared.

    The table assumes that what a step builds on was computed in steps without error. That holds here, for steps in which all
    sites are full. Where sites are full in steps of their own, what they keep carries the errors of the others on. Blocks stand
    for the sites within them: where all of these repeat their outputs, the block repeats its output.
    """

    def _sites_of(self, table: Table) -> tuple[Site, ...]:
        return table.in_blocks

    def offer(self, multiplier: float, memory_price: float = 0.0) -> Offer:
        """The best column for all sites at this multiplier, exact."""
        (part,) = self._parts
        held = memory_price * part.held if memory_price else None
        solution = part.program.solve(part.errors, part.costs, multiplier, held)
        cells = part.program.cells(solution.transitions[:, 0])
        return Offer(multiplier, solution.error, solution.cost, lambda site: cells if site in self._units else None)

    def unit_of(self, site: int) -> int:  # noqa: ARG002
        """The only unit."""
        return 0

    @cached_property
    def _parts(self) -> list[_Part]:
        """One column, of all sites together."""
        attends = all(self.sites[site].kind == "self_attention" for site in self._units)
        program = self._attention_program if attends else self._module_program
        errors = self.table.predicted_errors([self._heads], program.outputs)
        costs = [[sum(self.costs.of(self.sites[i], *writing) for i in self._units)] for writing in program.writings]
        held = held_for(program.outputs, [(self.sites[i], self.sites[i].heads) for i in self._units], self.table)
        return [_Part(self._units, program, errors, np.array(costs) / self._whole_run, held.sum(1, keepdims=True))]

    @property
    def _heads(self) -> list[int]:
        """The heads of blocks that were recorded, and of all sites outside of such blocks."""
        recorded = self.table.target.sites
        return [head for site in outermost(recorded) for head in self.table.heads(recorded.index(site))]
