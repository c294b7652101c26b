"""A plan meets a pipeline: put on, kept in step with the denoising loop, reset around every generation, taken off."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from arrowhead.attend import Generation, attend
from arrowhead.cache import Output
from arrowhead.errors import AlreadyApplied, ArrowheadError, BandCoversAll, PlanMismatch, ShareCfgIgnored, SiteNotReached
from arrowhead.intercept import Interception, SiteCall
from arrowhead.kernels import dispatch, masks
from arrowhead.layout import Branches
from arrowhead.lifetimes import lifetimes
from arrowhead.methods import Arrow, Attend, breadth
from arrowhead.models import Model, find
from arrowhead.plan import Plan, Target
from arrowhead.tally import Summary, Tally

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def target_of(model: Model) -> Target:
    """What a plan for this pipeline is bound to: transformer class, scheduler with its settings, sites."""
    scheduler = model.pipe.scheduler
    # as JSON holds it, and without what diffusers adds of its own
    config = {name: plain(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    return Target(model.family.transformer, type(scheduler).__name__, config, model.sites)


class Run:
    """A plan on a pipeline, from `apply` to `remove`. Owns the caches and counters of the generation that is going on."""

    def __init__(self, model: Model, plan: Plan, kernel: str) -> None:
        self.plan = plan
        self.kernel = dispatch.known(kernel)
        self._model = model
        self._pipeline_class = type(model.pipe)
        plan.require(target_of(model))
        self._writes = {s.path: lifetimes(c) for s, c in zip(plan.target.sites, plan.columns, strict=True)}
        self._row = {site.path: i for i, site in enumerate(plan.target.sites)}
        self._branches: Branches | None = None  # set while the pipeline's call runs
        self._generation: Generation | None = None  # set from the first call of the transformer on
        self._tally: Tally | None = None  # of the latest generation
        _warn_of_wide_bands(plan)
        self._interception = Interception(model.modules, self._around)
        self._clock = model.transformer.register_forward_pre_hook(self._tick, with_kwargs=True, prepend=True)
        model.pipe.__class__ = _applied_class(self._pipeline_class, self)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches hold now; 0 outside a generation."""
        return self._generation.held_bytes if self._generation else 0

    def summary(self) -> Summary:
        """What the latest generation computed, reused and skipped, from counters.

        Raises:
            ArrowheadError: there has been no generation yet.
        """
        if self._tally is None:
            raise ArrowheadError("nothing has been generated with this plan yet; call the pipeline first")
        return self._tally.summary(self.plan.steps)

    def close(self) -> None:
        """Take the plan off; the pipeline is as it was before `apply`."""
        self._end()
        self._clock.remove()
        self._model.pipe.__class__ = self._pipeline_class
        self._interception.remove()

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Around one call of the pipeline: caches are empty when it starts and when it ends, however it ends."""
        self._end()
        if self._model.pipe.transformer is not self._model.transformer:
            raise PlanMismatch(
                "the pipeline's transformer was exchanged after the plan was applied; wanted the same one; remove the plan "
                "and apply it again"
            )
        self.plan.require(target_of(self._model))
        branches = self._model.branches(self._model.call_arguments(args, kwargs))
        self._tally, self._branches = Tally(branches.samples, branches.calls), branches
        try:
            if not branches.guided and any(getattr(cell, "share_cfg", False) for row in self.plan.cells for cell in row):
                self._note(
                    "guidance is off, so there is one CFG branch and nothing to share",
                    "search again without guidance for a plan of its own",
                    ShareCfgIgnored,
                )
            yield
            self._account_for_every_site()
        finally:
            self._end()

    def _account_for_every_site(self) -> None:
        """At the end of a generation: which sites ran without arrowhead, or not at all."""
        if self._generation is None:
            remedy = "call the pipeline so that it denoises, or remove the plan"
            self._note("the pipeline never called its transformer: nothing was compressed", remedy, SiteNotReached)
            return
        tally, tokens = self._generation.tally, self._generation.tokens
        missed = {site.path: n for site in self.plan.target.sites if (n := tally.count_missed_as_full(site, tokens))}
        if missed:
            self._note(
                "not reached, so counted as full: " + ", ".join(f"{path} in {n} steps" for path, n in missed.items()),
                "remove the plan, and apply it again after whatever replaces processors or skips blocks",
                SiteNotReached,
            )

    def _note(self, what: str, remedy: str, category: type[Warning]) -> None:
        """Say it now, as a warning, and once more in the summary."""
        if self._tally is not None:
            self._tally.notes.append(what)
        warnings.warn(f"{what}; {remedy}", category, stacklevel=6)

    def _end(self) -> None:
        self._branches = self._generation = None

    def _tick(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each call of the transformer: the step clock. Calls from outside the pipeline run uncompressed."""
        if self._branches is None or self._tally is None:
            return
        tokens = self._model.tokens(self._model.transformer_arguments(args, kwargs))
        if self._generation is None:
            self.plan.require_call(self._model.steps, tokens, self._branches.calls)
            self._generation = Generation.begin(self._branches, tokens, self.kernel, self._tally)
        else:
            self._generation.advance(tokens)
        self._generation.tally.steps += self._generation.call == 0
        if self._generation.step >= self.plan.steps:
            raise PlanMismatch(
                f"plan is for {self.plan.steps} calls of the transformer, the pipeline makes more; search again with the "
                "same arguments"
            )

    def _around(self, call: SiteCall) -> Output:
        generation = self._generation
        if generation is None:
            return call.run(lambda attention: attention.native())
        step, site = generation.step, call.site
        return attend(call, self.plan.cells[step][self._row[site.path]], self._writes[site.path][step], generation)


def apply(pipe: "DiffusionPipeline", plan: Plan, *, kernel: str = "auto") -> Run:
    """Put a plan on a pipeline. Generations that follow are compressed, until `remove`.

    `kernel` is `auto`, or the name of the kernel that has to run the bands.

    Raises:
        UnsupportedPipeline: no attention sites are known for this pipeline.
        PlanMismatch: the plan was made for something else; the message names every difference.
        AlreadyApplied: the pipeline carries a plan.
        KernelUnavailable: there is no such kernel here.
    """
    if _run_on(pipe):
        raise AlreadyApplied("this pipeline carries a plan already; call arrowhead.remove(pipe) first")
    sites = plan.target.sites
    return Run(find(pipe, {site.kind for site in sites}).beside(sites), plan, kernel)


def remove(pipe: "DiffusionPipeline") -> None:
    """Take the plan off a pipeline, which is then exactly as before.

    Raises:
        ArrowheadError: it carries none.
    """
    run = _run_on(pipe)
    if run is None:
        raise ArrowheadError("this pipeline carries no plan; apply one with arrowhead.apply(pipe, plan)")
    run.close()


@contextmanager
def applied(pipe: "DiffusionPipeline", plan: Plan, *, kernel: str = "auto") -> Iterator[Run]:
    """`apply` for the length of a `with` block. Raises what `apply` raises."""
    run = apply(pipe, plan, kernel=kernel)
    try:
        yield run
    finally:
        if _run_on(pipe) is run:
            run.close()


def _run_on(pipe: "DiffusionPipeline") -> Run | None:
    return getattr(type(pipe), "_arrowhead_run", None)


def _applied_class(base: type, run: Run) -> type:
    """A subclass whose call tells the run of every generation; Python looks `__call__` up on the class alone."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with run.generating(args, kwargs):
            return base.__call__(self, *args, **kwargs)

    __call__.__wrapped__ = base.__call__  # type: ignore[attr-defined]  # inspect.signature follows it
    members = {"__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__, "_arrowhead_run": run}
    return type(base.__name__, (base,), members)


def _warn_of_wide_bands(plan: Plan) -> None:
    cells = (cell for row in plan.cells for cell in row if isinstance(cell, Attend))
    methods = {method for cell in cells for method in cell.methods(1)}
    radii = sorted({m.radius for m in methods if isinstance(m, Arrow)}, key=breadth)
    wide = [radius for radius in radii if masks.covers(plan.tokens, radius)]
    if wide:
        warnings.warn(
            f"the plan has a band of radius {wide[0]} over {plan.tokens.visual} visual tokens; a narrower one would save work, "
            "this one is full attention",
            BandCoversAll,
            stacklevel=4,
        )


def plain(value: Any) -> Any:
    """A setting as JSON can hold it and read it back: lists for arrays, text for what is not finite or not a value."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value if isinstance(value, str | int | float | bool | None) else str(value)
