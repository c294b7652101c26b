"""`speedup`: a pipeline's first generation is watched, and those after it are compressed."""

import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arrowhead.calibration.driver import PipelineDriver
from arrowhead.calibration.isolation import exclusive_call, preserve_rng
from arrowhead.engine.changes import Changes
from arrowhead.engine.copies import Copies, carrying_class
from arrowhead.engine.install import SPEEDUP, has_speedup, put_on
from arrowhead.engine.run import Run, carries_plan, run_on
from arrowhead.engine.wrappers import uncopied
from arrowhead.errors import ArrowheadError, InputsInvalid, NothingLearnt, ProfileNotKept
from arrowhead.models.find import find
from arrowhead.plans.atomic_write import make_folder
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import PRESETS, Budget
from arrowhead.searches.settings import require_a
from arrowhead.searches.stack.api import solve_profile
from arrowhead.searches.stack.profile import Profile
from arrowhead.searches.stack.profile_cache import cached_path
from arrowhead.searches.stack.watch import watch
from arrowhead.upstream import execution_device

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def speedup(
    pipe: "DiffusionPipeline",
    times: float | None = None,
    *,
    quality: Literal["light", "balanced", "strong"] | None = None,
    budget: Budget | None = None,
    profile: Profile | str | Path | None = None,
    cache: bool = True,
) -> "Speedup":
    """Make a pipeline faster from the second generation on.

    The first generation runs in full, and is watched: it takes about 1.15 times as long as a plain one. A plan is solved from
    what was seen, and put on the pipeline. With a `profile` the first generation is compressed, too. `remove` takes the plan
    off.

    Args:
        pipe: a diffusers pipeline whose transformer is a plain chain of blocks.
        times: how much faster the transformer has to be, such as 2.0.
        quality: in place of it, the name of an error that is allowed: light 0.03, balanced 0.07, strong 0.15.
        budget: in place of these, a budget of the transformer's FLOPs, of a speedup or of an error.
        profile: what an earlier generation showed, see `arrowhead.profile`; or the name of a repository on the Hugging Face Hub
            that holds a profile, such as `org/name`; or a file, or a folder with one.
        cache: whether to keep what the first generation shows in a folder, and to use what is there for these weights, this
            scheduler and such a call. The folder is `ARROWHEAD_CACHE`, or the platform's folder for caches.

    Returns:
        The pipeline's speedup. `print` it for what was done. As a context manager it takes the plan off at the end.

    Raises:
        InputsInvalid: not one of times, quality and budget is given, or it is out of range.
        UnsupportedPipeline: the transformer is no plain chain of blocks; `arrowhead.search` finds plans for single sites.
        AlreadyApplied: the pipeline carries a plan.
        HubUnavailable: there is no such profile on the Hub, or it cannot be reached.
        PlanMismatch: the profile is of another model.

    Warns:
        NothingLearnt: nothing could be learnt from a generation, or nothing is as cheap as was asked for: it ran in full.
        ProfileNotKept: the folder of `cache` cannot be written. The pipeline becomes faster all the same.

    Examples:
        >>> ah.speedup(pipe, 2.0)
        >>> image = pipe("a cat").images[0]   # in full, and watched
        >>> image = pipe("a dog").images[0]   # twice as fast
        >>> ah.remove(pipe)
    """
    given = [value for value in (times, quality, budget) if value is not None]
    if len(given) != 1 or (quality is not None and quality not in PRESETS) or not isinstance(budget, Budget | None):
        raise InputsInvalid(
            f"got times={times!r}, quality={quality!r} and budget={budget!r}, wanted one of them: a number above 1, one of "
            f"{', '.join(PRESETS)}, or a Budget"
        )
    if budget is None:
        budget = Budget(speedup=times) if quality is None else Budget(error=PRESETS[quality])
    find(pipe, {"stack"})
    if run_on(pipe) is not None:
        raise carries_plan()
    if isinstance(profile, str | Path):
        profile = Profile.from_pretrained(profile)
    if profile is not None:
        require_a(Profile, profile, "profile")
    return Speedup(pipe, budget, profile, cache=cache)


class Speedup:
    """A pipeline that becomes faster, from `speedup` to `remove`.

    Attributes:
        plan: the plan that is on the pipeline; None before the first generation has ended.
        profile: what the first generation showed.
    """

    def __init__(self, pipe: "DiffusionPipeline", budget: Budget, profile: Profile | None, *, cache: bool) -> None:
        self.profile = profile
        self.plan: Plan | None = None
        self._pipe, self._base, self._budget, self._cache = pipe, type(pipe), budget, cache
        self._run: Run | None = None
        self._learns = profile is None  # whether the next generation is to be watched, or a kept profile looked for
        self._watching = False  # whether the first generation runs, in which the pipeline's class refuses other calls
        self._first_seconds: float | None = None  # of the watched generation, without what watching took
        self._seconds: float | None = None  # of the latest generation with the plan
        self._nothing = "nothing has been generated yet: the next generation runs in full, and is watched"
        self._changes, self._copies = Changes(), Copies(SPEEDUP)
        try:
            self._install()
            if profile is not None:
                self._compress(profile)
        except BaseException:
            self.close()
            raise

    def _install(self) -> None:
        pipe, base = self._pipe, self._base
        if not self._changes.claim(pipe, SPEEDUP, self):
            raise has_speedup()
        called = _sped_class(base, self)

        self._changes.record(self._copies.release, pipe, called, base)
        pipe.__class__ = called

    def copy(self, pipe: Any) -> Any:
        """A shallow copy of a pipeline that was watched, which is as fast.

        Raises:
            AlreadyApplied: it has yet to be watched, or is being watched.
        """
        if self._learns or self._watching:
            raise uncopied(type(pipe).__name__)
        return self._copies.copy(pipe, self._base)

    def close(self) -> None:
        """Take the plan off; the pipeline is as it was before `speedup`."""
        if self._run is not None and self._run.on:
            self._run.close()
        self._changes.undo()

    def __enter__(self) -> "Speedup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def called(self, pipe: Any, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the pipeline, or of a copy: the first one, before which there are no copies, is watched."""
        if self._learns:
            self._learns, self._watching = False, True
            try:
                return self._first(base, args, kwargs)
            except BaseException:
                self._learns = self._run is None  # a generation with a kept profile's plan may fail as any other
                raise
            finally:
                self._watching = False
        started = time.perf_counter()
        out = base.__call__(pipe, *args, **kwargs)
        if self._run is not None:  # the watched generation comes here, too
            self._seconds = time.perf_counter() - started
        return out

    def _first(self, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first generation: compressed by a profile that was kept, or else watched, with the result of an untouched one."""
        model = find(self._pipe, {"stack"})
        inputs = model.call_arguments(args, kwargs)
        kept = cached_path(model, inputs) if self._cache else None
        if kept is not None and os.path.exists(kept):  # Path.exists raises where a folder may not be read
            try:
                self._compress(Profile.load(kept))
            except InputsInvalid as error:
                self._tell(error, "this generation is watched, and the file is written anew")
            else:
                self._watching = False
                return self._pipe(*args, **kwargs)
        started, driver = time.perf_counter(), _FirstGeneration(self._pipe, inputs)
        try:
            watched = watch(driver)
        except ArrowheadError as error:
            self._learns = True
            ended = driver.result is not None  # it ended early, as the caller asked: the result is what a plain one gives
            self._tell(error, f"this generation ran {'in full' if ended else 'again without a plan'}; the next one is watched")
            if ended:
                return driver.result
            driver.rewind()
            return base.__call__(self._pipe, *args, **kwargs)
        self._first_seconds = time.perf_counter() - started - watched.extra_seconds
        if kept is not None:
            _keep(watched.profile, kept)
        self._compress(watched.profile)
        return driver.result

    def _compress(self, profile: Profile) -> None:
        """Put the plan for the budget on the pipeline; warn where nothing is as cheap."""
        self.profile = profile
        try:
            plan = solve_profile(profile, self._budget)
        except InputsInvalid as error:
            self._tell(error, "the pipeline runs in full; take the speedup off, and ask for less")
            return
        self._run = put_on(self._pipe, plan)
        self.plan = plan

    def _tell(self, error: ArrowheadError, what: str) -> None:
        self._nothing = f"no plan: {error}; {what}"
        warnings.warn(f"no plan was put on the pipeline: {error}; {what}", NothingLearnt, stacklevel=5)

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse to copy a pipeline that is to be watched: the copy's calls would be taken for the original's."""
        raise uncopied(type(self._pipe).__name__)

    def __str__(self) -> str:
        """What the latest generation did, by its counters; before one, what the next will do, or why there is no plan."""
        if self.plan is None or self._run is None or self.profile is None:
            return self._nothing
        plan, known, error = self.plan, self.profile, f"expected error {self.plan.about['search']['predicted_error']}"
        counted = None if self._seconds is None else self._run.summary()
        if counted is None or self._seconds is None or not counted.cells.total():
            before = "" if self._first_seconds is None else "watched in full; "
            if counted is not None:
                before = "the latest generation ended before its first step; "
            return f"{before}from the next generation on {_done(plan.steps, plan.steps, plan.count(), known)}; {error}"
        said = _done(counted.steps, counted.planned_steps, counted.cells, known)
        if counted.steps != plan.steps:
            error += f" in {plan.steps} steps"
        elif self._first_seconds is not None:
            said += f", {self._first_seconds / self._seconds:.1f} × faster than the first generation"
        return f"{said}; {error}"


def _keep(profile: Profile, file: Path) -> None:
    """Write a profile for other processes; warn where it cannot be written."""
    try:
        make_folder(file.parent)
        profile.save(file)
    except (OSError, InputsInvalid) as error:  # or the run has too many steps for a file
        warnings.warn(
            f"the profile was not kept: {error}; set ARROWHEAD_CACHE to a folder that can be written, or pass cache=False",
            ProfileNotKept,
            stacklevel=5,
        )


def _done(steps: int, planned: int, cells: Counter[str], known: Profile) -> str:
    """The steps, how many are computed, and the part of the transformer's FLOPs, from counts of the stack's cells."""
    part = cells["full"] / cells.total()
    ran = f"{steps} steps" if steps == planned else f"{steps} of {planned} steps"
    return f"{ran}, {round(part * steps)} computed, {part + (1 - part) * known.skipped_flops:.0%} of the FLOPs"


class _FirstGeneration(PipelineDriver):
    """Drives the user's own call of the pipeline, whose result is theirs, and whose generators go on as in any call."""

    wants_result = True

    def __init__(self, pipe: Any, inputs: dict[str, Any]) -> None:
        super().__init__(pipe, inputs)
        self.result: Any = None
        self._states = Changes()
        preserve_rng(inputs.get("generator"), execution_device(pipe), self._states)

    def rewind(self) -> None:
        """Set the random states back to those before the call."""
        self._states.undo()

    def prepare(self, changes: Changes) -> Any:
        """Any other call of the pipeline is refused."""
        call = exclusive_call(self.pipe, changes)

        def generate() -> Any:
            self.result = call(**self._inputs)
            return self.result

        return generate


def _sped_class(base: type, owner: Speedup) -> type:
    """A subclass whose calls the speedup answers."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return owner.called(self, base, args, kwargs)

    return carrying_class(base, __call__, owner)
