"""Plans for the whole stack of blocks: from a profile for any budget, or from a pipeline with one watched generation."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arrowhead.calibration.driver import Driver, driver_of
from arrowhead.engine.changes import Changes
from arrowhead.engine.install import applied
from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import Budget, Extent
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.solution import short, with_provenance
from arrowhead.searches.budget.validation import DOUBT, FEEDBACKS, Errors, errors_of, measured_errors, time_calls
from arrowhead.searches.progress import bar_of_steps
from arrowhead.searches.settings import require_a
from arrowhead.searches.stack.profile import Profile
from arrowhead.searches.stack.schedule import Schedule, schedules
from arrowhead.searches.stack.watch import Watched, watch

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

CLOSE = 0.9
"""A measured error is close enough to the one allowed if it is at least this part of it."""
TRIES = 4
"""Generations by which an error is met."""
KNOWN = ("transformer_flops", "speedup", "error", "corrections")
"""What a stack knows of a `Budget`. Everything else is about single sites."""


def why_sites(driver: Driver, budget: Budget, extent: Extent | None, table: Table | None) -> str | None:
    """Why a budget has to be spent on single sites; None where the stack of all blocks can keep to it.

    >>> why_sites(driver, Budget(transformer_flops=0.4, cache_bytes=10**9), None, None)
    'cache_bytes=1000000000 is about single sites'
    """
    given = [name for name, value in (("an Extent", extent), ("a Table", table)) if value is not None]
    if said := [*given, *about_sites(budget)]:
        return f"{' and '.join(said)} {'is' if len(said) == 1 else 'are'} about single sites"
    if not driver.share.alone:
        return "prompts are split among processes"
    try:
        find(driver.pipe, {"stack"})
    except UnsupportedPipeline:
        return "the transformer is no plain chain of blocks"
    return None


def about_sites(budget: Budget) -> list[str]:
    """The settings of a budget that only a search over single sites knows, as they were given."""
    values = ((each, getattr(budget, each.name)) for each in fields(Budget) if each.name not in KNOWN)
    return [f"{each.name}={value!r}" for each, value in values if value != each.default]


def _require_known(budget: Budget) -> None:
    """Check that a stack knows all that a budget says.

    Raises:
        InputsInvalid: it does not; the message names the settings.
    """
    if unknown := about_sites(budget):
        raise InputsInvalid(
            f"got {', '.join(unknown)} for a stack of blocks, wanted transformer_flops, a speedup or an error, and nothing of "
            "single sites; leave the others out, or call arrowhead.search with strategy='budget'"
        )


def profile(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], *, progress: bool = True) -> Profile:
    """Generate once with `inputs`, and learn what skipping steps would change. No gradient is taken.

    The generation takes about 1.15 times as long as a plain one. Held meanwhile is what all blocks together add to their
    input, in the last 20 steps. `solve` finds a plan for any budget from what this gives, in a second, without the model.

    Args:
        pipe: a diffusers pipeline whose transformer is a plain chain of blocks; left as it was.
        inputs: the keyword arguments of the pipeline's call. A `generator` among them has the same state afterwards.
        progress: whether to show a tqdm bar.

    Raises:
        UnsupportedPipeline: the transformer is no plain chain of blocks.
        InputsInvalid: the pipeline's call does not take the inputs, or values are not finite.
        AlreadyApplied: the pipeline carries a plan.

    Examples:
        >>> profile = ah.profile(pipe, {"prompt": "a cat", "num_inference_steps": 28})
        >>> plan = ah.solve(profile, ah.Budget(transformer_flops=0.4))
    """
    return _watched(driver_of(pipe, inputs), progress).profile


def solve_profile(known: Profile, budget: Budget, *, feedback: float = FEEDBACKS[0]) -> Plan:
    """The plan of least predicted error within a budget of the transformer's FLOPs, a speedup or an error.

    Raises:
        InputsInvalid: nothing is as cheap, or the budget says something of single sites, such as their FLOPs.
    """
    require_a(Profile, known, "profile")
    require_a(Budget, budget, "budget")
    _require_known(budget)
    found = schedules(known, feedback)
    name, value = budget.asked
    if name == "error":
        within = [each for each in found.values() if predicted_error(known, each) <= value]
        return plan_of(known, budget, min(within, key=lambda each: each.computed), feedback)
    allowed = value if name == "transformer_flops" else 1 / value
    within = [each for each in found.values() if cost(known, name, each) <= allowed]
    if not within:
        least = min(cost(known, name, each) for each in found.values())
        most = f"transformer_flops={least:.3f} at least" if name == "transformer_flops" else f"speedup={1 / least:.3g} at most"
        remedy = "allow more" if name == "transformer_flops" else "ask for less"
        raise InputsInvalid(f"got a budget of {name}={value}, wanted {most}; {remedy}")
    return plan_of(known, budget, min(within, key=lambda each: each.error), feedback)


def cost(known: Profile, name: str, schedule: Schedule) -> float:
    """The part of the transformer's FLOPs that a schedule leaves; for a speedup of its seconds."""
    skipped = known.skipped_seconds if name == "speedup" else known.skipped_flops
    return part_left(skipped, schedule.computed, known)


def part_left(skipped: float, computed: int, known: Profile) -> float:
    """The part of a cost that is left with so many computed steps, where the others cost the part `skipped` of one of these."""
    part = computed / known.steps
    return part + (1 - part) * skipped


def computed(plan: Plan) -> int:
    """The number of steps in which a stack's plan computes."""
    return sum(row[0] == FULL for row in plan.cells)


def predicted_error(known: Profile, schedule: Schedule) -> float:
    """The norm of the final latents' change over their norm, as predicted."""
    return schedule.error**0.5 / known.final


def plan_of(known: Profile, budget: Budget, schedule: Schedule, feedback: float) -> Plan:
    """The plan of a schedule, for the model that was watched."""
    name, value = budget.asked
    search = {
        "strategy": "stack",
        "asked": f"{name} = {value}",
        "transformer_flops": short(cost(known, "transformer_flops", schedule)),
        "predicted_error": short(predicted_error(known, schedule)),
        **({"predicted_speedup": short(1 / cost(known, "speedup", schedule))} if name == "speedup" else {}),
        "feedback": feedback,
    }
    rows = tuple((cell,) for cell in schedule.cells)
    about, branches = {**known.about, "search": search}, known.branches
    return Plan(rows, known.target, known.tokens, branches.guided, about, branches.calls, known.switch)


def planned(driver: Driver, budget: Budget, progress: bool = True) -> Plan:
    """The plan for a budget, from one watched generation on the driver's inputs, and real ones in which plans are checked.

    For FLOPs or a speedup up to 1 + `budget.corrections` plans are tried, which differ in the power of the model feedback, an
    estimate; the one with the least error in detail is kept. With no corrections nothing is tried. For a speedup the steps of
    each try are timed, and the next one is solved for these seconds. For an error the plan of the fewest computed steps is
    looked for whose measured error is within it.
    """
    _require_known(budget)  # before anything runs
    if not driver.share.alone:
        raise InputsInvalid("got a shard for a stack of blocks, wanted all prompts in one process; or strategy='budget'")
    watched = _watched(driver, progress)
    if budget.asked[0] == "error":
        return _within_error(driver, budget, watched)
    known, tried = watched.profile, list[tuple[float, Plan]]()
    for feedback in FEEDBACKS[: 1 + budget.corrections]:
        plan = solve_profile(known, budget, feedback=feedback)
        if not budget.corrections:
            return plan
        if any(plan.cells == other.cells for _, other in tried):
            continue
        found, seconds = _checked(driver, plan, watched.final)
        plan = with_provenance(plan, measured_error=short(found.error), measured_detail=short(found.detail))
        if budget.speedup is not None:
            known = replace(known, seconds=seconds)
            plan = with_provenance(plan, measured_speedup=short(1 / part_left(known.skipped_seconds, computed(plan), known)))
        tried.append((found.detail * (1 + DOUBT * bool(tried)), plan))
    generations = len(tried)
    if budget.speedup is not None:  # with as many computed steps as the seconds that were measured last allow
        last = solve_profile(known, budget)
        tried = [each for each in tried if computed(each[1]) == computed(last)] or [(0.0, last)]
    return with_provenance(min(tried, key=lambda each: each[0])[1], generations=generations)


def _checked(driver: Driver, plan: Plan, raw: Tensor) -> tuple[Errors, tuple[float, float]]:
    """The errors of a generation with the plan, and its seconds of a step that computes and of one that skips: medians."""
    changes = Changes()
    with applied(driver.pipe, plan, changes="texts"), changes, changes:
        calls = time_calls(driver, changes)
        errors = errors_of(driver.final_latents(), raw)
    of_steps = torch.tensor(calls).view(plan.steps, -1).sum(1)  # a step has one call, or one for each branch
    skips = torch.tensor([row[0] != FULL for row in plan.cells])
    full = float(of_steps[~skips].median())
    return errors, (full, float(of_steps[skips].median()) if skips.any() else full)


def _within_error(driver: Driver, budget: Budget, watched: Watched) -> Plan:
    """The plan of the fewest computed steps found whose measured error is within the budget's: a bisection over the steps."""
    known, allowed, measured = watched.profile, budget.asked[1], dict[int, float]()
    found = schedules(known, FEEDBACKS[0])
    low, high = min(found), max(found)  # the most computed steps change nothing
    guess = min(count for count, each in found.items() if predicted_error(known, each) <= allowed)
    while low < high and len(measured) < TRIES:
        plan = plan_of(known, budget, found[guess], FEEDBACKS[0])
        measured[guess] = measured_errors(driver, plan, watched.final).error
        if measured[guess] <= allowed:
            high = guess
            if measured[guess] >= CLOSE * allowed:
                break
        else:
            low = guess + 1
        guess = min(max((low + high) // 2, low), high)
    plan = plan_of(known, budget, found[high], FEEDBACKS[0])
    return with_provenance(plan, measured_error=short(measured.get(high, 0.0)), generations=len(measured))


def _watched(driver: Driver, progress: bool) -> Watched:
    """Watch a generation behind a bar over the steps."""
    with bar_of_steps("watch", shown=progress) as ended:
        return watch(driver, ended)
