"""An error kept to: plans are tried until one comes close from below."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from arrowhead.search.budget.allocate import Allocation, within_damage
from arrowhead.search.budget.problem import Problem

TRIES = 5
"""Generations that an error may take to be met; twice as many to be kept to at all."""
LARGEST = 1e100
"""The largest prediction that is asked for."""
CLOSE, AIM = 0.9, 0.95
"""A measured error is close enough from this fraction of the one asked for on, and aimed at so much of it."""


@dataclass(frozen=True)
class Try:
    """A plan's allocation, the error predicted of it, and the measured one; both as a fraction of the final latents' norm."""

    found: Allocation
    predicted: float
    measured: float


@dataclass(frozen=True)
class Kept:
    """What was found, and how many generations that took."""

    best: Try
    generations: int


def keep_to(error: float, problem: Problem, measure: Callable[[Allocation], float]) -> Kept:
    """The cheapest allocation found whose measured error is at most `error`; full attention where none was.

    The additive model takes errors as independent, and knows nothing of what later steps do with them, so that its figure is
    too small; but the measured error follows it as a power would, over the range that matters. Each try solves for the
    prediction at which the power through the two nearest tries gives what was asked, between what was met and what was missed.
    """
    tries: list[Try] = []
    limit = error
    while True:
        found = within_damage(problem, min(limit, LARGEST) ** 2)
        if any(found.columns == known.found.columns for known in tries):
            break  # nothing lies between, or nothing is cheaper
        tries.append(Try(found, found.damage**0.5, measure(found)))
        best = _best(tries, error)
        if best and (len(tries) >= TRIES or best.measured >= CLOSE * error):
            break
        if tries[-1].predicted == 0 or len(tries) >= 2 * TRIES:
            break  # no prediction is smaller
        limit = _next_limit(tries, error)
    return Kept(_best(tries, error) or _full(problem), len(tries))


def _best(tries: list[Try], error: float) -> Try | None:
    kept = [t for t in tries if t.measured <= error]
    return min(kept, key=lambda t: t.found.cost, default=None)


def _next_limit(tries: list[Try], error: float) -> float:
    """The prediction to solve for next."""
    met = max((t.predicted for t in tries if t.measured <= error), default=0.0)
    missed = min((t.predicted for t in tries if t.measured > error), default=math.inf)
    aim, power = AIM * error, 1.0
    known = sorted((t for t in tries if t.measured > 0), key=lambda t: abs(math.log(t.measured / aim)))
    if not known:
        return 2 * met
    if len(known) > 1 and known[0].predicted != known[1].predicted:
        power = math.log(known[0].measured / known[1].measured) / math.log(known[0].predicted / known[1].predicted)
    limit = known[0].predicted * (aim / known[0].measured) ** (1 / min(max(power, 0.25), 1.0))
    if met < limit < missed:
        return limit
    return math.sqrt(met * missed) if met and missed < math.inf else missed / 4 if missed < math.inf else 2 * met


def _full(problem: Problem) -> Try:
    """Full attention everywhere, which changes nothing."""
    cost = 1 - problem.fixed  # of the sites alone
    return Try(Allocation(problem.untouched, 0.0, cost, 0.0), 0.0, 0.0)
