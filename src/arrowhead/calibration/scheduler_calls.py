"""The calls that a pipeline makes of its scheduler in one run, noted so that they can be made again."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from arrowhead.calibration.sharding import Share
from arrowhead.engine.changes import Changes
from arrowhead.errors import NotIntercepted


@dataclass
class SchedulerCalls:
    """The calls of a scheduler's `step` in one run, in its first denoising loop, and a copy of the scheduler before the first.

    Attributes:
        scheduler: the copy; None before the first call.
        outputs: the guided model output (B, C, …) of each call.
        arguments: of each call the timestep, the sample (B, C, …), and the remaining arguments.
        final: the sample that the last call gave (B, C, …).
        timesteps: the scheduler's, a tensor that is a new one in each loop.
    """

    scheduler: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    arguments: list[tuple[Any, Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    final: Tensor | None = None
    timesteps: Any = None

    def latents(self) -> Tensor:
        """The run's final latents, float32.

        Raises:
            NotIntercepted: the pipeline never called its scheduler.
        """
        if self.final is None:
            raise NotIntercepted("the pipeline never called its scheduler's step; wanted one call in every denoising step")
        return self.final.float()

    def of_all(self, share: Share) -> "SchedulerCalls":
        """The calls as one process would have made them, with all processes' images."""
        if share.alone:
            return self

        def joined(value: Any, rows: int) -> Any:
            return share.joined(value) if isinstance(value, Tensor) and value.ndim and len(value) == rows else value

        def call(timestep: Any, sample: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            rows = len(sample)
            named = {name: joined(value, rows) for name, value in kwargs.items()}
            return timestep, share.joined(sample), tuple(joined(value, rows) for value in args), named

        arguments, final = [call(*each) for each in self.arguments], share.joined(self.latents())
        return SchedulerCalls(self.scheduler, list(map(share.joined, self.outputs)), arguments, final)


@contextmanager
def observed(scheduler: Any) -> Iterator[SchedulerCalls]:
    """Note every call of a scheduler's `step` in the first loop within the block; the scheduler is then as before."""
    changes = Changes()
    with changes, changes:
        yield observe(scheduler, changes)


def observe(scheduler: Any, changes: Changes) -> SchedulerCalls:
    """Note every call of a scheduler's `step` in the first loop, until the changes are undone."""
    calls, own_step = SchedulerCalls(), scheduler.step
    before = vars(scheduler).get("step")

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if calls.scheduler is None:
            del scheduler.step  # the copy must not have it
            calls.scheduler = copy.deepcopy(scheduler)
            scheduler.step, calls.timesteps = noted, scheduler.timesteps
        if scheduler.timesteps is not calls.timesteps:
            return own_step(model_output, timestep, sample, *args, **kwargs)
        calls.outputs.append(model_output.clone())
        calls.arguments.append((timestep, sample.clone(), args, kwargs))
        out = own_step(model_output, timestep, sample, *args, **kwargs)
        calls.final = out[0] if isinstance(out, tuple) else out.prev_sample
        return out

    def restore() -> None:
        if before is None:
            vars(scheduler).pop("step", None)
        else:
            scheduler.step = before

    noted = _Noted(step, own_step)
    changes.record(restore)
    scheduler.step = noted
    return calls


class _Noted:
    """A scheduler's step that notes its calls. Copies of the scheduler, as that of LTX-2's audio, have their own step."""

    def __init__(self, step: Callable[..., Any], own_step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own_step)
        self._step, self._own_step = step, own_step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._own_step, memo)  # a bound method's object is in the memo
