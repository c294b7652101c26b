"""What becomes of an error in one step of a loop of one's own: the loop runs again on the outputs that it had, one changed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arrowhead.calibration.isolation import preserved_rng
from arrowhead.calibration.outputs import output_with, sample_of
from arrowhead.engine.compile_boundary import force_eager
from arrowhead.engine.forward_hooks import forward_replaced
from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.models.model import Model
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.sampler_gain import NUDGE, answered, ratio

STRAYED = 1e-3
"""By so much the final latents may be others when a loop runs again on the outputs that it had."""


@dataclass
class LoopRun:
    """One run of `generate`: what the model was given and gave in every call, and the final latents."""

    model: Model
    generate: Callable[[], Any]
    guidance: Guidance | None = None  # known once the run's branches are
    given: list[Tensor] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    final: Tensor | None = None

    def __call__(self) -> Any:
        """Generate, and note it."""
        own = self.model.transformer.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.given.append(self._given(args, kwargs).clone())
            self.outputs.append(own(*args, **kwargs))
            return self.outputs[-1]

        with forward_replaced(self.model.transformer, noted):
            self.final = final_of(self.generate())
        return self.final

    def latents(self) -> Tensor:
        """The run's final latents, float32.

        Raises:
            NotIntercepted: the run did not end.
        """
        if self.final is None:
            raise NotIntercepted("the generation did not end; wanted a callable that returns the final latents")
        return self.final

    def gains_and_feedback(self, steps: int, images: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """As those of a pipeline's `Sampling`: what the sampler, and what the model afterwards, makes of an error.

        An error is given to both branches of a step's output; what it does to the latents is seen in what the model is given
        next. So the whole loop runs once for each step, without the model.

        Raises:
            InputsInvalid: the loop does not give the same latents again.
        """
        calls = len(self.outputs) // steps
        starts = [given[:images].float() for given in self.given[::calls]]
        guided = [self._guided(self.outputs[step * calls : (step + 1) * calls]) for step in range(steps)]
        before, reference = self._replayed({})
        strayed = ratio(reference - self.latents(), self.latents())
        if strayed > STRAYED:
            raise InputsInvalid(
                f"got final latents that are others by {strayed:.2g} when the loop runs again on the same outputs of the "
                "model; wanted the same ones; draw noise from a generator that the callable makes, or from torch's own, and do "
                "not change the model's output in place"
            )
        generator = torch.Generator().manual_seed(0x51DE)
        alone, answers = [], []
        for step, output in enumerate(guided):
            error = NUDGE * output.square().mean().sqrt() * torch.randn(output.shape, generator=generator).to(output.device)
            given, final = self._replayed({step * calls + call: error for call in range(calls)})
            alone.append(ratio(final - reference, error))
            if step + 1 < steps:
                moved = (given[(step + 1) * calls] - before[(step + 1) * calls])[:images].float()
                fixed = ratio(final - reference, moved)
                own = self._answered(starts[0], starts[step + 1], output - guided[step + 1], images)
                answers.append(own / fixed if own > 0 and fixed > 0 else 1.0)
        return tuple(alone), (*answers, 1.0)

    def _answered(self, begun: Tensor, sample: Tensor, change: Tensor, images: int) -> float:
        """The model's answer; 1 where what it is given are no latents, by their shape."""
        final = self.latents()[:images]
        return answered(begun, sample, final, change, images) if begun.shape == final.shape == change.shape else 1.0

    def _replayed(self, errors: dict[int, Tensor]) -> tuple[list[Tensor], Tensor]:
        """What the model is given in each call, and the final latents, where these calls' outputs have errors."""
        given: list[Tensor] = []

        def replay(*args: Any, **kwargs: Any) -> Any:
            call = len(given)
            if call == len(self.outputs):
                raise InputsInvalid(
                    f"got more than {call} calls of the model when the loop runs again; wanted as many; see arrowhead.search"
                )
            given.append(self._given(args, kwargs).clone())
            output = self.outputs[call]
            sample = sample_of(output).clone()
            if call in errors:
                direction = sample[:, : self.model.latent_channels]  # a view
                direction += errors[call].repeat(len(sample) // len(errors[call]), *[1] * (sample.ndim - 1)).to(sample.dtype)
            return output_with(output, sample)

        with (
            preserved_rng(self.model.pipe, None),
            forward_replaced(self.model.transformer, replay),
            torch.no_grad(),
            force_eager(),
        ):
            final = final_of(self.generate())
        return given, final

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self.model.latents_argument(self.model.transformer_arguments(args, kwargs))

    def _guided(self, outputs: list[Any]) -> Tensor:
        assert self.guidance is not None
        return self.guidance.guided([sample_of(output) for output in outputs]).float()


def final_of(result: Any) -> Tensor:
    """What a callable that generates gave, float32.

    Raises:
        InputsInvalid: it is no tensor.
    """
    if not isinstance(result, Tensor):
        raise InputsInvalid(
            f"got a {type(result).__name__} from the callable that generates, wanted the final latents, a tensor (B, C, …): a "
            "budget goes by them"
        )
    return result.detach().float()
