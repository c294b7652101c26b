"""Candidate plans tried in real generations on the calibration's inputs; the best one is kept."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arrowhead.calibration.isolation import preserved_rng
from arrowhead.calibration.sharding import share_of
from arrowhead.engine.compile_boundary import force_eager
from arrowhead.engine.forward_hooks import forward_replaced
from arrowhead.engine.install import applied
from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import CustomModel
from arrowhead.models.model import transformers_of
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import Budget
from arrowhead.searches.budget.sensitivity.loop_gain import final_of
from arrowhead.searches.budget.sensitivity.recording import Recording
from arrowhead.searches.budget.sensitivity.sampler_gain import observed
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.allocation import Allocation, Infeasible, within_cost, within_predicted_error
from arrowhead.searches.budget.solver.costs import timed
from arrowhead.searches.budget.solver.problem import Problem, choices_of, problem_of
from arrowhead.searches.budget.solver.solution import plan_of, short, with_provenance, within

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Errors:
    """How far final latents strayed, as norms of changes over norms of what there was.

    `error`: of the latents themselves, all together. `detail`: of the differences between neighbours, image by image, and the
    mean of these: a picture that is paler all over is nearer to what it was than one with other contours.
    """

    error: float
    detail: float


def measured_errors(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], plan: Plan, raw: Tensor) -> Errors:
    """Of one generation with the plan; `raw` are the latents without."""
    with applied(pipe, plan):
        return share_of(inputs).agreed(errors_of(final_latents(pipe, inputs), raw))


def errors_of(latents: Tensor, raw: Tensor) -> Errors:
    """Of latents, (B, C, …) or (B, N, C)."""
    change, whole = (_differences(each).norm(dim=1) for each in (latents - raw, raw))  # (B,)
    error = (latents - raw).norm() / raw.norm()
    return Errors(float(error), float((change / whole.clamp_min(1e-12)).mean()))


def _differences(latents: Tensor) -> Tensor:
    """Between neighbours along each axis of space and time, (B, all of them)."""
    axes = range(2, latents.ndim) if latents.ndim > 3 else (1,)
    return torch.cat([latents.diff(dim=axis).flatten(1) for axis in axes], 1)


def final_latents(pipe: "DiffusionPipeline", inputs: Mapping[str, Any]) -> Tensor:
    """Of one generation, float32, of all processes' images; it runs eagerly, as all of a search's do."""
    if isinstance(pipe, CustomModel):
        with preserved_rng(pipe, None), force_eager():
            return final_of(pipe(**inputs))
    with observed(pipe.scheduler) as sampling, preserved_rng(pipe, inputs.get("generator")), force_eager():
        pipe(**inputs)
    return share_of(inputs).joined(sampling.latents())


def measured_seconds(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], plan: Plan) -> tuple[float, float]:
    """Seconds of the transformers' calls in an untouched generation and in one with the plan."""
    seconds: list[float] = []

    def timing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        out = forward(*args, **kwargs)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds[-1] += time.perf_counter() - started
        return out

    for chosen in (None, plan):
        seconds.append(0.0)
        with ExitStack() as entered:
            entered.enter_context(nullcontext() if chosen is None else applied(pipe, chosen))
            entered.enter_context(preserved_rng(pipe, inputs.get("generator")))
            entered.enter_context(force_eager())
            for transformer in transformers_of(pipe):
                entered.enter_context(forward_replaced(transformer, partial(timing, transformer.forward)))
            pipe(**inputs)
    return seconds[0], seconds[1]


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
class ErrorMet:
    """What was found, and how many generations that took."""

    best: Try
    generations: int


def keep_to(error: float, problem: Problem, measure: Callable[[Allocation], float]) -> ErrorMet:
    """The cheapest allocation found whose measured error is at most `error`; full attention where none was.

    The additive model takes errors as independent, and knows nothing of what later steps do with them, so that its figure is
    too small; but the measured error follows it as a power would, over the range that matters. Each try solves for the
    prediction at which the power through the two nearest tries gives what was asked, between what was met and what was missed.
    """
    tries: list[Try] = []
    limit = error
    while True:
        found = within_predicted_error(problem, min(limit, LARGEST) ** 2)
        if any(found.columns == known.found.columns for known in tries):
            break  # nothing lies between, or nothing is cheaper
        tries.append(Try(found, found.error**0.5, measure(found)))
        best = _best(tries, error)
        if best and (len(tries) >= TRIES or best.measured >= CLOSE * error):
            break
        if tries[-1].predicted == 0 or len(tries) >= 2 * TRIES:
            break  # no prediction is smaller
        limit = _next_limit(tries, error)
    return ErrorMet(_best(tries, error) or _untouched_try(problem), len(tries))


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


def _untouched_try(problem: Problem) -> Try:
    """Full attention everywhere, which changes nothing."""
    cost = 1 - problem.fixed  # of the sites alone
    return Try(Allocation(problem.untouched, 0.0, cost, 0.0), 0.0, 0.0)


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
        plan = with_provenance(solved(table.with_feedback(power), each), feedback=power)
        if not any(plan.cells == other.cells and plan.target == other.target for _, other, _ in tried):
            found = measured_errors(pipe, inputs, plan, recording.final)
            plan = with_provenance(plan, measured_error=short(found.error), measured_detail=short(found.detail))
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
    seconds = timed(pipe, inputs, table.target.sites, choices_of(budget, table), table.blocks)

    def solved(table: Table, budget: Budget) -> Plan:
        problem = problem_of(budget, table, seconds)
        found = within(problem, budget)
        return with_provenance(plan_of(problem, budget, found), predicted_speedup=short(1 / (found.cost + problem.fixed)))

    try:
        plan, tried = corrected(pipe, inputs, budget, recording, solved)
    except Infeasible as infeasible:
        most = math.floor(100 / infeasible.least) / 100
        raise InputsInvalid(
            f"got a budget of speedup={budget.speedup}, wanted at most {most}, the most that these choices can do; ask for "
            "less, or allow more ages"
        ) from None
    raw, compressed = measured_seconds(pipe, inputs, plan)
    return with_provenance(plan, measured_speedup=short(raw / compressed), generations=tried)


def within_error(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], budget: Budget, recording: Recording) -> Plan:
    """The cheapest plan found that keeps to an error: all sites in step, unless single heads err less for as much.

    Or unless steps are too coarse to come near to it.
    """
    best: tuple[Try, Plan] | None = None
    generations = 0
    for granularity in budget.granularities:
        problem = problem_of(replace(budget, granularity=granularity), recording.table)

        def measure(found: Allocation, problem: Problem = problem) -> float:
            return measured_errors(pipe, inputs, plan_of(problem, budget, found), recording.final).error

        if best is not None and best[0].measured >= CLOSE * budget.asked[1]:
            rival = within_cost(problem, max(best[0].found.cost + problem.fixed, _least_cost(problem)))
            generations += 1
            if measure(rival) >= best[0].measured:
                continue
        kept = keep_to(budget.asked[1], problem, measure)
        generations += kept.generations
        if best is None or kept.best.found.cost < best[0].found.cost:
            plan = plan_of(problem, budget, kept.best.found)
            best = kept.best, with_provenance(plan, measured_error=short(kept.best.measured))
    assert best is not None
    return with_provenance(best[1], generations=generations)


def _least_cost(problem: Problem) -> float:
    """The smallest budget that a problem can meet."""
    return float(problem.offer(problem.multiplier_of_least_cost).cost.sum()) + problem.fixed
