"""A plan on a pipeline: its step follows the denoising loop, its caches are emptied around every generation."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from arrowhead.engine.cache import Output
from arrowhead.engine.cache_encoding import NATIVE, CacheEncoding
from arrowhead.engine.changes import Changes
from arrowhead.engine.circumstances import Adaptation, require_adaptation, without_shared_text
from arrowhead.engine.compile_boundary import CallWrapper
from arrowhead.engine.copies import Copies, carrying_class
from arrowhead.engine.execute_site import execute_site
from arrowhead.engine.following import Following
from arrowhead.engine.generation import Generation
from arrowhead.engine.plan_warnings import other_guidance, warn_of_derived, warn_of_other_weights, warn_of_wide_bands
from arrowhead.engine.prepared import Inseparable, PreparedPlans, SitePlans
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.stack_calls import StackCall, execute_stack
from arrowhead.engine.stats import Stats, Summary
from arrowhead.engine.step_clock import StepClock
from arrowhead.engine.wrappers import Interception, uncopied
from arrowhead.errors import (
    AlreadyApplied,
    AlreadyGenerating,
    ArrowheadError,
    GenerationUnfinished,
    NotIntercepted,
    PlanAdapted,
    PlanMismatch,
    ProcessorReplaced,
    SiteNotReached,
)
from arrowhead.kernels import dispatch
from arrowhead.models.conflicts import require_no_conflicts
from arrowhead.models.custom import CustomModel
from arrowhead.models.model import Model, target_of, transformers_of
from arrowhead.plans.layout import Branches, Site
from arrowhead.plans.plan import Plan
from arrowhead.upstream import uncompiled


class Run:
    """A plan on a pipeline, from `apply` to `remove`. Owns the caches and counters of the generation that is going on."""

    def __init__(
        self, model: Model, plan: Plan, kernel: str, encoding: CacheEncoding = NATIVE, changes: Adaptation = "adapt"
    ) -> None:
        self.plan = plan
        self.changes = require_adaptation(changes)
        self.kernel = dispatch.require_kernel(kernel)
        self.encoding = encoding
        self._model = self._own = model  # that of the pipeline whose call runs: of a copy, the scheduler is its own
        self._pipeline_class = type(model.pipe)
        self._require_target()
        self._following = Following(plan, model, self.changes, self._adapted)
        self._prepared = PreparedPlans(model)
        self._inseparable: Inseparable = frozenset()  # set as the generation is
        self._turn: dict[str, StepClock] = {}  # the clock of the call that generates: of several, one puts it there
        self._replaced: frozenset[str] = frozenset()  # paths of sites whose wrapper was gone when the generation began
        self._branches: Branches | None = None  # set while the pipeline's call runs
        self._generation: Generation | None = None  # set from the first call of the transformer on
        self._site_plans: SitePlans = ()  # of the running call
        self._stats: Stats | None = None  # of the latest generation
        self._interception = Interception(model, self._around)
        self._call_wrappers: list[CallWrapper] = []
        self._changes, self._copies = Changes(), Copies(_MARK)
        warn_of_wide_bands(plan)
        warn_of_derived(plan)
        warn_of_other_weights(plan, model)
        try:
            self._install()
        except BaseException:
            self._changes.undo()
            raise

    def _install(self) -> None:
        """Put everything on the pipeline: first what `run_on` finds the run by, which is also the last to be taken off.

        Raises:
            AlreadyApplied: it has a plan, or its transformer has one, or a search runs on it.
            NotIntercepted: a module's processor cannot be wrapped.
        """
        pipe, changes = self._model.pipe, self._changes
        if not changes.claim(_carrier(pipe), _MARK, self):
            raise carries_plan()
        self._interception.install(changes)
        changes.record(self._unwrap_calls)
        self._wrap_calls()
        applied = _applied_class(self._pipeline_class, self)
        changes.record(self._copies.release, pipe, applied, self._pipeline_class)
        pipe.__class__ = applied

    def _require_target(self) -> None:
        """Check that the plan is for this model, and, unless it adapts, for this scheduler."""
        self.plan.require(target_of(self._model), scheduler=self.changes != "adapt")

    @property
    def on(self) -> bool:
        """Whether the plan is on the pipeline."""
        return run_on(self._own.pipe) is self

    def step(self, index: int) -> None:
        """Announce that a step of a custom model's loop begins, see `CustomRun`.

        Raises:
            ArrowheadError: it is a pipeline's run.
        """
        raise ArrowheadError(f"got step {index} in a pipeline's run, which counts by itself; leave it out")

    def _wrap_calls(self) -> None:
        """Count the transformer's calls."""
        for transformer, called in zip(self._model.transformers, self._model.called_transformers, strict=True):
            self._call_wrappers.append(CallWrapper(called, functools.partial(self._counted, transformer)))
            self._call_wrappers[-1].install()

    def _unwrap_calls(self) -> None:
        for wrapper in self._call_wrappers:
            wrapper.remove()
        self._call_wrappers.clear()

    def _counted(self, transformer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Count a call of the transformer, outside of what is compiled of it, and run it."""
        if self._tick(transformer, args, kwargs):
            return call(*args, **kwargs)
        generation, self._generation = self._generation, None  # the sites run as without a plan
        try:
            return call(*args, **kwargs)
        finally:
            self._generation = generation

    def _renew(self) -> None:
        """Stand around what has been compiled since the plan was applied, rather than within its graph."""
        self._interception.renew()
        self._unwrap_calls()
        self._wrap_calls()

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches hold now; 0 outside a generation."""
        return self._generation.held_bytes if self._generation else 0

    def summary(self) -> Summary:
        """What the latest generation computed, reused and skipped, from counters.

        Raises:
            ArrowheadError: there has been no generation yet.
        """
        if self._stats is None:
            raise ArrowheadError("nothing has been generated with this plan yet; call the pipeline first")
        return self._stats.summary(self._following.plan.steps)

    def close(self) -> None:
        """Take the plan off; the pipeline is as it was before `apply`. After an interruption this can be called again."""
        self._end()
        self._changes.undo()
        self._interception.warn_of_replaced()

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse to copy what carries a plan: the copy would refer to the original's run."""
        raise uncopied(f"{type(self._model.transformer).__name__} or its pipeline")

    def copy(self, pipe: Any) -> Any:
        """A shallow copy of the pipeline, or of a copy, which carries the plan, too."""
        return self._copies.copy(pipe, self._pipeline_class)

    @contextmanager
    def generating(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Surround one call of the pipeline, or of a copy: caches are empty when it starts and when it ends, also after an error.

        Raises:
            AlreadyGenerating: a call is going on, in another thread or around this one; that call goes on.
        """
        clock = StepClock()
        try:
            if self._take_turn(clock) is not clock:
                raise AlreadyGenerating(
                    f"got a call of {self._pipeline_class.__name__} while another one is going on, whose caches and scheduler "
                    "it would change; wanted one at a time; let that end first, or give each a pipeline of its own"
                )
            if begun := self.on:  # another thread may have taken the plan off meanwhile
                if pipe is not self._own.pipe:
                    self._model = self._following.model = replace(self._own, pipe=pipe)
                call = self._model.call_arguments(args, kwargs)
                self._begin(self._model.branches(call, follows=self.changes == "adapt"))
            yield
            if begun:
                self._account_for_every_site()
        finally:
            if self._step_clock is clock:
                self._end()

    def _take_turn(self, clock: StepClock) -> StepClock:
        """Begin a generation with this clock, if none is going on. Returns the clock of the generation that goes on then."""
        return self._turn.setdefault("clock", clock)  # one operation of a dict: of several threads one succeeds

    @property
    def _step_clock(self) -> StepClock | None:
        """The clock of the call that generates."""
        return self._turn.get("clock")

    def _begin(self, branches: Branches) -> None:
        if transformers_of(self._model.pipe) != self._model.transformers:
            raise PlanMismatch(
                "the pipeline's transformer was exchanged after the plan was applied; wanted the same one; remove the plan "
                "and apply it again"
            )
        require_no_conflicts(self._model.transformers)
        self._require_target()
        self._renew()
        self._stats, self._branches = Stats(branches.samples), branches
        replaced = self._interception.replaced()
        self._replaced = frozenset(replaced)
        if replaced:
            named = ", ".join(f"{path} by a {kind}" for path, kind in replaced.items())
            self._note(
                f"processors or forwards were replaced after the plan was applied, and may be full: {named}",
                "remove the plan, and apply it again after whatever replaces them, such as loading an IP-Adapter",
                ProcessorReplaced,
            )
        for different in other_guidance(self.plan, branches):
            self._note(*different)

    def _account_for_every_site(self) -> None:
        """Check, at the end of a generation, that every site ran under the plan, and warn of steps that are missing.

        Raises:
            NotIntercepted: a site was skipped.
        """
        if self._stats is not None and 0 < self._stats.steps < self._stats.looped + self._following.plan.steps:
            remedy = "let it run to its end, uninterrupted and with the plan on"
            self._note(self._unfinished(self._stats.steps), remedy, GenerationUnfinished)
        if self._generation is None:
            if self._stats is not None and self._stats.steps:  # the plan was taken off on the way
                return
            remedy = "call the pipeline so that it denoises, or remove the plan"
            self._note("the pipeline never called its transformer: nothing was compressed", remedy, SiteNotReached)
            return
        if self._stats is not None and self._stats.beside:
            self._say(f"{self._stats.beside} calls of the transformer beside the steps' own ran in full, and are not counted")
        generation = self._generation
        stats, missing = generation.stats, generation.branches.calls == 2 and generation.call == 0
        if missing and self.changes == "adapt":
            self._following.guidance_ends(generation.step)
            missing = False
        missed = self._require_passed(stats, stats.calls + missing)
        stats.count_missed_as_full(missed, generation.tokens)
        if missed:
            self._note(
                "not reached, so counted as full: " + ", ".join(f"{site.path} in {n} steps" for site, n in missed.items()),
                "remove the plan, and apply it again after whatever replaces processors",
                SiteNotReached,
            )

    def _require_passed(self, stats: Stats, calls: int) -> dict[Site, int]:
        """Check that every site was passed in each of so many calls, except sites that were replaced, of which a warning told.

        Returns the numbers of calls in which those were missed.

        Raises:
            NotIntercepted: another site was skipped.
        """
        if stats.passes == calls * len(self.plan.target.sites):
            return {}
        missed = stats.missed_calls(self.plan.target.sites, calls)
        if skipped := {site.path: n for site, n in missed.items() if site.path not in self._replaced}:
            (path, n), more = next(iter(skipped.items())), f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
            raise NotIntercepted(
                f"{path}{more}: got no call of it in {n} of the first {calls} calls of the transformer, wanted one in each; "
                "something else skips it, so that not the plan's cells were computed; take off what skips blocks or replaces "
                "forwards, such as another cache, or remove the plan"
            )
        return missed

    def _unfinished(self, steps: int) -> str:
        planned = self._following.plan.steps + (self._stats.looped if self._stats else 0)
        return f"a generation ended after {steps} of the plan's {planned} steps"

    def _say(self, what: str) -> None:
        """Keep a text for the summary."""
        if self._stats is not None:
            self._stats.notes.append(what)

    def _note(self, what: str, remedy: str, category: type[Warning]) -> None:
        """Warn, and keep the text for the summary."""
        self._say(what)
        warnings.warn(f"{what}; {remedy}", category, stacklevel=6)

    def _adapted(self, what: str, remedy: str, new: bool) -> None:
        """Say that the plan was carried over: in the summary always, by a warning where it is new."""
        if new:
            self._note(what, remedy, PlanAdapted)
        else:
            self._say(what)

    def _end(self) -> None:
        self._branches = self._generation = None
        self._model = self._following.model = self._own
        self._turn.clear()  # last: the next generation may begin

    def _tick(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Advance the generation by one call of the transformer. Returns False where the call is beside the plan.

        Calls from outside the pipeline run uncompressed.
        """
        branches, stats, clock = self._branches, self._stats, self._step_clock
        if branches is None or stats is None or clock is None:
            return True
        clock.require_same_thread(type(transformer).__name__)
        arguments = self._model.transformer_arguments(args, kwargs)
        if self._model.family.beside(arguments):
            stats.beside += 1
            return False
        tokens, latents = self._model.tokens(arguments), len(self._model.latents(arguments))
        generation, timesteps = self._generation, self._model.timesteps
        if generation is not None and generation.ends_with(self._following.plan.steps) and timesteps is not clock.timesteps:
            self._require_passed(stats, stats.calls)
            stats.looped, generation = stats.steps, None  # the pipeline runs another denoising loop
        if generation is None:
            clock.begin_loop(timesteps)
            self._following.begin(tokens, branches)
            self._inseparable = self._prepared.inseparable(self._following.plan)
            strict = self.changes == "refuse" and without_shared_text(self.plan) is not self.plan
            generation = Generation.begin(branches, tokens, self.kernel, stats, self.encoding, strict=strict)
        else:
            self._require_passed(stats, stats.calls)
            self._following.advance(generation, tokens, latents, branches, clock.counted)
        generation.latents = latents
        stats.steps += generation.call == 0
        clock.check(generation.step, generation.call, self._model.scheduler_step)
        if generation.step >= (steps := self._following.plan.steps):
            raise PlanMismatch(
                f"plan is for {steps} calls of the transformer, the pipeline makes more; search again with the same arguments"
            )
        if transformer is not self._model.transformer_at(generation.step):
            raise PlanMismatch(
                f"got step {generation.step} with another transformer than the scheduler's timesteps and the pipeline's "
                "boundary_ratio say; wanted diffusers' own loop; remove the plan"
            )
        stats.calls += 1
        self._site_plans = self._prepared.of(self._following.plan, tokens, generation.branches, self._inseparable)
        self._generation = generation
        return True

    def _around(self, call: SiteCall) -> Output:
        generation = self._generation
        if generation is None:  # LTX-2's guidance leaves out attention in a call beside the plan
            return call.original(*call.args, **call.kwargs)
        plan = self._site_plans[generation.step][call.site.path]
        return execute_stack(call, plan, generation) if isinstance(call, StackCall) else execute_site(call, plan, generation)


_MARK = "_arrowhead_run"
"""The attribute by which the run is found. It is on the pipeline, or on the custom model's module."""


def _carrier(pipe: Any) -> Any:
    """What has the mark."""
    pipe = pipe.transformer if isinstance(pipe, CustomModel) else pipe
    return uncompiled(pipe) if isinstance(pipe, nn.Module) else pipe


def run_on(pipe: Any) -> Run | None:
    """The run of the plan on a pipeline or a custom model, also where `apply` or `remove` was interrupted; None without."""
    run: Run | None = getattr(_carrier(pipe), "__dict__", {}).get(_MARK)
    return run


def carries_plan() -> AlreadyApplied:
    """The error of a pipeline that has a plan."""
    return AlreadyApplied("this pipeline carries a plan already; call arrowhead.remove(pipe) first")


def _applied_class(base: type, run: Run) -> type:
    """A subclass whose call begins and ends a generation of the run."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with run.generating(self, args, kwargs):
            return base.__call__(self, *args, **kwargs)

    return carrying_class(base, __call__, run)
