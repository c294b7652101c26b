"""What becomes of an error in one step: the sampler's part is measured by replaying it, the model's estimated."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arrowhead.calibration.sharding import Share
from arrowhead.errors import NotIntercepted

NUDGE = 1e-2
"""Size of the errors that are tried, in units of the output's own."""


@dataclass
class Sampling:
    """The calls that a pipeline made of its scheduler in one run, and the scheduler as it was before the first.

    `outputs` are the guided outputs that the scheduler was given, `final` the latents that its last call gave.
    """

    scheduler: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    arguments: list[tuple[Any, Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    final: Tensor | None = None

    def of_all(self, share: Share) -> "Sampling":
        """The same of all processes' images."""

        def whole(value: Any, rows: int) -> Any:
            return share.joined(value) if isinstance(value, Tensor) and value.ndim and len(value) == rows else value

        def call(timestep: Any, sample: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            rows = len(sample)
            named = {name: whole(value, rows) for name, value in kwargs.items()}
            return timestep, share.joined(sample), tuple(whole(value, rows) for value in args), named

        if share.alone:
            return self
        arguments, final = [call(*each) for each in self.arguments], share.joined(self.latents())
        return Sampling(self.scheduler, list(map(share.joined, self.outputs)), arguments, final)

    def latents(self) -> Tensor:
        """The run's final latents, float32.

        Raises:
            NotIntercepted: the pipeline never called its scheduler.
        """
        if self.final is None:
            raise NotIntercepted("the pipeline never called its scheduler's step; wanted one call in every denoising step")
        return self.final.float()

    def gains_and_feedback(self, steps: int, images: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What becomes of an error in the guided output of each step, of so many images: two factors, (S,) each.

        What the sampler alone makes of it, as the norm of the change of the final latents over that of the error, is measured:
        it is replayed with one output changed and all others as they were. The model's answer in the steps that follow is
        estimated as if data were Gaussian: if latents are x_t = a·x_final + noise of variance b², the flow multiplies an error
        along a direction in which final latents have the deviation s by s/√(a²s² + b²). a and b are measured on this run, and s
        along the change of the output from the step before, the direction of what reuse gets wrong. Where there is nothing to
        estimate it from, as in the last step, the answer is 1.

        Raises:
            NotIntercepted: the scheduler was not called once in each of the `steps`.
        """
        if len(self.outputs) != steps:
            raise NotIntercepted(
                f"the scheduler's step was called {len(self.outputs)} times in {steps} steps of the model, wanted one each"
            )
        generator = torch.Generator().manual_seed(0x51DE)
        sample, scheduler = self.arguments[0][1].float(), copy.deepcopy(self.scheduler)
        reference = self._replay(0, sample, scheduler, None)
        alone: list[float] = []
        answers: list[float] = []
        for step, output in enumerate(self.outputs):
            noise = torch.randn(output.shape, generator=generator).to(output.device)
            if step:  # an error in the sample that this step begins with
                error = NUDGE * sample.square().mean().sqrt() * noise
                fixed = ratio(self._replay(step, sample + error, scheduler, None) - reference, error)
                answered = self._answered(step, images)
                answers.append(answered / fixed if answered > 0 and fixed > 0 else 1.0)
            error = NUDGE * output.float().square().mean().sqrt() * noise
            alone.append(ratio(self._replay(step, sample, scheduler, error) - reference, error))
            sample = self._step(step, sample, scheduler, None)
        return tuple(alone), (*answers, 1.0)

    def _answered(self, step: int, images: int) -> float:
        """The model's answer to an error in the latents before a step."""
        change = self.outputs[step - 1][:images].float() - self.outputs[step][:images].float()
        begun, sample = (self.arguments[each][1][:images].float() for each in (0, step))
        return answered(begun, sample, self.latents()[:images], change, images)

    def _replay(self, start: int, sample: Tensor, scheduler: Any, error: Tensor | None) -> Tensor:
        scheduler = copy.deepcopy(scheduler)
        for step in range(start, len(self.outputs)):
            sample = self._step(step, sample, scheduler, error if step == start else None)
        return sample

    def _step(self, step: int, sample: Tensor, scheduler: Any, error: Tensor | None) -> Tensor:
        timestep, _, args, kwargs = self.arguments[step]
        output = self.outputs[step].float() if error is None else self.outputs[step].float() + error
        on_cuda = sample.device.type == "cuda"
        with torch.random.fork_rng([sample.device] if on_cuda else []), torch.no_grad():
            torch.default_generator.manual_seed(step)  # a sampler that draws noise draws the same in every replay
            if on_cuda:
                torch.cuda.manual_seed(step)
            kwargs = {name: value for name, value in kwargs.items() if name not in ("generator", "return_dict")}
            moved: Tensor = scheduler.step(output, timestep, sample, *args, **kwargs, return_dict=False)[0]
        return moved.float()


def answered(begun: Tensor, sample: Tensor, final: Tensor, change: Tensor, images: int) -> float:
    """s/√(a²s² + b²) for latents, see `gains_and_feedback`; some pipelines step both branches' rows, which are alike.

    `begun` and `final` are the first and the last latents, `change` that of the guided output from the step before, (B, …).
    """
    both = torch.stack([final.flatten(), begun.flatten()], 1)
    signal = max(float(torch.linalg.lstsq(both, sample.flatten()[:, None]).solution[0]), 1e-3)
    noise = float((sample - signal * final).square().mean().sqrt())
    change = change.flatten(1)
    change = change / change.norm(dim=1, keepdim=True).clamp_min(1e-12)
    flat = final.flatten(1)
    along = (flat - flat.mean(0) if images > 1 else flat) @ change.T  # (B, B): images, directions
    if images > 1:  # a direction says too much about the image that it comes from
        along = along[~torch.eye(images, dtype=torch.bool, device=along.device)] * (images / (images - 1)) ** 0.5
    spread = float(along.square().mean().sqrt())
    return spread / max((signal**2 * spread**2 + noise**2) ** 0.5, 1e-12)


def ratio(change: Tensor, error: Tensor) -> float:
    """The norm of one over that of the other."""
    return float(change.norm() / error.norm().clamp_min(1e-12))


@contextmanager
def observed(scheduler: Any) -> Iterator[Sampling]:
    """Note every call of a scheduler's `step`, for the length of a `with` block."""
    sampling, own_step = Sampling(), scheduler.step
    before = vars(scheduler).get("step")

    @functools.wraps(own_step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if sampling.scheduler is None:
            del scheduler.step  # not into the copy
            sampling.scheduler = copy.deepcopy(scheduler)
            scheduler.step = step
        sampling.outputs.append(model_output.clone())
        sampling.arguments.append((timestep, sample.clone(), args, kwargs))
        out = own_step(model_output, timestep, sample, *args, **kwargs)
        sampling.final = out[0] if isinstance(out, tuple) else out.prev_sample
        return out

    scheduler.step = step
    try:
        yield sampling
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before
