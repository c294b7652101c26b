"""The search under a budget for the whole generation: calibrate once, solve, check."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from arrowhead.apply import target_of
from arrowhead.errors import InputsInvalid, NotIntercepted, PlanMismatch
from arrowhead.layout import seen
from arrowhead.models import find
from arrowhead.plan import Plan
from arrowhead.search.budget.allocate import Allocation, Infeasible, within_cost, within_memory
from arrowhead.search.budget.check import final_latents, measured_errors, measured_seconds
from arrowhead.search.budget.costs import FlopCosts, Measure, SecondCosts, timed
from arrowhead.search.budget.extent import Extent
from arrowhead.search.budget.given import SLOPES, Choices
from arrowhead.search.budget.keep import CLOSE, Try, keep_to
from arrowhead.search.budget.problem import Granularity, InStep, Problem, group_size
from arrowhead.search.budget.record import Recording, record, sites_of
from arrowhead.search.budget.table import Table
from arrowhead.search.calibrate import Calibration

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

POWERS = (0.75, 1.0, 0.5)
"""Of the model's answers to errors: what a correction tries instead of the table's, the first ones first."""

DOUBT = 0.05
"""By so much an error in detail has to be smaller for another power to be taken: few images tell no smaller difference."""

PRESETS = {"light": 0.03, "balanced": 0.07, "strong": 0.15}
"""Relative errors of the final latents."""


@dataclass(frozen=True)
class Budget:
    """What a generation may cost, or how far it may stray: one of the first five.

    Args:
        attention_flops: what may remain of the FLOPs of attention's two matmuls, in (0, 1]; feed-forwards are left alone.
        module_flops: of the attention modules' FLOPs, with the Q, K, V and output projections, in (0, 1]; likewise.
        transformer_flops: of all FLOPs of the transformer, in (0, 1].
        speedup: of the transformer, above 1, by the seconds that cells take on this device for the calibration's inputs.
        error: norm of the change of the final latents over their norm, on the calibration's inputs; the fewest FLOPs of the
            transformer are sought that keep to it.
        cache_bytes: what the caches may hold at most, for as many images as the calibration has at once; beside one of the
            five, but for an error.
        granularity: what does the same in a step: `step` for all sites, `site` for all heads of a site, `head`, or groups of so
            many heads. None: `step` and `head`, for a speedup `step` and `site`, whatever errs less in a real generation; for a
            table alone the former.
        share_cfg: whether a site may compute the conditional branch alone.
        residual: whether arrows may add a residual.
        reuse: whether outputs may be repeated.
        precision: whether heads may multiply with less precision, of those that the table has (`Extent(precisions=…)`).
        extrapolate: whether whole sites' outputs may be continued along a line.
        slopes: what of a line's slope may be taken, above 0 and at most 1; less than all is better where outputs are noisy.
        corrections: beside FLOPs or a speedup, how many more plans may be tried on the calibration's inputs, 2 at most, of
            which the one that errs least in detail is kept. They take the model's answer to an error, an estimate, for another.
    """

    attention_flops: float | None = None
    module_flops: float | None = None
    transformer_flops: float | None = None
    speedup: float | None = None
    error: float | None = None
    cache_bytes: int | None = None
    granularity: Granularity | None = None
    share_cfg: bool = True
    residual: bool = True
    reuse: bool = True
    extrapolate: bool = True
    slopes: tuple[float, ...] = SLOPES
    precision: bool = True
    corrections: int = 2

    def __post_init__(self) -> None:
        asked = {name: value for name in ASKED if (value := getattr(self, name)) is not None}
        if len(asked) != 1:
            raise InputsInvalid(
                f"got a budget of {asked or 'nothing'}, wanted one of {', '.join(ASKED)}, such as module_flops=0.4"
            )
        ((name, value),) = asked.items()
        above, highest = RANGES.get(name, (0, 1))
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= highest:
            raise InputsInvalid(f"got {name}={value!r}, wanted a number above {above}, at most {highest:g}")
        of_groups = type(self.granularity) is int and self.granularity > 0
        if self.granularity not in (None, "step", "site", "head") and not of_groups:
            raise InputsInvalid(
                f"got granularity={self.granularity!r}, wanted 'step', 'site', 'head', or a number of heads, 1 or more"
            )
        if self.cache_bytes is not None and (type(self.cache_bytes) is not int or self.cache_bytes < 0 or name == "error"):
            raise InputsInvalid(
                f"got cache_bytes={self.cache_bytes!r} with a budget of {name}, wanted a whole number of 0 or more, beside "
                "FLOPs or a speedup; leave it out, or ask for one of these"
            )
        if not isinstance(self.slopes, tuple) or not all(0 < slope <= 1 for slope in self.slopes):
            raise InputsInvalid(f"got slopes={self.slopes!r}, wanted a tuple of numbers above 0 and at most 1; () for no lines")
        if type(self.corrections) is not int or not 0 <= self.corrections < len(POWERS):
            raise InputsInvalid(f"got corrections={self.corrections!r}, wanted 0, 1 or 2")
        if self.speedup is not None and self.granularity not in (None, "step", "site"):
            raise InputsInvalid(
                f"got a speedup with granularity={self.granularity!r}, wanted whole sites: seconds of heads do not add up; "
                "leave it out, or ask for FLOPs"
            )

    @property
    def asked(self) -> tuple[str, float]:
        """Which of the five, and its value."""
        return next((name, value) for name in ASKED if (value := getattr(self, name)) is not None)

    @property
    def fraction(self) -> float:
        """What may remain of the cost."""
        name, value = self.asked
        return 1 / value if name == "speedup" else value

    def choices(self, table: Table) -> Choices:
        """What a table and this budget leave open."""
        share_cfg, precisions = self.share_cfg and table.branches.guided, table.precisions if self.precision else ()
        extrapolate = self.extrapolate and len(self.slopes) > 0
        return Choices(table.radii, table.ages, share_cfg, self.residual, self.reuse, extrapolate, precisions, self.slopes)

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Those that come into question, where the pipeline can show which is better."""
        finest: Granularity = "head" if self.speedup is None else "site"  # seconds of heads do not add up
        return ("step", finest) if self.granularity is None else (self.granularity,)

    def problem(self, table: Table, seconds: SecondCosts | None = None) -> Problem:
        """What has to be solved with a table, and, for a speedup, with what was timed."""
        granularity = self.granularities[0]
        kind = InStep if granularity == "step" else Problem
        if seconds is not None:
            return kind(table, self.choices(table), seconds, granularity)
        measure: Measure = "transformer"
        if self.attention_flops is not None or self.module_flops is not None:
            table, measure = table.attention_alone(), "module" if self.attention_flops is None else "attention"
        samples = table.branches.samples * table.branches.calls
        costs = FlopCosts(measure, table.tokens, samples, table.other_flops)
        return kind(table, self.choices(table), costs, granularity)


ASKED = tuple(field.name for field in fields(Budget)[:5])
RANGES = {"speedup": (1, sys.float_info.max), "error": (0, sys.float_info.max)}


def calibrate(
    pipe: "DiffusionPipeline", inputs: Mapping[str, Any], *, extent: Extent | None = None, progress: bool = True
) -> Table:
    """Run the pipeline once with `inputs`, and note what skipping anything would do; the table serves any budget.

    Args:
        pipe: a diffusers pipeline of a supported family. It is left as it was.
        inputs: the keyword arguments of the pipeline's call. A `generator` among them is left as it was found.
        extent: how far to look: radii, ages, random vectors.
        progress: show a tqdm bar.

    Raises what `arrowhead.search` raises.
    """
    return _recorded(pipe, inputs, extent or Extent(), progress).table


def calibration_bytes(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], *, extent: Extent | None = None) -> int:
    """What a calibration holds at most from one step to the next, beside the pipeline itself and what one pass needs.

    A pass with gradients keeps its activations for the way back; with `checkpoint` one block's and each block's input, without
    gradients none. The pipeline runs up to the first call of its transformer. Raises what `arrowhead.search` raises.
    """
    extent = extent or Extent()
    model = sites_of(pipe, extent)
    calibration = Calibration(model, inputs)
    with closing(calibration.steps()) as steps:
        if next(steps, None) is None:
            raise NotIntercepted("the pipeline never called its transformer; wanted at least one denoising step")
        dtype: torch.dtype = pipe.transformer.dtype
        return extent.held(model.sites, calibration.tokens) * calibration.rows * dtype.itemsize


def solve(table: Table, budget: Budget) -> Plan:
    """The plan for a budget of FLOPs, from a table alone; nothing is run.

    Raises:
        InputsInvalid: the budget is an error or a speedup, which the pipeline has to show, or nothing is as cheap.
    """
    name, value = budget.asked
    if name in ("error", "speedup"):
        raise InputsInvalid(
            f"got a budget of {name}={value}, wanted FLOPs: a table alone knows no other; call arrowhead.search"
        )
    problem = budget.problem(table)
    return _plan(problem, budget, _within(problem, budget))


def sweep(table: Table, budgets: Sequence[Budget]) -> list[Plan]:
    """A plan for each budget of FLOPs, from one table. Raises what `solve` raises."""
    return [solve(table, budget) for budget in budgets]


def budgeted(
    pipe: "DiffusionPipeline",
    inputs: Mapping[str, Any],
    budget: Budget,
    *,
    extent: Extent | None = None,
    table: Table | None = None,
    progress: bool = True,
) -> Plan:
    """Calibrate, solve, and check by generating once more. Raises what `arrowhead.search` raises."""
    name, _ = budget.asked
    for site in find(pipe).sites:
        group_size(budget.granularity or "head", site)  # now, rather than after minutes
    kinds = extent.kinds if extent is not None and table is None else None
    if name in ("attention_flops", "module_flops") and kinds is not None and "self_attention" not in kinds:
        raise InputsInvalid(
            f"got a budget of {name} with kinds={kinds!r}, wanted self_attention among them; or transformer_flops"
        )
    if table is None:
        recording = _recorded(pipe, inputs, extent or Extent(), progress)
    else:
        _require(table, pipe, inputs)
        recording = Recording(table, final_latents(pipe, inputs), 0, 0.0)
    about = {"calibration_passes": recording.passes, "calibration_attention_flops_by_raw": round(recording.cost, 3)}
    if name == "speedup":
        return _told(_fast_enough(pipe, inputs, budget, recording), **about)
    if name != "error":
        plan, tried = _corrected(pipe, inputs, budget, recording, solve)
        return _told(plan, generations=tried, **about)
    return _told(_kept(pipe, inputs, budget, recording), **about)


def _require(table: Table, pipe: "DiffusionPipeline", inputs: Mapping[str, Any]) -> None:
    """Check that a table was made on such a pipeline, with as many branches.

    Raises:
        PlanMismatch: it was not; the message names every difference.
    """
    sites = table.target.sites
    model = find(pipe, {site.kind for site in sites}).only(lambda site: site.path in {own.path for own in sites})
    found = table.target.differences(target_of(model))
    branches = model.branches(model.call_arguments((), inputs))
    if branches != table.branches:
        found.append(f"branches: table {table.branches}, inputs {branches}")
    if found:
        raise PlanMismatch("table does not fit this pipeline and inputs; calibrate again on them. " + "; ".join(found))


def _kept(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], budget: Budget, recording: Recording) -> Plan:
    """The cheapest plan found that keeps to an error: all sites in step, unless single heads err less for as much.

    Or unless steps are too coarse to come near to it.
    """
    best: tuple[Try, Plan] | None = None
    generations = 0
    for granularity in budget.granularities:
        problem = replace(budget, granularity=granularity).problem(recording.table)

        def measure(found: Allocation, problem: Problem = problem) -> float:
            return measured_errors(pipe, inputs, _plan(problem, budget, found), recording.final).error

        if best is not None and best[0].measured >= CLOSE * budget.asked[1]:
            rival = within_cost(problem, max(best[0].found.cost + problem.fixed, _least(problem)))
            generations += 1
            if measure(rival) >= best[0].measured:
                continue
        kept = keep_to(budget.asked[1], problem, measure)
        generations += kept.generations
        if best is None or kept.best.found.cost < best[0].found.cost:
            plan = _plan(problem, budget, kept.best.found)
            best = kept.best, _told(plan, measured_error=_short(kept.best.measured))
    assert best is not None
    return _told(best[1], generations=generations)


def _least(problem: Problem) -> float:
    """The smallest budget that a problem can meet."""
    return float(problem.offer(problem.dear).cost.sum()) + problem.fixed


def _within(problem: Problem, budget: Budget) -> Allocation:
    """What is found within the cost, and within the bytes if they are bounded."""
    if budget.cache_bytes is None:
        return within_cost(problem, budget.fraction)
    table = problem.table

    def peak(found: Allocation) -> int:
        plan = _plan(problem, budget, found)
        return max(plan.cache_bytes(table.images, table.itemsize))

    found, refused = [], None
    for each in (problem, problem.without_lines()) if problem.choices.extrapolate else (problem,):
        try:
            found.append(within_memory(each, budget.fraction, peak, budget.cache_bytes))
        except InputsInvalid as error:
            refused = error
    if not found:
        assert refused is not None
        raise refused
    return min(found, key=lambda allocation: allocation.damage)


def _fast_enough(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], budget: Budget, recording: Recording) -> Plan:
    """Time cells, solve, and time a generation beside an untouched one."""
    table = recording.table
    seconds = timed(pipe, inputs, table.target.sites, budget.choices(table), table.blocks)

    def solved(table: Table, budget: Budget) -> Plan:
        problem = budget.problem(table, seconds)
        found = _within(problem, budget)
        return _told(_plan(problem, budget, found), predicted_speedup=_short(1 / (found.cost + problem.fixed)))

    try:
        plan, tried = _corrected(pipe, inputs, budget, recording, solved)
    except Infeasible as infeasible:
        most = math.floor(100 / infeasible.least) / 100
        raise InputsInvalid(
            f"got a budget of speedup={budget.speedup}, wanted at most {most}, the most that these choices can do; ask for "
            "less, or allow more ages"
        ) from None
    raw, compressed = measured_seconds(pipe, inputs, plan)
    return _told(plan, measured_speedup=_short(raw / compressed), generations=tried)


def _corrected(
    pipe: "DiffusionPipeline",
    inputs: Mapping[str, Any],
    budget: Budget,
    recording: Recording,
    solved: Callable[[Table, Budget], Plan],
) -> tuple[Plan, int]:
    """The plan that errs least in detail in a real generation, and how many there were.

    Each granularity in question is tried as the table has it; then the better one with whole slopes alone (the table cannot
    see how steps of full attention and slopes answer to one another), or with other powers of the model's answers, which have
    to be better by more than chance.
    """
    table, tried = recording.table, list[tuple[float, Plan, Budget]]()
    refused: InputsInvalid | None = None

    def attempt(power: float, each: Budget) -> None:
        plan = _told(solved(table.answering(power), each), feedback=power)
        if not any(plan.cells == other.cells and plan.target == other.target for _, other, _ in tried):
            found = measured_errors(pipe, inputs, plan, recording.final)
            told = _told(plan, measured_error=_short(found.error), measured_detail=_short(found.detail))
            tried.append((found.detail * (1 if power == table.feedback else 1 + DOUBT), told, each))

    for granularity in budget.granularities[: 1 + budget.corrections]:
        try:
            attempt(table.feedback, replace(budget, granularity=granularity))
        except InputsInvalid as error:
            refused = error
    if refused is not None and not tried:
        raise refused
    others = [(table.feedback, (1.0,)), *((power, budget.slopes) for power in POWERS if power != table.feedback)]
    for power, slopes in others if budget.cache_bytes is None else ():  # bytes take long to solve for
        least, _, best = min(tried, key=lambda each: each[0])
        if len(tried) <= budget.corrections and least > 0:
            attempt(power, replace(best, slopes=slopes))
    return min(tried, key=lambda each: each[0])[1], len(tried)


def _recorded(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], extent: Extent, progress: bool) -> Recording:
    """Drain a calibration behind a bar over the steps."""
    steps = record(pipe, inputs, extent)
    with torch.inference_mode(False), closing(steps), tqdm(desc="calibrate", unit="step", disable=not progress) as bar:
        while True:
            try:
                step, bar.total = next(steps)
            except StopIteration as end:
                return end.value
            bar.update(step + 1 - bar.n)


def _plan(problem: Problem, budget: Budget, found: Allocation) -> Plan:
    table, (name, value) = problem.table, budget.asked
    settings = {key: setting for key, setting in asdict(budget).items() if key not in ASKED}
    settings["granularity"] = problem.granularity
    search = {"strategy": "budget", "asked": f"{name} = {value}", **settings, **dict(table.about.get("search", {}))}
    if isinstance(problem.costs, FlopCosts):
        search[f"{problem.costs.measure}_flops"] = _short(found.cost + problem.fixed)
    search["predicted_error"] = _short(found.damage**0.5)
    columns = {site: column for site, column in zip(problem.sites, found.columns, strict=True) if column is not None}
    rows = tuple(zip(*columns.values(), strict=True))
    about = {**table.about, "search": search}
    target, tokens = replace(table.target, sites=tuple(columns)), seen(table.tokens, columns)
    return Plan(rows, target, tokens, table.branches.guided, about, table.branches.calls)


def _told(plan: Plan, **facts: Any) -> Plan:
    """The plan, saying more of how it was found."""
    return replace(plan, about={**plan.about, "search": {**plan.about["search"], **facts}})


def _short(value: float) -> float:
    return float(f"{value:.3g}")
