"""A plan checked against the calibration's own run: what it really does to the final latents."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arrowhead.apply import applied
from arrowhead.compiled import eagerly
from arrowhead.forwards import forward_replaced
from arrowhead.models import Own, transformers_of
from arrowhead.plan import Plan
from arrowhead.search.alone import quiet
from arrowhead.search.budget.loops import final_of
from arrowhead.search.budget.samplers import observed
from arrowhead.search.shared import share_of

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Errors:
    """How far final latents strayed, as norms of changes over norms of what there was.

    `error`: of the latents themselves, all together. `detail`: of the differences between neighbours, image by image, and the
    mean of these: a picture that is paler all over is nearer to what it was than one with other contours.
    """

    error: float
    detail: float


def measured_errors(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], plan: Plan, raw: Tensor) -> Errors:
    """Of one generation with the plan; `raw` are the latents without."""
    with applied(pipe, plan):
        return share_of(inputs).agreed(errors_of(final_latents(pipe, inputs), raw))


def errors_of(latents: Tensor, raw: Tensor) -> Errors:
    """Of latents, (B, C, …) or (B, N, C)."""
    change, whole = (_differences(each).norm(dim=1) for each in (latents - raw, raw))  # (B,)
    error = (latents - raw).norm() / raw.norm()
    return Errors(float(error), float((change / whole.clamp_min(1e-12)).mean()))


def _differences(latents: Tensor) -> Tensor:
    """Between neighbours along each axis of space and time, (B, all of them)."""
    axes = range(2, latents.ndim) if latents.ndim > 3 else (1,)
    return torch.cat([latents.diff(dim=axis).flatten(1) for axis in axes], 1)


def final_latents(pipe: "DiffusionPipeline", inputs: Mapping[str, Any]) -> Tensor:
    """Of one generation, float32, of all processes' images; it runs eagerly, as all of a search's do."""
    if isinstance(pipe, Own):
        with quiet(pipe, None), eagerly():
            return final_of(pipe(**inputs))
    with observed(pipe.scheduler) as sampling, quiet(pipe, inputs.get("generator")), eagerly():
        pipe(**inputs)
    return share_of(inputs).joined(sampling.latents())


def measured_seconds(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], plan: Plan) -> tuple[float, float]:
    """Seconds of the transformers' calls in an untouched generation and in one with the plan."""
    seconds: list[float] = []

    def timing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        out = forward(*args, **kwargs)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds[-1] += time.perf_counter() - started
        return out

    for chosen in (None, plan):
        seconds.append(0.0)
        with ExitStack() as entered:
            entered.enter_context(nullcontext() if chosen is None else applied(pipe, chosen))
            entered.enter_context(quiet(pipe, inputs.get("generator")))
            entered.enter_context(eagerly())
            for transformer in transformers_of(pipe):
                entered.enter_context(forward_replaced(transformer, partial(timing, transformer.forward)))
            pipe(**inputs)
    return seconds[0], seconds[1]
