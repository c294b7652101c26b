"""A table solved for a budget: offers of all sites at a multiplier, and the cells that they amount to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead.errors import InputsInvalid
from arrowhead.plans import flops
from arrowhead.plans.cells import FULL, Attend, Cached, Cell, Method, Reuse
from arrowhead.plans.layout import Site, outermost
from arrowhead.plans.lifetimes import Writes
from arrowhead.searches.budget.sensitivity.table import Floats, Table
from arrowhead.searches.budget.solver.costs import Costs, FlopCosts
from arrowhead.searches.budget.solver.dynamic_program import DynamicProgram, Moves
from arrowhead.searches.budget.solver.states import Choices

Granularity = Literal["step", "site", "head"] | int
"""What does the same in a step: all sites, all heads of a site, single ones, or groups of so many."""
Column = tuple[Cell, ...]


@dataclass(frozen=True)
class Offer:
    """At a multiplier the damage and cost of columns for each unit (units,), the cost a fraction of the raw run's.

    A unit is a site, or a block with the sites within it. `column` gives the cells of a site, of which `Problem.sites` has the
    number; None where the block around it has a column, or the sites within it have.
    """

    multiplier: float
    damage: Floats
    cost: Floats
    column: Callable[[int], Column | None]


class Problem:
    """A table, what may be chosen, and what is counted as cost.

    `sites` are what its plans speak of. `fixed` is the part of the cost that no choice changes: what the transformer computes
    outside of them.
    """

    def __init__(self, table: Table, choices: Choices, costs: Costs, granularity: Granularity = "site") -> None:
        self.table, self.choices, self.granularity = table, choices, granularity
        self.costs, self.sites = costs, self._spoken_of(table)
        self._samples = 2 if table.branches.guided else 1
        self._units = [self.sites.index(site) for site in outermost(self.sites)]
        self._within = {
            i: inner for i in self._units if (inner := [j for j, s in enumerate(self.sites) if self.sites[i].contains(s)])
        }
        units = sum(self.costs.of(site, FULL, Writes()) for site in outermost(self.sites))
        known = sum(self.costs.of(site, FULL, Writes()) for site in outermost(table.target.sites))
        other = max(costs.other + known - units, 0.0)  # blocks compute some of what is outside of the table's sites
        self._whole = table.steps * (other + units)
        self.fixed = table.steps * other / self._whole
        self._program = DynamicProgram(choices, table.switch)
        self._of_modules = DynamicProgram(replace(choices, radii=(), precisions=()), table.switch)  # no pairs of tokens
        self._groups = () if granularity in ("step", "site") else tuple(self._grouped(granularity))

    def _spoken_of(self, table: Table) -> tuple[Site, ...]:
        """What a plan has columns for."""
        return table.target.sites

    def offer(self, multiplier: float, memory_price: float = 0.0) -> Offer:
        """The best column of every site at this multiplier; exact where a site's heads all do the same, see `_of_groups`.

        A block has a column, or the sites within it have, whatever is better.

        `memory_price` is the damage that holding the elements of one image's latents for a step is worth.
        """
        damage, spent = np.zeros(len(self.sites)), np.zeros(len(self.sites))
        moves: dict[int, tuple[DynamicProgram, Moves]] = {}
        for sites, programme, harm, price in self._parts:
            held = memory_price * self._held_by_sites[sites[0]] if memory_price else None
            chosen = programme.solve(harm, price, multiplier, held)
            damage[sites], spent[sites] = chosen.damage, chosen.cost
            moves |= {site: (programme, own) for site, own in zip(sites, chosen.moves.T, strict=True)}

        def whole(site: int) -> Column:
            programme, own = moves[site]
            return programme.cells(own)

        offer = Offer(multiplier, damage, spent, whole)
        if self._groups:
            offer = self._of_groups(offer, {site: own for site, (_, own) in moves.items()}, memory_price)
        return self._of_units(offer)

    @property
    def untouched(self) -> tuple[Column | None, ...]:
        """Full attention everywhere."""
        full = (FULL,) * self.table.steps
        return tuple(None if site in self._within else full for site in range(len(self.sites)))

    def unit_of(self, site: int) -> int:
        """The place among the units of the one that a site belongs to."""
        return next(u for u, i in enumerate(self._units) if i == site or site in self._within.get(i, ()))

    def _full(self, site: int) -> float:
        return self.costs.of(self.sites[site], FULL, Writes())

    def _of_units(self, sites: Offer) -> Offer:
        """From columns for all sites (damages and costs (sites,)) those of blocks, or of what is within them."""
        damage, spent, absent = sites.damage.copy(), sites.cost.copy(), set()
        for block, within in self._within.items():
            beside = self.table.steps * (self._full(block) - sum(map(self._full, within))) / self._whole
            apart = sites.damage[within].sum(), sites.cost[within].sum() + max(beside, 0.0)
            if apart[0] + sites.multiplier * apart[1] <= damage[block] + sites.multiplier * spent[block]:
                damage[block], spent[block] = apart
                absent.add(block)
            else:
                absent |= set(within)

        def column(site: int) -> Column | None:
            return None if site in absent else sites.column(site)

        return Offer(sites.multiplier, damage[self._units], spent[self._units], column)

    def without_lines(self) -> "Problem":
        """The same without outputs that are extrapolated, which hold twice as much."""
        return type(self)(self.table, replace(self.choices, slopes=()), self.costs, self.granularity)

    @cached_property
    def _of_heads(self) -> DynamicProgram:
        """For groups of heads, which are not extrapolated."""
        return DynamicProgram(replace(self.choices, slopes=()), self.table.switch)

    @property
    def dear(self) -> float:
        """A multiplier at which cost alone decides."""
        harm = max(damage[np.isfinite(damage)].max(initial=1e-300) for _, _, damage, _ in self._parts)
        steps = [np.diff(np.unique(price.round(15))).min(initial=1.0) for _, _, _, price in self._parts]
        return float(1e3 * self.table.steps * harm / min(steps))

    @cached_property
    def _parts(self) -> list[tuple[list[int], DynamicProgram, Floats, Floats]]:
        """Sites of a kind, as wholes: their numbers, programme, damages (S, givens, sites) and costs (spendings, sites)."""
        found = []
        for attends, programme in ((True, self._program), (False, self._of_modules)):
            if sites := [i for i, site in enumerate(self.sites) if (site.kind == "self_attention") == attends]:
                damage = self.table.damages([self.table.heads(i) for i in sites], programme.givens)
                costs = [[self.costs.of(self.sites[i], *spending) for i in sites] for spending in programme.spendings]
                found.append((sites, programme, damage, np.array(costs) / self._whole))
        return found

    def _of_groups(self, whole: Offer, moves: Mapping[int, Moves], memory_price: float) -> Offer:
        """Groups of heads on their own, where that is better than the whole site.

        A site shares its branches or does not, for all heads at once: which steps share is taken from the whole site's column,
        and for these the groups are solved exactly.
        """
        programme, sites = self._of_heads, sorted({site for site, _ in self._groups})
        shared = np.stack([self._program.shares[moves[site]] for site in sites], 1)  # (S, sites)
        place = np.searchsorted(sites, [site for site, _ in self._groups])  # of each group's site
        harm, sharing = self._group_damage.copy(), shared[:, place]  # (S, groups)
        for g, given in enumerate(programme.givens):
            if given.lag == 0:
                harm[:, g][sharing != given.share] = np.inf
            elif not given.share and sharing.any():  # what is cached beside heads that share serves both branches, too
                both = programme.givens.index(replace(given, share=True))
                harm[:, g][sharing] = self._group_damage[:, both][sharing]
        held = memory_price * self._held_by_groups if memory_price else None
        chosen = programme.solve(harm, self._group_costs, whole.multiplier, held)
        reused = programme.reuses[chosen.moves]  # (S, groups)
        idle = np.stack([reused[:, place == i].all(1) for i in range(len(sites))], 1)  # (S, sites)
        harmed = chosen.damage + self._reused_after_sharing(chosen.moves, sharing, idle[:, place])
        rows = np.where(idle, 0, np.where(shared, 1, self._samples))  # that the rest of the site computes
        damage, spent = whole.damage.copy(), whole.cost.copy()
        damage[sites] = np.bincount(place, harmed)
        spent[sites] = np.bincount(place, chosen.cost) + rows.sum(0) * [self._rest(self.sites[i]) for i in sites] / self._whole
        wins = damage + whole.multiplier * spent < whole.damage + whole.multiplier * whole.cost

        def column(site: int) -> Column | None:
            if not wins[site]:
                return whole.column(site)
            mine = [(programme.cells(chosen.moves[:, g]), len(heads)) for g, (s, heads) in enumerate(self._groups) if s == site]
            return tuple(_merge(row, [n for _, n in mine]) for row in zip(*(cells for cells, _ in mine), strict=True))

        return Offer(whole.multiplier, np.where(wins, damage, whole.damage), np.where(wins, spent, whole.cost), column)

    def _reused_after_sharing(self, moves: Moves, sharing: NDArray[np.bool_], idle: NDArray[np.bool_]) -> Floats:
        """What the programme could not know, as a correction of damages (groups,); all else is (S, groups).

        Where the whole site is reused, it gives what its last step gave: of a group that was cached beside heads that shared,
        one output for both branches.
        """
        programme, correction = self._of_heads, np.zeros(moves.shape[1])
        for group in np.flatnonzero((sharing.any(0) & idle.any(0)) if self._samples == 2 else False):
            served_both = False
            for step, given in enumerate(programme.givens_of(moves[:, group])):
                if not idle[step, group]:
                    served_both = bool(sharing[step, group])
                    continue
                wrong, right = (replace(given, share=given.share or both) for both in (sharing[step, group], served_both))
                g = [programme.givens.index(each) for each in (wrong, right)]
                correction[group] += self._group_damage[step, g[1], group] - self._group_damage[step, g[0], group]
        return correction

    def _grouped(self, granularity: Granularity) -> Iterator[tuple[int, range]]:
        """Of the attention sites: (site, heads among those of all sites)."""
        for i, site in enumerate(self.sites):
            if site.kind != "self_attention":
                continue
            heads, size = self.table.heads(i), group_size(granularity, site)
            yield from ((i, heads[start : start + size]) for start in range(0, site.heads, size))

    @cached_property
    def _held_by_sites(self) -> dict[int, Floats]:
        """Of each kind of sites, by its first one's number."""
        return {
            sites[0]: self._held(programme, [(i, self.sites[i].heads) for i in sites]) for sites, programme, _, _ in self._parts
        }

    @cached_property
    def _held_by_groups(self) -> Floats:
        return self._held(self._of_heads, [(site, len(heads)) for site, heads in self._groups])

    def _held(self, programme: DynamicProgram, columns: Sequence[tuple[int, int]]) -> Floats:
        """What columns of so many heads of a site hold, from one step to the next, to give this: (givens, C).

        In units of one image's latents. An output counts in every step that reuses it, a residual in every one that adds it.
        """
        found = np.zeros((len(programme.givens), len(columns)))
        for c, (i, heads) in enumerate(columns):
            site, tokens = self.sites[i], self.sites[i].tokens(self.table.tokens)
            width = heads * site.head_dim * site.sequences(self.table.tokens)
            for g, given in enumerate(programme.givens):
                if given.lag:
                    held = (1 if given.share else self._samples) * width * tokens.total
                    found[g, c] = held * (1 if given.earlier is None else 2)
                elif given.residual_lag is not None:
                    found[g, c] = (1 if given.residual_shared else self._samples) * width * tokens.visual
        return found / self.table.elements

    @cached_property
    def _group_damage(self) -> Floats:
        return self.table.damages([heads for _, heads in self._groups], self._of_heads.givens)

    @cached_property
    def _group_costs(self) -> Floats:
        """(spendings, groups): what a group's heads add to what their site costs in any case."""
        sites = [self.sites[site] for site, _ in self._groups]
        sizes = [len(heads) for _, heads in self._groups]
        return np.array(
            [
                [self._heads_cost(site, size, *spending) for site, size in zip(sites, sizes, strict=True)]
                for spending in self._of_heads.spendings
            ]
        ) / (self._whole)

    def _heads_cost(self, site: Site, heads: int, cell: Cell, writes: Writes) -> float:
        if isinstance(cell, Reuse):
            return 0.0
        rows = 1 if cell.share_cfg else self._samples
        return (self.costs.of(site, cell, writes) - rows * self._rest(site)) * heads / site.heads

    def _rest(self, site: Site) -> float:
        """What a site costs for one sample besides its heads, as long as one of them is computed."""
        assert isinstance(self.costs, FlopCosts)  # seconds of heads do not add up
        if self.costs.measure == "attention":
            return 0.0
        return flops.projection_flops(site, self.table.tokens, 0 if site.separable_heads else site.heads)


class InStep(Problem):
    """All sites do the same in a step: one unit, whose sites err together.

    What is kept for later steps was computed in steps that were full throughout, as the table takes it to be; with plans whose
    sites are full in steps of their own it is not, and what they keep carries the others' errors on. Blocks stand for the sites
    within them: what all of these repeat a block repeats with less ado.
    """

    def _spoken_of(self, table: Table) -> tuple[Site, ...]:
        return table.in_blocks

    def offer(self, multiplier: float, memory_price: float = 0.0) -> Offer:
        """The best column for all at this multiplier, exact."""
        ((_, programme, damage, price),) = self._parts
        held = None
        if memory_price:
            columns = [(site, self.sites[site].heads) for site in self._units]
            held = memory_price * self._held(programme, columns).sum(1, keepdims=True)
        chosen = programme.solve(damage, price, multiplier, held)
        cells = programme.cells(chosen.moves[:, 0])
        return Offer(multiplier, chosen.damage, chosen.cost, lambda site: cells if site in self._units else None)

    def unit_of(self, site: int) -> int:  # noqa: ARG002
        """The only one."""
        return 0

    @cached_property
    def _parts(self) -> list[tuple[list[int], DynamicProgram, Floats, Floats]]:
        attends = all(self.sites[site].kind == "self_attention" for site in self._units)
        programme = self._program if attends else self._of_modules
        damage = self.table.damages([self._heads], programme.givens)
        costs = [[sum(self.costs.of(self.sites[i], *spending) for i in self._units)] for spending in programme.spendings]
        return [(self._units, programme, damage, np.array(costs) / self._whole)]

    @property
    def _heads(self) -> list[int]:
        """Those of blocks that were looked at by themselves, and of all sites outside of such blocks."""
        recorded = self.table.target.sites
        return [head for site in outermost(recorded) for head in self.table.heads(recorded.index(site))]


def group_size(granularity: Granularity, site: Site) -> int:
    """Heads of a site that do the same.

    Raises:
        InputsInvalid: they do not divide the site's.
    """
    whole = {"step": site.heads, "site": site.heads, "head": 1}
    size = whole.get(granularity, granularity) if isinstance(granularity, str) else granularity
    if not isinstance(size, int) or size < 1 or site.heads % size:
        raise InputsInvalid(
            f"got granularity={granularity!r}, wanted 'step', 'site', 'head', or a number that divides {site.path}'s "
            f"{site.heads} heads"
        )
    return size


def _merge(cells: Sequence[Cell], sizes: Sequence[int]) -> Cell:
    """The cell of a site whose groups of heads do these; a head that reuses beside others that do not is cached."""
    if len(set(cells)) == 1:
        return cells[0]
    methods: list[Method] = []
    for cell, size in zip(cells, sizes, strict=True):
        if isinstance(cell, Reuse):
            methods += [Cached()] * size
        else:
            methods += cell.methods(size)
    return Attend(tuple(methods), any(isinstance(cell, Attend) and cell.share_cfg for cell in cells))
