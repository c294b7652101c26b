"""A plan on a custom model, whose sampler is any loop: the model's calls, or the loop's own words, tell the steps."""

import functools
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from torch import nn

from arrowhead.engine.cache import Output
from arrowhead.engine.cache_encoding import NATIVE, CacheEncoding
from arrowhead.engine.circumstances import Adaptation
from arrowhead.engine.compile_boundary import compiling, never_compiled, outside_graph
from arrowhead.engine.forward_hooks import RunForward, is_reached, replace_forward
from arrowhead.engine.loop_checks import BranchCheck, LoopTimes, numbers_of
from arrowhead.engine.run import Run
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.step_clock import StepClock
from arrowhead.errors import GenerationUnfinished, PlanMismatch
from arrowhead.models.model import Model
from arrowhead.plans.layout import Branches
from arrowhead.plans.plan import Plan


class _State(Enum):
    """Where a custom model is between two calls of it, and during them."""

    IDLE = auto()
    """No generation is going on: the next call of the model begins one."""
    IN_LOOP = auto()
    """A call of the model began a generation. It ends with the plan's last step, with an error, or with `step(0)`."""
    IN_CALL = auto()
    """A generation is going on within one call that generates (a search's, or an evaluation's), and ends with that call."""


class CustomRun(Run):
    """A plan on a custom model, from `apply` to `remove`.

    Every call of the model is a step, or half a step where the CFG branches come in two calls. Calls of `model.forward` count
    too. After the plan's last step the next call begins another generation; `step(0)` begins one at any time. Unless the loop
    announces its steps, the timesteps among the calls' arguments say whether one generation is taken for another.
    """

    def __init__(
        self, model: Model, plan: Plan, kernel: str, encoding: CacheEncoding = NATIVE, changes: Adaptation = "adapt"
    ) -> None:
        self._state = _State.IDLE
        self._announced: int | None = None  # the latest argument of `step`
        self._forward_counted = False  # while a call of the model is counted, and its forward has not begun
        self._in_call = False
        self._times = LoopTimes()
        self._branch_check: BranchCheck | None = None  # of the generation that is going on
        super().__init__(model, plan, kernel, encoding, changes)

    def _install(self) -> None:
        super()._install()
        self._wrap_forward()

    def step(self, index: int) -> None:
        """Announce that the loop begins a step, so that a generation that ended early is noticed. The first step is 0.

        Raises:
            PlanMismatch: it is not the plan's next step.
        """
        if self._in_call and (clock := self._step_clock) is not None:
            clock.require_same_thread(self._model.family.name)
        if index == 0:
            self._renew()
            unfinished = self._unfinished_steps
            self._end()
            self._times = LoopTimes()
            self._warn_of(unfinished)
        elif index != self._steps_done or index >= self.plan.steps:
            raise PlanMismatch(
                f"got step {index} after {self._steps_done} whole steps of a plan of {self.plan.steps}; wanted its steps in "
                f"turn, each with every call of the {self._model.family.name} that belongs to it; begin again with step(0), or "
                "search again in this loop"
            )
        self._announced = index

    @property
    def _steps_done(self) -> int:
        """Whole steps of the generation that is going on."""
        if self._generation is None:
            return 0
        return self._generation.step + (self._generation.call + 1 == self._generation.branches.calls)

    @property
    def _unfinished_steps(self) -> int | None:
        """Whole steps of a loop's generation that would be left unfinished now; None where there is no such generation."""
        return self._steps_done if self._state is _State.IN_LOOP else None

    def close(self) -> None:
        """Take the plan off. The model is as it was before `apply`."""
        unfinished = self._unfinished_steps
        super().close()
        self._warn_of(unfinished)

    def _wrap_forward(self) -> None:
        """Count calls of the model's forward that are not part of a call of the model."""
        transformer = self._model.transformer
        own = transformer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._forward_counted and (compiling() or self._take_turn(StepClock()).is_here):
                if not compiling():
                    self._forward_counted = False  # another call, within this one, is counted
                return own(*args, **kwargs)
            counted = outside_graph(self._counted) if compiling() else self._counted
            return counted(transformer, own, *args, **kwargs)

        self._forward = RunForward(forward)
        functools.update_wrapper(self._forward, own)
        self._forward.arrowhead_run = self
        replace_forward(transformer, self._forward, self._changes)

    def _counted(self, transformer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._take_turn(StepClock()).require_same_thread(self._model.family.name)
        before, self._in_call = self._in_call, True
        try:
            never_compiled(self._tick)(transformer, args, kwargs)
            self._forward_counted = True
            out = call(*args, **kwargs)
            if self._unfinished_steps == self.plan.steps:
                self._account_for_every_site()
                self._times.end()
                self._end()
        except BaseException:
            self._end()
            self._times = LoopTimes()
            raise
        finally:
            self._forward_counted, self._in_call = False, before
        return out

    def _around(self, call: SiteCall) -> Output:
        if self._generation is None and not is_reached(self._model.transformer, self._forward):
            raise PlanMismatch(
                f"the forward of the {self._model.family.name} was replaced after the plan was applied, so its steps cannot be "
                "counted; wanted it as it was, or with hooks around it; call close() of the run, and apply the plan again"
            )
        return super()._around(call)

    def _begin(self, branches: Branches) -> None:
        super()._begin(branches)
        self._state = _State.IN_CALL
        self._branch_check = BranchCheck(branches)

    def _tick(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self._state is _State.IDLE:
            if self._announced:
                raise PlanMismatch(f"got a call of the model after the last one of step {self._announced}; say step(0) first")
            if self._announced is None:
                self._times.require_start(numbers_of(self._model.transformer_arguments(args, kwargs)), self.plan.steps)
            self._begin(self._model.branches({}))
            self._state = _State.IN_LOOP
        planned = super()._tick(module, args, kwargs)
        self._check_call(args, kwargs)
        generation = self._generation if self._state is _State.IN_LOOP else None
        if generation is not None and self._announced is not None and generation.step != self._announced:
            calls = generation.branches.calls
            raise PlanMismatch(
                f"got more than {calls} calls of the model in step {self._announced}, wanted {calls} in each step; call "
                "run.step(i) where a step begins"
            )
        return planned

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check that a call has the CFG branches that the adapter says, and is of the generation that is going on."""
        if (generation := self._generation) is None or self._branch_check is None:
            return
        arguments = self._model.transformer_arguments(args, kwargs)
        numbers = numbers_of(arguments)
        self._branch_check.check(generation.step, generation.call, self._model.latents(arguments), numbers)
        if self._state is _State.IN_LOOP and self._announced is None and generation.call == 0:
            self._times.note(numbers, self.plan.steps)

    def _account_for_every_site(self) -> None:
        if self._generation is not None and self._steps_done != self.plan.steps:
            raise PlanMismatch(
                f"plan is for {self.plan.steps} steps, the loop ran {self._steps_done}; search again in this loop"
            )
        super()._account_for_every_site()

    def _warn_of(self, unfinished: int | None) -> None:
        """Warn of a loop's generation that ended after so many whole steps, if there was one."""
        if unfinished is not None:
            remedy = "search again with as many steps as the loop has"
            self._note(self._unfinished(unfinished), remedy, GenerationUnfinished)

    def _end(self) -> None:
        self._state, self._branch_check = _State.IDLE, None
        super()._end()
