"""Two levels: the stack says which steps are computed, and in these steps some heads of attention are arrows.

One budget is spent over both. A schedule that computes more steps than the budget has FLOPs for is paid for by arrows. The
error of an arrow is judged where it stands: in a computed step, whose output the skipped steps after it continue, so that they
multiply the error. The errors of the schedule and of the arrows add up, and the sum decides how many steps are computed. What
is predicted is then measured in real generations, first without arrows. Arrows are taken where they make the picture nearer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arrowhead.calibration.driver import Driver
from arrowhead.engine.install import applied
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import AST, FULL, Arrow, Attend, Cell, Full, Reuse, branch_coefficients
from arrowhead.plans.flops import head_flops
from arrowhead.plans.layout import Kind
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import Budget, Extent
from arrowhead.searches.budget.sensitivity.recording import record
from arrowhead.searches.budget.sensitivity.site_outputs import ComputedOutput
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.solution import short, with_provenance
from arrowhead.searches.budget.validation import DOUBT, FEEDBACKS, measured_errors
from arrowhead.searches.progress import bar_of_steps
from arrowhead.searches.stack.api import about_sites, cost
from arrowhead.searches.stack.profile import Profile
from arrowhead.searches.stack.schedule import Schedule, schedules
from arrowhead.searches.stack.watch import watch

Floats = NDArray[np.float64]
Choices = NDArray[np.int64]
KINDS: tuple[Kind, ...] = ("self_attention",)


@dataclass(frozen=True)
class Level:
    """A schedule with arrows in its computed steps.

    `chosen` (computed steps, H) has for each head of all sites 0 for full attention, or one more than the radius' place in the
    table. `error` is what the arrows do, `saved` the part of the generation's FLOPs that they save.
    """

    schedule: Schedule
    chosen: Choices
    error: float
    saved: float

    @property
    def arrows(self) -> int:
        """The number of arrows in all steps."""
        return int((self.chosen > 0).sum())


def two_levels(driver: Driver, budget: Budget, extent: Extent, progress: bool = True) -> Plan:
    """The plan for a budget of the transformer's FLOPs, from a watched generation, a table of attention, and real generations.

    Of the extent, `ages` is of no use: arrows read nothing of earlier steps.

    Raises:
        InputsInvalid: the budget is none of the transformer's FLOPs, nothing is as cheap, prompts are split among processes, or
            the extent has precisions, or other kinds of sites than self-attention.
    """
    name, value = budget.asked
    if name != "transformer_flops":
        raise InputsInvalid(f"got a budget of {name}={value} for a stack with an extent, wanted transformer_flops")
    if unknown := about_sites(budget):
        raise InputsInvalid(f"got {', '.join(unknown)} for a stack, wanted nothing of single sites; or strategy='budget'")
    if extent.kinds not in (None, KINDS):
        raise InputsInvalid(
            f"got kinds={extent.kinds!r} for a stack with an extent, wanted {KINDS!r}, or None; or strategy='budget'"
        )
    if extent.precisions or not driver.share.alone:
        what = f"precisions={extent.precisions!r}" if extent.precisions else "a shard"
        raise InputsInvalid(f"got {what} for a stack with an extent, wanted none; leave it out, or strategy='budget'")
    with bar_of_steps("watch", shown=progress) as ended:
        watched = watch(driver, ended)
    with torch.inference_mode(False), bar_of_steps("calibrate", shown=progress) as ended:
        table = record(driver, replace(extent, kinds=KINDS, ages=1), ended).table
    return tried_levels(driver, budget, LevelSolver(watched.profile, table), watched.final)


def tried_levels(driver: Driver, budget: Budget, solver: "LevelSolver", final: Tensor) -> Plan:
    """The best plan of those tried in real generations; `final` are the latents of the untouched one.

    The stack alone is tried first. Then `probed` measures what arrows do in each step, and up to `budget.corrections` plans
    with arrows are tried. After each trial the predicted errors are brought to the scale of the measured ones. A plan with
    arrows has to have an error in detail that is smaller by `DOUBT` than that of the stack alone. `about["search"]` has all of
    them under `tried`, and counts the generations of `probed` with the others. With no corrections nothing is tried.
    """
    level, scales, probes = solver.alone(budget), (1.0, 1.0), 0
    if not budget.corrections:
        return solver.plan(budget, solver.solve(budget))
    measured, tried = list[tuple[float, Plan]](), list[dict[str, float]]()
    while len(tried) <= budget.corrections:
        plan = solver.plan(budget, level)
        if any(plan.cells == other.cells for _, other in measured):
            break
        found = measured_errors(driver, plan, final)
        facts = {"measured_error": short(found.error), "measured_detail": short(found.detail)}
        measured.append((found.detail * (1 + DOUBT * bool(tried)), with_provenance(plan, **facts)))
        tried.append({"computed": level.schedule.computed, "arrows": level.arrows, **facts})
        scales = solver.scaled(scales, level, found.error)
        level = solver.solve(budget, *scales)
        if level.arrows and len(tried) == 1:
            solver, probes = probed(driver, budget, solver, level)
            level = solver.solve(budget, *scales)
    best = min(measured, key=lambda each: each[0])[1]
    return with_provenance(best, tried=tried, generations=len(tried) + probes)


def probed(driver: Driver, budget: Budget, solver: "LevelSolver", level: Level) -> tuple["LevelSolver", int]:
    """The solver with the arrows' errors of each step brought to the scale of measured ones, and the number of generations.

    The level's schedule is run without arrows, and once for each computed step with that step's arrows alone. What the model
    makes of an error in a step is an estimate in the table, and too small in early steps. Steps between are interpolated.
    """

    def only(place: int | None) -> Plan:
        chosen = np.zeros_like(level.chosen)
        if place is not None:
            chosen[place] = level.chosen[place]
        return solver.plan(budget, replace(level, chosen=chosen))

    with applied(driver.pipe, only(None), changes="texts"):
        base = driver.final_latents()
    steps, logs = list[int](), list[float]()
    for place, (step, predicted) in enumerate(solver.errors_of_steps(level).items()):
        if predicted > 0:
            found = measured_errors(driver, only(place), base).error ** 2
            steps.append(step)
            logs.append(float(np.log(max(found / predicted, 1e-3))))
    factors = np.exp(np.interp(range(solver.known.steps), steps, logs)) if steps else np.ones(solver.known.steps)
    return replace(solver, factors=tuple(factors.tolist())), 1 + len(steps)


@dataclass(frozen=True)
class LevelSolver:
    """Finds the arrows that pay for a schedule, and the schedule for which they do that best.

    `factors` multiply the predicted errors of arrows in each step; () for 1.
    """

    known: Profile
    table: Table
    factors: tuple[float, ...] = ()

    def alone(self, budget: Budget) -> Level:
        """The schedule of the stack alone within the budget.

        Raises:
            InputsInvalid: nothing is as cheap.
        """
        within = [each for each in self._schedules.values() if self._cost(each) <= budget.fraction]
        if not within:
            least = min(map(self._cost, self._schedules.values()))
            raise InputsInvalid(f"got a budget of transformer_flops={budget.fraction}, wanted {least:.3f} at least; allow more")
        best = min(within, key=lambda each: each.error)
        return Level(best, np.zeros((best.computed, self.table.outputs.shape[1]), np.int64), 0.0, 0.0)

    def solve(self, budget: Budget, of_stack: float = 1.0, of_arrows: float = 1.0) -> Level:
        """The level of least predicted error within the budget; the factors are of the squares that are predicted."""
        levels = [self.alone(budget)]
        for schedule in self._schedules.values():
            if self._cost(schedule) > budget.fraction and (level := self._paid(schedule, budget)) is not None:
                levels.append(level)
        stack = of_stack / self.known.final**2
        return min(levels, key=lambda level: stack * level.schedule.error + of_arrows * level.error)

    def scaled(self, scales: tuple[float, float], level: Level, measured: float) -> tuple[float, float]:
        """The factors for `solve` after a generation with a level: the stack's is new if it had no arrows, else theirs."""
        of_stack, of_arrows = scales
        predicted = level.schedule.error / self.known.final**2
        if not level.error:
            return (measured**2 / predicted if predicted else 1.0), of_arrows
        left = measured**2 - of_stack * predicted
        return of_stack, max(left / level.error, 0.1 * of_arrows)  # two errors that cancel leave nothing

    def plan(self, budget: Budget, level: Level) -> Plan:
        """The plan of a level. It speaks of the sites that have arrows, and of the stack."""
        known, (stack,), name = self.known, self.known.target.sites, budget.asked[0]
        steps = [step for step, cell in enumerate(level.schedule.cells) if cell == FULL]
        columns: dict[int, list[Cell]] = {}
        for place in range(len(self.table.target.sites)):
            chosen = level.chosen[:, [*self.table.heads(place)]]  # (computed steps, heads)
            if not chosen.any():
                continue
            columns[place] = [AST] * known.steps
            for step, heads in zip(steps, chosen, strict=True):
                methods = (Full() if choice == 0 else Arrow(self.table.radii[choice - 1]) for choice in heads)
                columns[place][step] = Attend(tuple(methods))
        sites = (stack, *(self.table.target.sites[place] for place in columns))
        rows = tuple(zip(level.schedule.cells, *columns.values(), strict=True))
        search = {
            "strategy": "stack",
            "asked": f"{name} = {budget.fraction}",
            "transformer_flops": short(self._cost(level.schedule) - level.saved),
            "predicted_error": short((level.schedule.error / known.final**2 + level.error) ** 0.5),
            "computed": level.schedule.computed,
            "arrows": level.arrows,
            **dict(self.table.about.get("search", {})),
        }
        tokens = replace(known.tokens, grid=self.table.tokens.grid)
        target = replace(known.target, sites=sites)
        return Plan(
            rows, target, tokens, known.branches.guided, {**known.about, "search": search}, known.branches.calls, known.switch
        )

    @cached_property
    def _schedules(self) -> dict[int, Schedule]:
        return schedules(self.known, FEEDBACKS[0])

    def _cost(self, schedule: Schedule) -> float:
        return cost(self.known, "transformer_flops", schedule)

    def _paid(self, schedule: Schedule, budget: Budget) -> Level | None:
        """The schedule with the arrows of least error that save what it costs above the budget; None where none do."""
        errors = self._errors_under(schedule)
        wanted = (self._cost(schedule) - budget.fraction) * self.known.steps
        chosen = least_error(errors, self._savings, wanted)
        if chosen is None:
            return None
        saved = _of(self._savings, chosen).sum() / self.known.steps
        return Level(schedule, chosen, float(_of(errors, chosen).sum()), float(saved))

    def errors_of_steps(self, level: Level) -> dict[int, float]:
        """The predicted error of a level's arrows in each computed step."""
        steps = [step for step, cell in enumerate(level.schedule.cells) if cell == FULL]
        return dict(zip(steps, _of(self._errors_under(level.schedule), level.chosen).sum(1).tolist(), strict=True))

    def _errors_under(self, schedule: Schedule) -> Floats:
        """The predicted error of each head's arrows in each computed step of a schedule: (computed steps, H, 1 + radii)."""
        steps = [step for step, cell in enumerate(schedule.cells) if cell == FULL]
        multiplied, factors = carried_on(schedule.cells, self._gains), self.factors or (1.0,) * self.known.steps
        return self._errors[steps] * np.array([multiplied[step] ** 2 * factors[step] for step in steps])[:, None, None]

    @property
    def _gains(self) -> list[float]:
        pairs = zip(self.known.sampler_gains, self.known.model_feedback, strict=True)
        return [gain * factor ** FEEDBACKS[0] for gain, factor in pairs]

    @cached_property
    def _errors(self) -> Floats:
        """The predicted error of each head's arrows in each step where that step alone reads them: (S, H, 1 + radii)."""
        heads = [[head] for head in range(self.table.outputs.shape[1])]
        found = self.table.predicted_errors(heads, [ComputedOutput(radius) for radius in self.table.radii])  # (S, radii, H)
        return np.concatenate([np.zeros_like(found[:, :1]), found], 1).transpose(0, 2, 1)

    @cached_property
    def _savings(self) -> Floats:
        """What each head's arrows save, in parts of a full step's FLOPs: (H, 1 + radii)."""
        samples, tokens = 2 if self.table.branches.guided else 1, self.table.tokens
        rows = list[list[float]]()
        for site in self.table.target.sites:
            whole = head_flops(site, tokens, Full())
            saved = [whole - head_flops(site, tokens, Arrow(radius)) for radius in self.table.radii]
            rows += [[0.0, *saved]] * site.heads
        return np.array(rows) * samples / self.known.flops[0]


def carried_on(cells: Sequence[Cell], gains: Sequence[float]) -> dict[int, float]:
    """By how much the final change grows because skipped steps continue a computed step's output, for each computed step.

    An error in the output of a step counts there, and in each step that reads the output, times the coefficient there. A run
    errs in the same direction from step to step, so what the steps make of it is added, each weighted by its gain.

    >>> from arrowhead.plans.cells import AST, FULL
    >>> carried_on((FULL, AST, AST, FULL), (1.0, 1.0, 1.0, 1.0))
    {0: 3.0, 3: 1.0}
    """
    summed: dict[int, float] = {}
    last: list[int] = []
    for step, cell in enumerate(cells):
        if not isinstance(cell, Reuse):
            summed[step], last = gains[step], [*last[-1:], step]
            continue
        slope, (j, *_) = branch_coefficients(cell.extrapolate)[0], last[::-1]
        summed[j] += branch_coefficients(cell.scale)[0] * gains[step]
        if slope:
            i = last[0]
            ahead = slope * (step - j) / (j - i) * gains[step]
            summed[j] += ahead
            summed[i] -= ahead
    return {step: abs(value) / max(gains[step], 1e-30) for step, value in summed.items()}


def least_error(errors: Floats, savings: Floats, wanted: float) -> Choices | None:
    """For each head of each step the choice with which all save what is wanted, with the least sum of errors.

    `errors` (n, H, choices), `savings` (H, choices); the first choice saves nothing. Each head takes what is best at one price
    of savings, which is bisected; then what is saved beyond is given back. None where all heads together save too little.
    """

    def at(price: float) -> Choices:
        return np.argmin(errors - price * savings, axis=2)

    def saved(chosen: Choices) -> float:
        return float(_of(savings, chosen).sum())

    if saved(np.broadcast_to(np.argmax(savings, axis=1), errors.shape[:2])) < wanted:
        return None
    low, high = 0.0, 1e-12
    while saved(at(high)) < wanted:
        low, high = high, 4 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(at(middle)) >= wanted else (middle, high)
    chosen, left = at(high), saved(at(high)) - wanted
    by_head = _of(errors, chosen)
    for place in sorted(zip(*np.nonzero(chosen), strict=True), key=lambda place: -by_head[place]):
        if (back := float(savings[place[1], chosen[place]])) <= left:
            chosen[place], left = 0, left - back
    return chosen


def _of(values: Floats, chosen: Choices) -> Floats:
    """The value of each head's choice (n, H), from the values of all choices, (n, H, choices) or (H, choices)."""
    return np.take_along_axis(np.broadcast_to(values, (*chosen.shape, values.shape[-1])), chosen[..., None], 2)[..., 0]
