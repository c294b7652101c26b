"""The calls that a pipeline makes of its scheduler in one run, noted so that they can be made again."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from arrowhead.calibration.sharding import Share, cat_images
from arrowhead.engine.changes import Changes
from arrowhead.errors import NotIntercepted


class LoopEnded(BaseException):
    """Ends a pipeline's call where its second denoising loop begins; no `except Exception` of a pipeline catches it."""


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


def joined_calls(parts: Sequence[SchedulerCalls], sizes: Sequence[int]) -> SchedulerCalls:
    """The calls of runs with some of the images each, as one run with all images would have made them."""
    if len(parts) == 1:
        return parts[0]

    def joined(values: Sequence[Any], rows: Sequence[int]) -> Any:
        of_images = all(isinstance(v, Tensor) and v.ndim and len(v) == row for v, row in zip(values, rows, strict=True))
        return cat_images(values, sizes) if of_images else values[0]

    def call(*each: tuple[Any, Tensor, tuple[Any, ...], dict[str, Any]]) -> Any:
        timesteps, samples, args, kwargs = zip(*each, strict=True)
        rows = [*map(len, samples)]
        named = {name: joined([own[name] for own in kwargs], rows) for name in kwargs[0]}
        return timesteps[0], joined(samples, rows), tuple(joined(values, rows) for values in zip(*args, strict=True)), named

    outputs = [cat_images(each, sizes) for each in zip(*(part.outputs for part in parts), strict=True)]
    arguments = [call(*each) for each in zip(*(part.arguments for part in parts), strict=True)]
    return SchedulerCalls(parts[0].scheduler, outputs, arguments, cat_images([part.latents() for part in parts], sizes))


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

    noted = _Noted(step, own_step)
    changes.record(_restore, scheduler, "step", before)
    scheduler.step = noted
    return calls


def end_with_first_loop(scheduler: Any, calls: SchedulerCalls, changes: Changes) -> None:
    """Raise LoopEnded where the scheduler gets other timesteps after its first step, until the changes are undone.

    A plan counts the transformer's calls outside of its forward. So a second loop has to end before its first call.
    """
    own, before = scheduler.set_timesteps, vars(scheduler).get("set_timesteps")

    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        if calls.final is not None:
            raise LoopEnded
        return own(*args, **kwargs)

    changes.record(_restore, scheduler, "set_timesteps", before)
    scheduler.set_timesteps = _Noted(set_timesteps, own)


def _restore(scheduler: Any, name: str, before: Any) -> None:
    """Put back what the scheduler had under a name on the instance; None: nothing."""
    if before is None:
        vars(scheduler).pop(name, None)
    else:
        setattr(scheduler, name, before)


class _Noted:
    """A scheduler's method that notes its calls. Copies of the scheduler, as that of LTX-2's audio, have their own method."""

    def __init__(self, method: Callable[..., Any], own: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)
        self._method, self._own = method, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._own, memo)  # a bound method's object is in the memo
