"""Plans that are tried: real generations with the calibration's inputs, timed or measured, of which the best is kept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from arrowhead.errors import InputsInvalid
from arrowhead.plan import Plan
from arrowhead.search.budget.allocate import Allocation, Infeasible, within_cost
from arrowhead.search.budget.asked import Budget
from arrowhead.search.budget.check import measured_errors, measured_seconds
from arrowhead.search.budget.costs import timed
from arrowhead.search.budget.keep import CLOSE, Try, keep_to
from arrowhead.search.budget.problem import Problem
from arrowhead.search.budget.record import Recording
from arrowhead.search.budget.solved import plan_of, short, told, within
from arrowhead.search.budget.table import Table

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

POWERS = (0.75, 1.0, 0.5)
"""Of the model's answers to errors: what a correction tries instead of the table's, the first ones first."""

DOUBT = 0.05
"""By so much an error in detail has to be smaller for another power to be taken: few images tell no smaller difference."""


def corrected(
    pipe: "DiffusionPipeline",
    inputs: Mapping[str, Any],
    budget: Budget,
    recording: Recording,
    solved: Callable[[Table, Budget], Plan],
) -> tuple[Plan, int]:
    """The plan that errs least in detail in a real generation, and how many there were.

    Each granularity in question is tried as the table has it; then the better one with whole slopes alone, where these are
    among others (the table cannot see how steps of full attention and slopes answer to one another), or with other powers of
    the model's answers, which have to be better by more than chance.
    """
    table, tried = recording.table, list[tuple[float, Plan, Budget]]()
    refused: InputsInvalid | None = None

    def attempt(power: float, each: Budget) -> None:
        plan = told(solved(table.answering(power), each), feedback=power)
        if not any(plan.cells == other.cells and plan.target == other.target for _, other, _ in tried):
            found = measured_errors(pipe, inputs, plan, recording.final)
            plan = told(plan, measured_error=short(found.error), measured_detail=short(found.detail))
            tried.append((found.detail * (1 if power == table.feedback else 1 + DOUBT), plan, each))

    for granularity in budget.granularities[: 1 + budget.corrections]:
        try:
            attempt(table.feedback, replace(budget, granularity=granularity))
        except InputsInvalid as error:
            refused = error
    if refused is not None and not tried:
        raise refused
    others = [(power, budget.slopes) for power in POWERS if power != table.feedback]
    if budget.extrapolate and {1.0} < set(budget.slopes):
        others.insert(0, (table.feedback, (1.0,)))
    for power, slopes in others if budget.cache_bytes is None else ():  # bytes take long to solve for
        least, _, best = min(tried, key=lambda each: each[0])
        if len(tried) <= budget.corrections and least > 0:
            attempt(power, replace(best, slopes=slopes))
    return min(tried, key=lambda each: each[0])[1], len(tried)


def fast_enough(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], budget: Budget, recording: Recording) -> Plan:
    """Time cells, solve, and time a generation beside an untouched one."""
    table = recording.table
    seconds = timed(pipe, inputs, table.target.sites, budget.choices(table), table.blocks)

    def solved(table: Table, budget: Budget) -> Plan:
        problem = budget.problem(table, seconds)
        found = within(problem, budget)
        return told(plan_of(problem, budget, found), predicted_speedup=short(1 / (found.cost + problem.fixed)))

    try:
        plan, tried = corrected(pipe, inputs, budget, recording, solved)
    except Infeasible as infeasible:
        most = math.floor(100 / infeasible.least) / 100
        raise InputsInvalid(
            f"got a budget of speedup={budget.speedup}, wanted at most {most}, the most that these choices can do; ask for "
            "less, or allow more ages"
        ) from None
    raw, compressed = measured_seconds(pipe, inputs, plan)
    return told(plan, measured_speedup=short(raw / compressed), generations=tried)


def within_error(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], budget: Budget, recording: Recording) -> Plan:
    """The cheapest plan found that keeps to an error: all sites in step, unless single heads err less for as much.

    Or unless steps are too coarse to come near to it.
    """
    best: tuple[Try, Plan] | None = None
    generations = 0
    for granularity in budget.granularities:
        problem = replace(budget, granularity=granularity).problem(recording.table)

        def measure(found: Allocation, problem: Problem = problem) -> float:
            return measured_errors(pipe, inputs, plan_of(problem, budget, found), recording.final).error

        if best is not None and best[0].measured >= CLOSE * budget.asked[1]:
            rival = within_cost(problem, max(best[0].found.cost + problem.fixed, _least(problem)))
            generations += 1
            if measure(rival) >= best[0].measured:
                continue
        kept = keep_to(budget.asked[1], problem, measure)
        generations += kept.generations
        if best is None or kept.best.found.cost < best[0].found.cost:
            plan = plan_of(problem, budget, kept.best.found)
            best = kept.best, told(plan, measured_error=short(kept.best.measured))
    assert best is not None
    return told(best[1], generations=generations)


def _least(problem: Problem) -> float:
    """The smallest budget that a problem can meet."""
    return float(problem.offer(problem.dear).cost.sum()) + problem.fixed
