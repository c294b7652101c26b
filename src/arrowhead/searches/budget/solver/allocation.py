"""A limit met with all sites: one multiplier found by bisection, and a repair that spends what it leaves."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from arrowhead.errors import InputsInvalid
from arrowhead.searches.budget.solver.problem import Column, Offer, Problem

ROUNDS, MEMORY_ROUNDS = 40, 16
"""Halvings of the logarithms of the multiplier, and of the price of memory."""
ROUNDING = 1e-12
"""Of sums of fractions: all of a cost, added up, may be more than 1."""


@dataclass(frozen=True)
class Allocation:
    """A column for each site, or None, see `Offer`, with the sums of damage and cost; the cost is that of the sites alone.

    `bound`: in the additive model no choice for whole sites that costs as little does less damage, by Lagrangian duality.
    """

    columns: tuple[Column | None, ...]
    damage: float
    cost: float
    bound: float


class Infeasible(InputsInvalid):
    """Nothing is as cheap as what was asked for; `least` is the nearest budget that something keeps to."""

    def __init__(self, asked: float, least: float) -> None:
        self.least = math.ceil(1e4 * least) / 1e4
        super().__init__(
            f"got a budget of {asked:.4g} of the whole cost, wanted at least {self.least}, the least that these choices can "
            "do; a larger budget, more ages, or single heads, will do"
        )


def within_cost(problem: Problem, budget: float, memory_price: float = 0.0) -> Allocation:
    """The least damage found whose cost is at most `budget`, a fraction of the uncompressed run's; `memory_price`: see `offer`.

    Raises:
        Infeasible: nothing is as cheap as that.
    """
    asked, budget = budget, budget - problem.fixed + ROUNDING
    tried = _bisected(problem, lambda offer: float(offer.cost.sum()) <= budget, memory_price)
    if not (met := [offer for offer in tried if offer.cost.sum() <= budget]):
        raise Infeasible(asked, min(float(offer.cost.sum()) for offer in tried) + problem.fixed)
    bound = max(float(o.damage.sum()) + o.multiplier * (float(o.cost.sum()) - budget) for o in tried)
    best = min(met, key=lambda offer: float(offer.damage.sum()))
    source, damage, cost = _repaired(best, tried, budget)
    columns = tuple(source[problem.unit_of(site)].column(site) for site in range(len(problem.sites)))
    return Allocation(columns, damage, cost, max(bound, 0.0))


def within_damage(problem: Problem, limit: float) -> Allocation:
    """The least cost found among the multipliers' offers whose damage is at most `limit`."""
    tried = _bisected(problem, lambda offer: float(offer.damage.sum()) > limit)
    best = min((o for o in tried if o.damage.sum() <= limit), key=lambda o: float(o.cost.sum()))  # full attention does none
    columns = tuple(best.column(site) for site in range(len(problem.sites)))
    return Allocation(columns, float(best.damage.sum()), float(best.cost.sum()), 0.0)


def within_memory(problem: Problem, budget: float, peak: Callable[[Allocation], int], limit: int) -> Allocation:
    """As `within_cost`, with caches whose `peak` is at most `limit` bytes: a price on what is held, found by bisection.

    Raises:
        Infeasible: nothing is as cheap as that.
        InputsInvalid: caches as small were not found; the message names the smallest.
    """
    found = within_cost(problem, budget)
    if peak(found) <= limit:
        return found
    low, high = 1e-9 * max(found.damage, 1e-12), 1e3 * max(found.damage, 1e-12)
    best: Allocation | None = None
    least = peak(found)
    for _ in range(MEMORY_ROUNDS):
        middle = float(np.sqrt(low * high))
        found = within_cost(problem, budget, middle)
        held = peak(found)
        least = min(least, held)
        if held > limit:
            low = middle
            continue
        high = middle
        if best is None or found.damage < best.damage:
            best = found
    if best is None:
        raise InputsInvalid(
            f"got caches of at most {limit} bytes with what else was asked, wanted at least {least}, the least that was found; "
            "a larger limit, or a larger budget, will do"
        )
    return best


def _bisected(problem: Problem, dear_enough: Callable[[Offer], bool], memory_price: float = 0.0) -> list[Offer]:
    """Offers at multipliers that close in on the one where `dear_enough` begins to hold."""
    tried = [problem.offer(0.0, memory_price)]
    if dear_enough(tried[0]):
        return tried
    high = problem.dear
    tried.append(problem.offer(high, memory_price))
    low = 1e-18 * high
    for _ in range(ROUNDS):
        if not dear_enough(tried[1]) or high < low * (1 + 1e-6):
            break
        middle = float(np.sqrt(low * high))
        tried.append(problem.offer(middle, memory_price))
        low, high = (low, middle) if dear_enough(tried[-1]) else (middle, high)
    return tried


def _repaired(start: Offer, tried: list[Offer], budget: float) -> tuple[list[Offer], float, float]:
    """Units' columns are exchanged for others seen, as the budget allows, the most damage less per cost first.

    Gives the offer that each unit's come from, with the sums of damage and cost.
    """
    source, damage, cost = [start] * len(start.cost), start.damage.copy(), start.cost.copy()
    seen_damage, seen_cost = np.stack([o.damage for o in tried]), np.stack([o.cost for o in tried])  # (tried, units)
    while True:
        gain, more = damage - seen_damage, seen_cost - cost
        worth = np.where((gain > 0) & (more <= budget - cost.sum()), gain / np.maximum(more, 1e-12), 0.0)
        best, unit = np.unravel_index(worth.argmax(), worth.shape)
        if worth[best, unit] <= 0:
            return source, float(damage.sum()), float(cost.sum())
        source[unit] = tried[best]
        damage[unit], cost[unit] = seen_damage[best, unit], seen_cost[best, unit]
