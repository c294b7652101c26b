"""Candidate plans tried in real generations on the calibration's inputs; the best one is kept.

The predicted error is too small, and does not order plans perfectly: it takes the errors of different sites as independent. So
each kind of budget ends with a few generations, in which candidates are measured:

* an error: `within_error` looks for the cheapest plan whose measured error is within the budget;
* FLOPs: `corrected` keeps the plan with the least measured error in detail, of the table's solution and its variants;
* a speedup: `fast_enough` times cells first, and measures the seconds of the plan that `corrected` keeps.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arrowhead.calibration.driver import Driver
from arrowhead.engine.changes import Changes
from arrowhead.engine.forward_hooks import replace_forward
from arrowhead.engine.install import applied
from arrowhead.errors import InputsInvalid
from arrowhead.models.model import transformers_of
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import Budget
from arrowhead.searches.budget.sensitivity.recording import Recording
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.allocation import Allocation, Infeasible, within_cost, within_predicted_error
from arrowhead.searches.budget.solver.problem import Problem, choices_of, problem_of
from arrowhead.searches.budget.solver.solution import plan_of, short, with_provenance, within
from arrowhead.searches.budget.solver.timing import timed
from arrowhead.searches.progress import clock

TRIES = 5
"""Generations for a candidate to come close to an error; twice as many for one to be within it at all."""
LARGEST = 1e100
"""The largest predicted error that is solved for."""
CLOSE, AIM = 0.9, 0.95
"""A candidate is close enough if its measured error is at least this part of the one allowed; it is solved for the second."""
FEEDBACKS = (0.75, 1.0, 0.5)
"""Powers of the model feedback that a correction tries in place of the table's, in this order."""
DOUBT = 0.05
"""A correction has to have an error in detail that is smaller by this part: few images show no smaller difference reliably."""


# Measured: what a plan does to the final latents and to the time


@dataclass(frozen=True)
class Errors:
    """The errors of a generation's final latents, relative to those of the untouched one, as norms of changes over norms.

    `error` is that of the latents themselves, all images together. `detail` is that of the differences between neighbours,
    averaged over images: by it, a picture that is paler all over is nearer to the untouched one than one with other contours.
    """

    error: float
    detail: float


def measured_errors(driver: Driver, plan: Plan, raw: Tensor) -> Errors:
    """The errors of one generation with the plan; `raw` are the final latents without it."""
    with applied(driver.pipe, plan, changes="texts"):
        return driver.share.agreed(errors_of(driver.final_latents(), raw))


def errors_of(latents: Tensor, raw: Tensor) -> Errors:
    """The errors of final latents, (B, C, …) or (B, N, C); `raw` are the untouched ones."""
    change, whole = (_differences(each).norm(dim=1) for each in (latents - raw, raw))  # (B,)
    error = (latents - raw).norm() / raw.norm()
    return Errors(float(error), float((change / whole.clamp_min(1e-12)).mean()))


def _differences(latents: Tensor) -> Tensor:
    """The differences between neighbours along each axis of space and time, (B, all of them)."""
    axes = range(2, latents.ndim) if latents.ndim > 3 else (1,)
    return torch.cat([latents.diff(dim=axis).flatten(1) for axis in axes], 1)


def measured_seconds(driver: Driver, plan: Plan) -> tuple[float, float]:
    """The seconds of the transformers' calls in an untouched generation, and in one with the plan; of the first loop alone."""
    found: list[float] = []
    for chosen in (None, plan):
        changes = Changes()
        with nullcontext() if chosen is None else applied(driver.pipe, chosen, changes="texts"), changes, changes:
            seconds = time_calls(driver, changes)
            driver.final_latents()
        found.append(sum(seconds))
    return found[0], found[1]


def time_calls(driver: Driver, changes: Changes) -> list[float]:
    """Time the transformers' calls until the changes are undone; gives a list that grows by the seconds of each call."""
    seconds: list[float] = []

    def timing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = clock()
        out = forward(*args, **kwargs)
        seconds.append(clock() - started)
        return out

    for transformer in transformers_of(driver.pipe):
        replace_forward(transformer, partial(timing, transformer.forward), changes)
    return seconds


# Budgets of an error


@dataclass(frozen=True)
class Candidate:
    """An allocation with its predicted and its measured error, both relative to the norm of the final latents."""

    allocation: Allocation
    predicted: float
    measured: float


@dataclass(frozen=True)
class Validated:
    """The best candidate, and how many generations it took to find."""

    best: Candidate
    generations: int


def within_error(driver: Driver, budget: Budget, recording: Recording) -> Plan:
    """The cheapest plan found whose measured error is within the budget's.

    First all sites do the same in a step. Then single heads choose, unless a plan of theirs at the same cost errs more, in a
    generation; they are also asked where steps are too coarse to come close to the error.
    """
    best: tuple[Candidate, Plan] | None = None
    generations = 0
    for granularity in budget.granularities:
        problem = problem_of(replace(budget, granularity=granularity), recording.table)

        def measure(allocation: Allocation, problem: Problem = problem) -> float:
            return measured_errors(driver, plan_of(problem, budget, allocation), recording.final).error

        if best is not None and best[0].measured >= CLOSE * budget.asked[1]:
            rival = within_cost(problem, max(best[0].allocation.cost + problem.fixed, _least_cost(problem)))
            generations += 1
            if measure(rival) >= best[0].measured:
                continue
        validated = cheapest_within(budget.asked[1], problem, measure)
        generations += validated.generations
        if best is None or validated.best.allocation.cost < best[0].allocation.cost:
            plan = plan_of(problem, budget, validated.best.allocation)
            best = validated.best, with_provenance(plan, measured_error=short(validated.best.measured))
    assert best is not None
    return with_provenance(best[1], generations=generations)


def cheapest_within(error: float, problem: Problem, measure: Callable[[Allocation], float]) -> Validated:
    """The cheapest allocation found whose measured error is at most `error`; full attention where there is none.

    Measured errors are about a power of predicted ones, over the range that matters. So each try solves for the prediction at
    which the power through the two nearest tries gives `error`, between the largest prediction that was within it and the
    smallest that was not.
    """
    tried: list[Candidate] = []
    limit = error
    while True:
        allocation = within_predicted_error(problem, min(limit, LARGEST) ** 2)
        if any(allocation.columns == known.allocation.columns for known in tried):
            break  # nothing lies between, or nothing is cheaper
        tried.append(Candidate(allocation, allocation.error**0.5, measure(allocation)))
        best = _cheapest(tried, error)
        if best and (len(tried) >= TRIES or best.measured >= CLOSE * error):
            break
        if tried[-1].predicted == 0 or len(tried) >= 2 * TRIES:
            break  # no prediction is smaller
        limit = _next_prediction(tried, error)
    return Validated(_cheapest(tried, error) or _untouched(problem), len(tried))


def _cheapest(tried: list[Candidate], error: float) -> Candidate | None:
    met = [candidate for candidate in tried if candidate.measured <= error]
    return min(met, key=lambda candidate: candidate.allocation.cost, default=None)


def _next_prediction(tried: list[Candidate], error: float) -> float:
    """The predicted error to solve for next."""
    met = max((c.predicted for c in tried if c.measured <= error), default=0.0)
    missed = min((c.predicted for c in tried if c.measured > error), default=math.inf)
    aim, power = AIM * error, 1.0
    known = sorted((c for c in tried if c.measured > 0), key=lambda c: abs(math.log(c.measured / aim)))
    if not known:
        return 2 * met
    if len(known) > 1 and known[0].predicted != known[1].predicted:
        power = math.log(known[0].measured / known[1].measured) / math.log(known[0].predicted / known[1].predicted)
    limit = known[0].predicted * (aim / known[0].measured) ** (1 / min(max(power, 0.25), 1.0))
    if met < limit < missed:
        return limit
    return math.sqrt(met * missed) if met and missed < math.inf else missed / 4 if missed < math.inf else 2 * met


def _untouched(problem: Problem) -> Candidate:
    """Full attention everywhere, which changes nothing."""
    cost = 1 - problem.fixed  # of the sites alone
    return Candidate(Allocation(problem.untouched, 0.0, cost, 0.0), 0.0, 0.0)


def _least_cost(problem: Problem) -> float:
    """The smallest cost budget that a problem has a solution for."""
    return float(problem.offer(problem.multiplier_of_least_cost).cost.sum()) + problem.fixed


# Budgets of FLOPs, and of a speedup


def corrected(
    driver: Driver, budget: Budget, recording: Recording, solved: Callable[[Table, Budget], Plan]
) -> tuple[Plan, int]:
    """The plan with the least error in detail in a real generation, and the number of generations.

    Each granularity in question is solved with the table as it is, and tried. Then the better one is tried with whole slopes
    alone, where the budget allows others too: the table does not see how full steps and extrapolated ones affect each other.
    Then with other powers of the model feedback, an estimate. These corrections have to be better by `DOUBT`.
    """
    table, tried = recording.table, list[tuple[float, Plan, Budget]]()
    refused: InputsInvalid | None = None

    def attempt(feedback: float, variant: Budget) -> None:
        plan = with_provenance(solved(table.with_feedback(feedback), variant), feedback=feedback)
        if not any(plan.cells == other.cells and plan.target == other.target for _, other, _ in tried):
            found = measured_errors(driver, plan, recording.final)
            plan = with_provenance(plan, measured_error=short(found.error), measured_detail=short(found.detail))
            tried.append((found.detail * (1 if feedback == table.feedback else 1 + DOUBT), plan, variant))

    for granularity in budget.granularities[: 1 + budget.corrections]:
        try:
            attempt(table.feedback, replace(budget, granularity=granularity))
        except InputsInvalid as error:
            refused = error
    if refused is not None and not tried:
        raise refused
    corrections = [(feedback, budget.slopes) for feedback in FEEDBACKS if feedback != table.feedback]
    if budget.extrapolate and {1.0} < set(budget.slopes):
        corrections.insert(0, (table.feedback, (1.0,)))
    for feedback, slopes in corrections if budget.cache_bytes is None else ():  # a bound of bytes takes long to solve for
        least, _, best = min(tried, key=lambda each: each[0])
        if len(tried) <= budget.corrections and least > 0:
            attempt(feedback, replace(best, slopes=slopes))
    return min(tried, key=lambda each: each[0])[1], len(tried)


def fast_enough(driver: Driver, budget: Budget, recording: Recording) -> Plan:
    """The plan for a speedup: cells are timed, then plans solved and corrected; the kept one is timed against no plan."""
    table = recording.table
    seconds = timed(driver, table.target.sites, choices_of(budget, table), table.blocks)

    def solved(table: Table, budget: Budget) -> Plan:
        problem = problem_of(budget, table, seconds)
        found = within(problem, budget)
        return with_provenance(plan_of(problem, budget, found), predicted_speedup=short(1 / (found.cost + problem.fixed)))

    try:
        plan, generations = corrected(driver, budget, recording, solved)
    except Infeasible as infeasible:
        most = math.floor(100 / infeasible.least) / 100
        raise InputsInvalid(
            f"got a budget of speedup={budget.speedup}, wanted at most {most}, the most that these choices can do; ask for "
            "less, or allow more ages"
        ) from None
    raw, compressed = measured_seconds(driver, plan)
    return with_provenance(plan, measured_speedup=short(raw / compressed), generations=generations)
