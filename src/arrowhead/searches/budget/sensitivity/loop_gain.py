"""How much an error in one step of a custom model's loop changes the final latents: the loop runs again, on noted outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arrowhead.calibration.driver import Driver, latents_of_loop
from arrowhead.calibration.outputs import output_with, sample_of, stacked
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.step import Step
from arrowhead.engine.changes import Changes
from arrowhead.engine.forward_hooks import replace_forward
from arrowhead.errors import InputsInvalid
from arrowhead.models.model import Model
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.sampler_gain import NUDGE, gaussian_flow_gain, norm_ratio

SAME = 1e-3
"""The largest relative difference of the final latents when a loop runs again on the same outputs."""


def run_loop(
    driver: Driver, model: Model, guidance: Guidance, calibration: CalibrationRun, on_step: Callable[[Step], None]
) -> "LoopReplay":
    """Run a loop's calibration, and note the model's latents and outputs in every call; gives the loop's replay."""
    latents: list[Tensor] = []
    outputs: list[Any] = []

    def noted(step: Step) -> None:
        latents.extend(stacked(each).clone() for each in step.latents)
        on_step(step)
        outputs.extend(step.outputs)

    final = latents_of_loop(calibration.run(noted))
    return LoopReplay(driver, model, guidance, latents, outputs, final)


@dataclass(frozen=True)
class LoopReplay:
    """A custom model's loop, run again on the outputs that the model gave in one run, or on others, without the model.

    `given` are the latents (B, C, …) that each call of the model got, `outputs` what it gave, `final` the final latents.
    """

    driver: Driver
    model: Model
    guidance: Guidance
    given: list[Tensor]
    outputs: list[Any]
    final: Tensor

    def latents(self) -> Tensor:
        """The run's final latents, float32."""
        return self.final

    def gains_and_feedback(self, steps: int, images: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The sampler gain and the model feedback in each step, (S,) each, as `SchedulerReplay` has them.

        An error is added to both branches of a step's output. The change of the latents that the model is given next shows what
        it does to the latents. So the whole loop runs once for each step.

        Raises:
            InputsInvalid: the loop does not give the same latents again.
        """
        calls = len(self.outputs) // steps
        if len(self.final) != images:
            raise InputsInvalid(
                f"got final latents of {len(self.final)} images from the callable, wanted those of {images}, as many as the "
                "model is given latents of; return the whole batch, a tensor (B, C, …) or a list"
            )
        starts = [given[:images].float() for given in self.given[::calls]]
        guided = [self._guided(self.outputs[step * calls : (step + 1) * calls]) for step in range(steps)]
        before, reference = self._replayed({})
        strayed = norm_ratio(reference - self.final, self.final)
        if strayed > SAME:
            raise InputsInvalid(
                f"got final latents that are others by {strayed:.2g} when the loop runs again on the same outputs of the "
                "model; wanted the same ones; draw noise from a generator that the callable makes, or from torch's own, and do "
                "not change the model's output in place"
            )
        generator = torch.Generator().manual_seed(0x51DE)
        gains: list[float] = []
        feedback: list[float] = []
        for step, output in enumerate(guided):
            error = NUDGE * output.square().mean().sqrt() * torch.randn(output.shape, generator=generator).to(output.device)
            given, final = self._replayed({step * calls + call: error for call in range(calls)})
            gains.append(norm_ratio(final - reference, error))
            if step + 1 < steps:
                moved = (given[(step + 1) * calls] - before[(step + 1) * calls])[:images].float()
                fixed = norm_ratio(final - reference, moved)
                by_flow = self._flow_gain(starts[0], starts[step + 1], output - guided[step + 1], images)
                feedback.append(by_flow / fixed if by_flow > 0 and fixed > 0 else 1.0)
        return tuple(gains), (*feedback, 1.0)

    def _flow_gain(self, initial: Tensor, sample: Tensor, change: Tensor, images: int) -> float:
        """As `SchedulerReplay` has it; 1 where the shapes show that what the model is given are no latents."""
        final = self.final[:images]
        same = initial.shape == final.shape == change.shape
        return gaussian_flow_gain(initial, sample, final, change, images) if same else 1.0

    def _replayed(self, errors: dict[int, Tensor]) -> tuple[list[Tensor], Tensor]:
        """The latents that the model is given in each call, and the final latents, with errors in these calls' outputs."""
        given: list[Tensor] = []

        def replay(*args: Any, **kwargs: Any) -> Any:
            call = len(given)
            if call == len(self.outputs):
                raise InputsInvalid(
                    f"got more than {call} calls of the model when the loop runs again; wanted as many; see arrowhead.search"
                )
            given.append(stacked(self.model.latents(self.model.transformer_arguments(args, kwargs))).clone())
            output = self.outputs[call]
            sample = sample_of(output).clone()
            if call in errors:
                direction = sample[:, : self.model.latent_channels]  # a view
                direction += errors[call].repeat(len(sample) // len(errors[call]), *[1] * (sample.ndim - 1)).to(sample.dtype)
            return output_with(output, sample)

        changes = Changes()
        with torch.no_grad(), changes, changes:
            generate = self.driver.prepare(changes)
            replace_forward(self.model.transformer, replay, changes)
            final = latents_of_loop(generate())
        return given, final

    def _guided(self, outputs: list[Any]) -> Tensor:
        return self.guidance.guided([sample_of(output) for output in outputs]).float()
