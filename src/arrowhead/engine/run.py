"""A plan on a pipeline: its step follows the denoising loop, its caches are emptied around every generation."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from arrowhead.engine.cache import Output
from arrowhead.engine.cache_encoding import NATIVE, CacheEncoding
from arrowhead.engine.compile_boundary import CallWrapper
from arrowhead.engine.execute_site import execute_site
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.site_plan import SitePlan, prepare
from arrowhead.engine.stats import Stats, Summary
from arrowhead.engine.step_clock import StepClock
from arrowhead.engine.wrappers import Interception, uncopied
from arrowhead.errors import (
    AlreadyGenerating,
    ArrowheadError,
    BandCoversAll,
    GenerationUnfinished,
    GuidanceMissing,
    GuidanceNotPlanned,
    PlanDerived,
    PlanMismatch,
    ProcessorReplaced,
    ShareCfgIgnored,
    SiteNotReached,
)
from arrowhead.kernels import dispatch
from arrowhead.models.conflicts import require_no_conflicts
from arrowhead.models.head_separation import can_project_heads_separately
from arrowhead.models.model import Model, target_of, transformers_of
from arrowhead.plans import masks
from arrowhead.plans.cells import Arrow, Attend, Cached, radius_sort_key
from arrowhead.plans.foreign_text import visible
from arrowhead.plans.layout import Branches, Tokens
from arrowhead.plans.lifetimes import lifetimes
from arrowhead.plans.plan import Plan
from arrowhead.upstream import uncompiled


class Run:
    """A plan on a pipeline, from `apply` to `remove`. Owns the caches and counters of the generation that is going on."""

    def __init__(self, model: Model, plan: Plan, kernel: str, encoding: CacheEncoding = NATIVE) -> None:
        self.plan = plan
        self.kernel = dispatch.require_kernel(kernel)
        self.encoding = encoding
        self._model = model
        self._pipeline_class = type(model.pipe)
        plan.require(target_of(model))
        self._writes = tuple(map(lifetimes, plan.columns))
        self._prepared: dict[Any, tuple[dict[str, SitePlan], ...]] = {}  # by step and path, for each kind of generation
        self._branches: Branches | None = None  # set while the pipeline's call runs
        self._generation: Generation | None = None  # set from the first call of the transformer on
        self._site_plans: tuple[dict[str, SitePlan], ...] = ()  # set as the generation is
        self._step_clock: StepClock | None = None  # set as the branches are
        self._stats: Stats | None = None  # of the latest generation
        self.on = True  # until it is closed
        _warn_of_wide_bands(plan)
        _warn_of_derived(plan)
        self._interception = Interception(model.site_modules, self._around, model.forwards)
        self._call_wrappers = self._wrap_calls()
        model.pipe.__class__ = _applied_class(self._pipeline_class, self)

    def step(self, index: int) -> None:
        """Announce that a step of a custom model's loop begins, see `CustomRun`.

        Raises:
            ArrowheadError: it is a pipeline's run.
        """
        raise ArrowheadError(f"got step {index} in a pipeline's run, which counts by itself; leave it out")

    def _wrap_calls(self) -> ExitStack:
        """Count the transformer's calls, until the stack is closed."""
        wrappers = ExitStack()
        for transformer, called in zip(self._model.transformers, self._model.called_transformers, strict=True):
            wrappers.callback(CallWrapper(called, functools.partial(self._counted, transformer)).remove)
        return wrappers

    def _counted(self, transformer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Count a call of the transformer, outside of what is compiled of it, and run it."""
        self._tick(transformer, args, kwargs)
        return call(*args, **kwargs)

    def _renew(self) -> None:
        """Stand around what has been compiled since the plan was applied, rather than within its graph."""
        self._interception.renew()
        self._call_wrappers.close()
        self._call_wrappers = self._wrap_calls()

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
        return self._stats.summary(self.plan.steps)

    def close(self) -> None:
        """Take the plan off; the pipeline is as it was before `apply`."""
        self._end()
        self.on = False
        self._call_wrappers.close()
        self._model.pipe.__class__ = self._pipeline_class
        self._interception.remove()

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse to copy what carries a plan: the copy would refer to the original's run."""
        raise uncopied(f"{type(self._model.transformer).__name__} or its pipeline")

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Surround one call of the pipeline: caches are empty when it starts and when it ends, also after an error.

        Raises:
            AlreadyGenerating: a call is going on, in another thread or around this one; that call goes on.
        """
        if self._branches is not None:
            raise AlreadyGenerating(
                f"got a call of {self._pipeline_class.__name__} while another one is going on, whose caches and scheduler it "
                "would change; wanted one at a time; let that end first, or give each a pipeline of its own"
            )
        try:
            self._begin(self._model.branches(self._model.call_arguments(args, kwargs)))
            yield
            self._account_for_every_site()
        finally:
            self._end()

    def _begin(self, branches: Branches) -> None:
        self._end()
        if transformers_of(self._model.pipe) != self._model.transformers:
            raise PlanMismatch(
                "the pipeline's transformer was exchanged after the plan was applied; wanted the same one; remove the plan "
                "and apply it again"
            )
        require_no_conflicts(self._model.transformers)
        self.plan.require(target_of(self._model))
        self._renew()
        self._stats, self._branches = Stats(branches.samples, branches.calls), branches
        self._step_clock = StepClock()
        if replaced := self._interception.replaced():
            self._note(
                f"processors or forwards were replaced after the plan was applied, and may be full: {', '.join(replaced)}",
                "remove the plan, and apply it again after whatever replaces them; an IP-Adapter goes with no plan",
                ProcessorReplaced,
            )
        if not branches.guided and any(getattr(cell, "share_cfg", False) for row in self.plan.cells for cell in row):
            self._note(
                "guidance is off, so there is one CFG branch and nothing to share",
                "search again without guidance for a plan of its own",
                ShareCfgIgnored,
            )
        elif self.plan.guided and not branches.guided:
            self._note(
                "guidance is off, and the plan was made with guidance, by whose errors it was chosen",
                "search again without guidance for a plan of its own",
                GuidanceMissing,
            )
        if branches.guided and not self.plan.guided:
            self._note(
                "guidance is on, and the plan was made without guidance, which multiplies the plan's errors",
                "search again with guidance for a plan that fits",
                GuidanceNotPlanned,
            )

    def _account_for_every_site(self) -> None:
        """Warn, at the end of a generation, of sites that did not run under the plan, and of steps that are missing."""
        if self._stats is not None and 0 < self._stats.steps < self.plan.steps:
            remedy = "let it run to its end, uninterrupted and with the plan on"
            self._note(self._unfinished(self._stats.steps), remedy, GenerationUnfinished)
        if self._generation is None:
            if self._stats is not None and self._stats.steps:  # the plan was taken off on the way
                return
            remedy = "call the pipeline so that it denoises, or remove the plan"
            self._note("the pipeline never called its transformer: nothing was compressed", remedy, SiteNotReached)
            return
        stats, tokens = self._generation.stats, self._generation.tokens
        missed = stats.count_missed_as_full(self.plan.target.sites, tokens)
        if missed:
            self._note(
                "not reached, so counted as full: " + ", ".join(f"{path} in {n} steps" for path, n in missed.items()),
                "remove the plan, and apply it again after whatever replaces processors or skips blocks",
                SiteNotReached,
            )

    def _unfinished(self, steps: int) -> str:
        return f"a generation ended after {steps} of the plan's {self.plan.steps} steps"

    def _note(self, what: str, remedy: str, category: type[Warning]) -> None:
        """Warn, and keep the text for the summary."""
        if self._stats is not None:
            self._stats.notes.append(what)
        warnings.warn(f"{what}; {remedy}", category, stacklevel=6)

    def _end(self) -> None:
        self._branches = self._generation = self._step_clock = None

    def _tick(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Advance the generation by one call of the transformer. Calls from outside the pipeline run uncompressed."""
        if self._branches is None or self._stats is None or self._step_clock is None:
            return
        self._step_clock.require_same_thread(type(transformer).__name__)
        tokens = self._model.tokens(self._model.transformer_arguments(args, kwargs))
        generation = self._generation
        if generation is None:
            self.plan.require_call(self._model.steps, tokens, self._branches.calls, self._model.switch)
            generation = Generation.begin(self._branches, tokens, self.kernel, self._stats, self.encoding)
            self._generation, self._site_plans = generation, self._prepare(tokens, self._branches)
        else:
            generation.advance(tokens)
        self._stats.steps += generation.call == 0
        self._step_clock.check(generation.step, generation.call, self._model.scheduler_step)
        if generation.step >= self.plan.steps:
            raise PlanMismatch(
                f"plan is for {self.plan.steps} calls of the transformer, the pipeline makes more; search again with the "
                "same arguments"
            )
        if transformer is not self._model.transformer_at(generation.step):
            raise PlanMismatch(
                f"got step {generation.step} with another transformer than the scheduler's timesteps and the pipeline's "
                "boundary_ratio say; wanted diffusers' own loop; remove the plan"
            )

    def _prepare(self, tokens: Tokens, branches: Branches) -> tuple[dict[str, SitePlan], ...]:
        """The site plans of every step, by the site's path. Generations that are alike share them.

        The modules are asked once in a generation whether heads can be projected separately, as a LoRA may have been loaded.
        """
        switch, inseparable = self._model.switch, self._inseparable()
        key = tokens, branches, switch, inseparable
        if key not in self._prepared:
            self._prepared[key] = tuple(
                {
                    site.path: prepare(
                        site,
                        cell,
                        writes[step],
                        tokens,
                        branches,
                        separable=(switch is not None and step >= switch, site.path) not in inseparable,
                    )
                    for site, cell, writes in zip(self.plan.target.sites, cells, self._writes, strict=True)
                }
                for step, cells in enumerate(self.plan.cells)
            )
        return self._prepared[key]

    def _inseparable(self) -> frozenset[tuple[bool, str]]:
        """The paths of sites with cached heads that have to project all heads, with True for the second transformer."""
        caching = [
            site
            for site, column in zip(self.plan.target.sites, self.plan.columns, strict=True)
            if any(isinstance(cell, Attend) and Cached() in cell.methods(site.heads) for cell in column)
        ]
        return frozenset(
            (later > 0, site.path)
            for later, transformer in enumerate(self._model.transformers)
            for site in caching
            if not can_project_heads_separately(uncompiled(transformer.get_submodule(site.path)))
        )

    def _around(self, call: SiteCall) -> Output:
        generation = self._generation
        if generation is None:
            return call.native()
        return execute_site(call, self._site_plans[generation.step][call.site.path], generation)


def _applied_class(base: type, run: Run) -> type:
    """A subclass whose call begins and ends a generation of the run; Python looks `__call__` up on the class alone."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with run.generating(args, kwargs):
            return base.__call__(self, *args, **kwargs)

    __call__.__wrapped__ = base.__call__  # type: ignore[attr-defined]  # inspect.signature follows it
    members = {"__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__, "_arrowhead_run": run}
    members["__reduce_ex__"] = lambda _, protocol: run.__reduce_ex__(protocol)
    return type(base.__name__, (base,), members)


def _warn_of_wide_bands(plan: Plan) -> None:
    for site, column in zip(plan.target.sites, plan.columns, strict=True):
        own = site.tokens(plan.tokens)
        methods = {method for cell in column if isinstance(cell, Attend) for method in cell.methods(1)}
        radii = sorted({m.radius for m in methods if isinstance(m, Arrow)}, key=radius_sort_key)
        if wide := [radius for radius in radii if masks.covers(own, radius)]:
            warnings.warn(
                f"the plan has a band of radius {wide[0]} over {own.visual} visual tokens; a narrower one would save work, "
                "this one is full attention",
                BandCoversAll,
                stacklevel=4,
            )
            return


def _warn_of_derived(plan: Plan) -> None:
    if changes := plan.about.get("derived"):
        said = "; then ".join(", ".join(f"{name} {what}" for name, what in change.items()) for change in changes)
        warnings.warn(
            f"the plan was not found for these circumstances, but derived: {visible(said)}; search again for one of its own, "
            "or look at what it does",
            PlanDerived,
            stacklevel=4,
        )
