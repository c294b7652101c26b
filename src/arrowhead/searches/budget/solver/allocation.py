"""Limits on the sum of all sites' costs, errors or caches, met by bisecting a multiplier; a repair spends what is left."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from arrowhead.errors import InputsInvalid
from arrowhead.searches.budget.solver.offers import Column, Offer
from arrowhead.searches.budget.solver.problem import Problem

ROUNDS, MEMORY_ROUNDS = 40, 16
"""Halvings of the logarithms of the multiplier, and of the price of memory."""
ROUNDING = 1e-12
"""Of sums of fractions: all parts of a cost, added up, may come to more than 1."""


@dataclass(frozen=True)
class Allocation:
    """A column for each site, or None, see `Offer`, with the sums of error and cost; the cost is that of the sites alone.

    `error` is the predicted squared error, see `Table`; plans report its square root. `bound`: in the additive model no choice
    of columns for whole sites that costs at most the same has a smaller error, by Lagrangian duality.
    """

    columns: tuple[Column | None, ...]
    error: float
    cost: float
    bound: float


class Infeasible(InputsInvalid):
    """No plan is as cheap as the budget; `least` is the nearest budget that some plan keeps to."""

    def __init__(self, asked: float, least: float) -> None:
        self.least = math.ceil(1e4 * least) / 1e4
        super().__init__(
            f"got a budget of {asked:.4g} of the whole cost, wanted at least {self.least}, the least that these choices can "
            "do; a larger budget, more ages, or single heads, will do"
        )


def within_cost(problem: Problem, budget: float, memory_price: float = 0.0) -> Allocation:
    """The allocation of least error found whose cost is at most `budget`, a fraction of the uncompressed run's.

    `memory_price`: see `Problem.offer`.

    Raises:
        Infeasible: nothing is as cheap as that.
    """
    asked, budget = budget, budget - problem.fixed + ROUNDING
    tried = _bisected(problem, lambda offer: offer.total_cost <= budget, memory_price)
    if not (met := [offer for offer in tried if offer.total_cost <= budget]):
        raise Infeasible(asked, min(offer.total_cost for offer in tried) + problem.fixed)
    bound = max(offer.total_error + offer.multiplier * (offer.total_cost - budget) for offer in tried)
    best = min(met, key=lambda offer: offer.total_error)
    source, error, cost = _repaired(best, tried, budget)
    columns = tuple(source[problem.unit_of(site)].column(site) for site in range(len(problem.sites)))
    return Allocation(columns, error, cost, max(bound, 0.0))


def within_predicted_error(problem: Problem, limit: float) -> Allocation:
    """The cheapest allocation found whose predicted squared error is at most `limit`. No repair follows."""
    tried = _bisected(problem, lambda offer: offer.total_error > limit)
    best = min((o for o in tried if o.total_error <= limit), key=lambda o: o.total_cost)  # full attention has no error
    columns = tuple(best.column(site) for site in range(len(problem.sites)))
    return Allocation(columns, best.total_error, best.total_cost, 0.0)


def within_memory(problem: Problem, budget: float, peak: Callable[[Allocation], int], limit: int) -> Allocation:
    """As `within_cost`, with caches of at most `limit` bytes: a price on what they hold, found by bisection.

    `peak` gives the bytes that the caches of an allocation hold at most.

    Raises:
        Infeasible: nothing is as cheap as the budget.
        InputsInvalid: no caches as small were found; the message names the smallest.
    """
    found = within_cost(problem, budget)
    if peak(found) <= limit:
        return found
    low, high = 1e-9 * max(found.error, 1e-12), 1e3 * max(found.error, 1e-12)
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
        if best is None or found.error < best.error:
            best = found
    if best is None:
        raise InputsInvalid(
            f"got caches of at most {limit} bytes with what else was asked, wanted at least {least}, the least that was found; "
            "a larger limit, or a larger budget, will do"
        )
    return best


def _bisected(problem: Problem, is_enough: Callable[[Offer], bool], memory_price: float = 0.0) -> list[Offer]:
    """Offers at multipliers that close in on the least one at which `is_enough` holds."""
    tried = [problem.offer(0.0, memory_price)]
    if is_enough(tried[0]):
        return tried
    high = problem.multiplier_of_least_cost
    tried.append(problem.offer(high, memory_price))
    low = 1e-18 * high
    for _ in range(ROUNDS):
        if not is_enough(tried[1]) or high < low * (1 + 1e-6):
            break
        middle = float(np.sqrt(low * high))
        tried.append(problem.offer(middle, memory_price))
        low, high = (low, middle) if is_enough(tried[-1]) else (middle, high)
    return tried


def _repaired(start: Offer, tried: list[Offer], budget: float) -> tuple[list[Offer], float, float]:
    """Columns of units exchanged for others that were offered, while the budget allows, the most error saved per cost first.

    Returns the offer that each unit's columns come from, and the sums of error and cost.
    """
    source, error, cost = [start] * len(start.cost), start.error.copy(), start.cost.copy()
    seen_error, seen_cost = np.stack([o.error for o in tried]), np.stack([o.cost for o in tried])  # (tried, units)
    while True:
        saved, more = error - seen_error, seen_cost - cost
        worth = np.where((saved > 0) & (more <= budget - cost.sum()), saved / np.maximum(more, 1e-12), 0.0)
        best, unit = np.unravel_index(worth.argmax(), worth.shape)
        if worth[best, unit] <= 0:
            return source, float(error.sum()), float(cost.sum())
        source[unit] = tried[best]
        error[unit], cost[unit] = seen_error[best, unit], seen_cost[best, unit]
