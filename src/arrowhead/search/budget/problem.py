"""A table solved for a budget: offers of all sites at a multiplier, and the cells that they amount to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from arrowhead import cost
from arrowhead.errors import InputsInvalid
from arrowhead.layout import Site
from arrowhead.lifetimes import Writes, lifetimes
from arrowhead.methods import FULL, Attend, Cached, Cell, Method, Reuse
from arrowhead.search.budget.costs import Costs, FlopCosts
from arrowhead.search.budget.given import Choices
from arrowhead.search.budget.programme import Programme
from arrowhead.search.budget.table import Floats, Table

Granularity = Literal["site", "head"] | int
"""What does the same in a step: all heads of a site, single ones, or groups of so many."""

Column = tuple[Cell, ...]


@dataclass(frozen=True)
class Offer:
    """At a multiplier a column for each site, with its damage and its cost (sites,), a fraction of the uncompressed run's."""

    multiplier: float
    columns: tuple[Column, ...]
    damage: Floats
    cost: Floats


class Problem:
    """A table, what may be chosen, and what is counted as cost.

    `fixed` is the part of the cost that no choice changes: what the transformer computes outside of the table's sites.
    """

    def __init__(self, table: Table, choices: Choices, costs: Costs, granularity: Granularity = "site") -> None:
        self.table = table
        self.costs, self._sites = costs, table.target.sites
        self._samples = 2 if table.branches.guided else 1
        self._whole = table.steps * (costs.other + sum(costs.of(site, FULL, Writes()) for site in self._sites))
        self.fixed = table.steps * costs.other / self._whole
        self._programme = Programme(choices)
        self._feed_forward = Programme(replace(choices, radii=()))  # no pairs of tokens, no arrows
        self._groups = () if granularity == "site" else tuple(self._grouped(granularity))

    def offer(self, multiplier: float) -> Offer:
        """The best column of every site at this multiplier; exact where a site's heads all do the same, see `_of_groups`."""
        columns: list[Column] = [()] * len(self._sites)
        damage = np.zeros(len(self._sites))
        for sites, programme, harm, price in self._parts:
            chosen = programme.solve(harm, price, multiplier)
            damage[sites] = chosen.damage
            for site, moves in zip(sites, chosen.moves.T, strict=True):
                columns[site] = programme.cells(moves)
        spent = self._spent(columns)
        if self._groups:
            columns, damage, spent = self._of_groups(multiplier, columns, damage, spent)
        return Offer(multiplier, tuple(columns), damage, spent)

    @property
    def dear(self) -> float:
        """A multiplier at which cost alone decides."""
        harm = max(damage[np.isfinite(damage)].max(initial=1e-300) for _, _, damage, _ in self._parts)
        steps = [np.diff(np.unique(price.round(15))).min(initial=1.0) for _, _, _, price in self._parts]
        return float(1e3 * self.table.steps * harm / min(steps))

    @cached_property
    def _parts(self) -> list[tuple[list[int], Programme, Floats, Floats]]:
        """Sites of a kind, as wholes: their numbers, programme, damages (S, givens, sites) and costs (spendings, sites)."""
        found = []
        for kind, programme in (("self_attention", self._programme), ("feed_forward", self._feed_forward)):
            if sites := [i for i, site in enumerate(self._sites) if site.kind == kind]:
                damage = self.table.damages([self.table.heads(i) for i in sites], programme.givens)
                costs = [[self.costs.of(self._sites[i], *spending) for i in sites] for spending in programme.spendings]
                found.append((sites, programme, damage, np.array(costs) / self._whole))
        return found

    def _of_groups(
        self, multiplier: float, columns: list[Column], damage: Floats, spent: Floats
    ) -> tuple[list[Column], Floats, Floats]:
        """Groups of heads on their own, where that is better than the whole site.

        A site shares its branches or does not, for all heads at once: which steps share is taken from the whole site's column,
        and for these the groups are solved exactly.
        """
        shared = np.array([[isinstance(c, Attend) and c.share_cfg for c in column] for column in columns]).T  # (S, sites)
        harm = self._group_damage.copy()
        computed = [(g, given.share) for g, given in enumerate(self._programme.givens) if given.lag == 0]
        for g, share in computed:
            harm[:, g][shared[:, self._site_of_group] != share] = np.inf
        chosen = self._programme.solve(harm, self._group_costs, multiplier)
        cells = [self._programme.cells(moves) for moves in chosen.moves.T]
        merged, better = list(columns), damage.copy()
        for site in sorted({site for site, _ in self._groups}):
            mine = [(cells[g], len(heads)) for g, (s, heads) in enumerate(self._groups) if s == site]
            merged[site] = tuple(_merge(row, [n for _, n in mine]) for row in zip(*(column for column, _ in mine), strict=True))
            better[site] = sum(chosen.damage[g] for g, (s, _) in enumerate(self._groups) if s == site)
        apart = self._spent(merged)
        wins = better + multiplier * apart < damage + multiplier * spent
        return (
            [merged[i] if wins[i] else columns[i] for i in range(len(columns))],
            np.where(wins, better, damage),
            np.where(wins, apart, spent),
        )

    def _grouped(self, granularity: Granularity) -> Iterator[tuple[int, range]]:
        """Of the attention sites: (site, heads among those of all sites)."""
        for i, site in enumerate(self._sites):
            if site.kind != "self_attention":
                continue
            heads = self.table.heads(i)
            size = 1 if granularity == "head" else granularity
            if not isinstance(size, int) or size < 1 or site.heads % size:
                raise InputsInvalid(
                    f"got granularity={granularity!r}, wanted 'site', 'head', or a number that divides {site.path}'s "
                    f"{site.heads} heads"
                )
            yield from ((i, heads[start : start + size]) for start in range(0, site.heads, size))

    @cached_property
    def _site_of_group(self) -> NDArray[np.int64]:
        return np.array([site for site, _ in self._groups])

    @cached_property
    def _group_damage(self) -> Floats:
        return self.table.damages([heads for _, heads in self._groups], self._programme.givens)

    @cached_property
    def _group_costs(self) -> Floats:
        """(spendings, groups): what a group's heads add to what their site costs in any case."""
        sites = [self._sites[site] for site, _ in self._groups]
        sizes = [len(heads) for _, heads in self._groups]
        return np.array(
            [
                [self._heads_cost(site, size, *spending) for site, size in zip(sites, sizes, strict=True)]
                for spending in self._programme.spendings
            ]
        ) / (self._whole)

    def _heads_cost(self, site: Site, heads: int, cell: Cell, writes: Writes) -> float:
        assert isinstance(self.costs, FlopCosts)  # seconds of heads do not add up
        if isinstance(cell, Reuse):
            return 0.0
        per_head = self.costs.of(site, cell, writes) / site.heads
        if self.costs.measure == "attention":
            return per_head * heads
        rows = 1 if cell.share_cfg else self._samples
        fixed = cost.projection_flops(site, self.table.tokens, 0 if site.heads_apart else site.heads) / site.heads
        return (per_head - rows * fixed) * heads

    def _spent(self, columns: Sequence[Column]) -> Floats:
        """The sites' real cost (sites,)."""
        spent = [
            sum(self.costs.of(site, cell, writes) for cell, writes in zip(column, lifetimes(column), strict=True))
            for site, column in zip(self._sites, columns, strict=True)
        ]
        return np.array(spent) / self._whole


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
