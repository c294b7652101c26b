"""A plan on a module of one's own, whose steps its calls say."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from arrowhead.engine.cache import Output
from arrowhead.engine.cache_encoding import NATIVE, CacheEncoding
from arrowhead.engine.compile_boundary import compiling, outside_graph
from arrowhead.engine.forward_hooks import RunForward, is_reached, replace_forward, restore_forward
from arrowhead.engine.run import Run
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import GenerationUnfinished, PlanMismatch
from arrowhead.models.model import Model
from arrowhead.plans.plan import Plan


class CustomRun(Run):
    """A plan on a module of one's own, from `apply` to `remove`.

    Every call of the module is a step, or half of one where the CFG branches come in two calls, whether it is called as such
    or by its forward. After the plan's steps the next call begins another generation, as `step(0)` does at any time.
    """

    def __init__(self, model: Model, plan: Plan, kernel: str, encoding: CacheEncoding = NATIVE) -> None:
        self._said: int | None = None  # the step that the loop says it is at
        self._looping = False  # in a loop's generation, which no call of a pipeline surrounds
        self._counting = False  # in a call of the model that has been counted, before that of its forward
        super().__init__(model, plan, kernel, encoding)
        self._replaced = self._called_directly()

    def step(self, index: int) -> None:
        """Say that a step of the loop begins, so that one that was left in the middle is noticed. The first is 0.

        Raises:
            PlanMismatch: it is not the plan's next step.
        """
        if index == 0:
            self._renew()
            unfinished = self._done if self._looping else None
            self._end()
            self._warn_of(unfinished)
        elif index != self._done or index >= self.plan.steps:
            raise PlanMismatch(
                f"got step {index} after {self._done} whole steps of a plan of {self.plan.steps}; wanted its steps in turn, "
                f"each with every call of the {self._model.family.name} that belongs to it; begin again with step(0), or "
                "search again in this loop"
            )
        self._said = index

    @property
    def _done(self) -> int:
        """Whole steps of the generation that is going on."""
        if self._generation is None:
            return 0
        return self._generation.step + (self._generation.call + 1 == self._generation.branches.calls)

    def close(self) -> None:
        """Take the plan off; the module is as it was before `apply`."""
        unfinished = self._done if self._looping else None
        self._replaced.close()
        super().close()
        self._warn_of(unfinished)

    def _called_directly(self) -> ExitStack:
        """Calls of the model's forward, around which nothing can be, are counted within."""
        own, replaced = self._model.transformer.forward, ExitStack()

        def forward(*args: Any, **kwargs: Any) -> Any:
            if compiling():
                if self._counting:
                    return own(*args, **kwargs)
                return outside_graph(self._counted)(self._model.transformer, own, *args, **kwargs)
            if self._counting:
                self._counting = False  # by this call
                return own(*args, **kwargs)
            return self._counted(self._model.transformer, own, *args, **kwargs)

        self._forward = RunForward(forward)
        functools.update_wrapper(self._forward, own)
        self._forward.arrowhead_run = self
        before = replace_forward(self._model.transformer, self._forward)
        replaced.callback(restore_forward, self._model.transformer, self._forward, before)
        return replaced

    def _counted(self, transformer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._step_clock is not None:
            self._step_clock.require_same_thread(self._model.family.name)
        try:
            self._tick(transformer, args, kwargs)
            self._counting = True
            out = call(*args, **kwargs)
        except BaseException:
            self._end()
            raise
        finally:
            self._counting = False
        if self._looping and self._done == self.plan.steps:
            self._account_for_every_site()
            self._end()
        return out

    def _around(self, call: SiteCall) -> Output:
        if self._generation is None and not is_reached(self._model.transformer, self._forward):
            raise PlanMismatch(
                f"the forward of the {self._model.family.name} was replaced after the plan was applied, so its steps cannot be "
                "counted; wanted it as it was, or with hooks around it; call close() of the run, and apply the plan again"
            )
        return super()._around(call)

    def _tick(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._branches is None:
            if self._said:
                raise PlanMismatch(f"got a call of the model after the last one of step {self._said}; say step(0) first")
            self._begin(self._model.branches({}))
            self._looping = True
        super()._tick(module, args, kwargs)
        if self._looping and self._said is not None and self._generation is not None and self._generation.step != self._said:
            raise PlanMismatch(
                f"got more than {self._generation.branches.calls} calls of the model in step {self._said}, wanted so many in "
                "each; call run.step(i) where a step begins"
            )

    def _account_for_every_site(self) -> None:
        if self._generation is not None and self._done != self.plan.steps:
            raise PlanMismatch(f"plan is for {self.plan.steps} steps, the loop ran {self._done}; search again in this loop")
        super()._account_for_every_site()

    def _warn_of(self, unfinished: int | None) -> None:
        """A loop's generation that ended after so many steps."""
        if unfinished is not None:
            remedy = "search again with as many steps as the loop has"
            self._note(self._unfinished(unfinished), remedy, GenerationUnfinished)

    def _end(self) -> None:
        super()._end()
        self._looping = False
