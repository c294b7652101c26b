"""How much an error in one step changes the final latents: the sampler's part is measured by replay, the model's estimated."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arrowhead.calibration.driver import Driver
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.scheduler_calls import SchedulerCalls, observed
from arrowhead.calibration.step import Step
from arrowhead.errors import NotIntercepted

NUDGE = 1e-2
"""Size of the errors that are tried, in units of the output's root mean square."""


def run_scheduler(driver: Driver, calibration: CalibrationRun, on_step: Callable[[Step], None]) -> "SchedulerReplay":
    """Run a pipeline's calibration, and note its scheduler's calls; gives their replay, for all processes' images."""
    with observed(driver.scheduler) as calls:
        calibration.run(on_step)
    return SchedulerReplay(calls.of_all(driver.share))


@dataclass(frozen=True)
class SchedulerReplay:
    """A pipeline's scheduler, run again on the outputs that it was given in one run, or on others."""

    calls: SchedulerCalls

    def latents(self) -> Tensor:
        """The run's final latents, float32."""
        return self.calls.latents()

    def gains_and_feedback(self, steps: int, images: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The sampler gain and the model feedback of an error in the guided output of each step, (S,) each.

        The sampler gain is the norm of the change of the final latents over that of the error, where all other outputs stay as
        they were; it is measured, by replaying the sampler with one output changed.

        The model feedback is by how much the model's outputs in the steps that follow multiply that change. It is estimated as
        if data were Gaussian: where latents are x_t = a·x_final + noise of variance b², the flow multiplies an error along a
        direction in which final latents have the deviation s by s/√(a²s² + b²). a and b are measured on this run, and s along
        the change of the output from the step before, which is the error of reuse. Without an estimate, as in the last step,
        the feedback is 1.

        Raises:
            NotIntercepted: the scheduler was not called once in each of the `steps`.
        """
        calls = self.calls
        if len(calls.outputs) != steps:
            raise NotIntercepted(
                f"the scheduler's step was called {len(calls.outputs)} times in {steps} steps of the model, wanted one each"
            )
        generator = torch.Generator().manual_seed(0x51DE)
        sample, scheduler = calls.arguments[0][1].float(), copy.deepcopy(calls.scheduler)
        reference = self._replay(0, sample, scheduler, None)
        gains: list[float] = []
        feedback: list[float] = []
        for step, output in enumerate(calls.outputs):
            noise = torch.randn(output.shape, generator=generator).to(output.device)
            if step:  # an error in the sample that this step begins with
                error = NUDGE * sample.square().mean().sqrt() * noise
                fixed = norm_ratio(self._replay(step, sample + error, scheduler, None) - reference, error)
                by_flow = self._flow_gain(step, images)
                feedback.append(by_flow / fixed if by_flow > 0 and fixed > 0 else 1.0)
            error = NUDGE * output.float().square().mean().sqrt() * noise
            gains.append(norm_ratio(self._replay(step, sample, scheduler, error) - reference, error))
            sample = self._step(step, sample, scheduler, None)
        return tuple(gains), (*feedback, 1.0)

    def _flow_gain(self, step: int, images: int) -> float:
        """By how much the flow, sampler and model, multiplies an error in the latents before a step."""
        outputs, arguments = self.calls.outputs, self.calls.arguments
        change = outputs[step - 1][:images].float() - outputs[step][:images].float()
        initial, sample = (arguments[each][1][:images].float() for each in (0, step))
        return gaussian_flow_gain(initial, sample, self.latents()[:images], change, images)

    def _replay(self, start: int, sample: Tensor, scheduler: Any, error: Tensor | None) -> Tensor:
        """The final latents from a step's sample on, with an error in that step's output."""
        scheduler = copy.deepcopy(scheduler)
        for step in range(start, len(self.calls.outputs)):
            sample = self._step(step, sample, scheduler, error if step == start else None)
        return sample

    def _step(self, step: int, sample: Tensor, scheduler: Any, error: Tensor | None) -> Tensor:
        timestep, _, args, kwargs = self.calls.arguments[step]
        output = self.calls.outputs[step].float() if error is None else self.calls.outputs[step].float() + error
        on_cuda = sample.device.type == "cuda"
        with torch.random.fork_rng([sample.device] if on_cuda else []), torch.no_grad():
            torch.default_generator.manual_seed(step)  # a sampler that draws noise draws the same in every replay
            if on_cuda:
                torch.cuda.manual_seed(step)
            kwargs = {name: value for name, value in kwargs.items() if name not in ("generator", "return_dict")}
            moved: Tensor = scheduler.step(output, timestep, sample, *args, **kwargs, return_dict=False)[0]
        return moved.float()


def gaussian_flow_gain(initial: Tensor, sample: Tensor, final: Tensor, change: Tensor, images: int) -> float:
    """The factor s/√(a²s² + b²) at the latents `sample`, see `SchedulerReplay.gains_and_feedback`; all tensors are (B, …).

    `initial` and `final` are the first and the last latents, `change` that of the guided output from the step before. Some
    pipelines step the rows of both branches, which are alike; the first `images` rows are given here.
    """
    both = torch.stack([final.flatten(), initial.flatten()], 1)
    signal = max(float(torch.linalg.lstsq(both, sample.flatten()[:, None]).solution[0]), 1e-3)
    noise = float((sample - signal * final).square().mean().sqrt())
    change = change.flatten(1)
    change = change / change.norm(dim=1, keepdim=True).clamp_min(1e-12)
    flat = final.flatten(1)
    along = (flat - flat.mean(0) if images > 1 else flat) @ change.T  # (B, B): images, directions
    if images > 1:  # the direction that an image gives overstates that image's own deviation
        along = along[~torch.eye(images, dtype=torch.bool, device=along.device)] * (images / (images - 1)) ** 0.5
    spread = float(along.square().mean().sqrt())
    return spread / max((signal**2 * spread**2 + noise**2) ** 0.5, 1e-12)


def norm_ratio(change: Tensor, error: Tensor) -> float:
    """The norm of a change over the norm of the error that made it."""
    return float(change.norm() / error.norm().clamp_min(1e-12))
