"""A plan checked against the calibration's own run: what it really does to the final latents."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arrowhead.apply import applied
from arrowhead.plan import Plan
from arrowhead.search.budget.samplers import observed
from arrowhead.search.calibrate import quiet

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def measured_error(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], plan: Plan, raw: Tensor) -> float:
    """Norm of the change of the final latents over their norm, from one generation with the plan; `raw` are those without."""
    with applied(pipe, plan):
        latents = final_latents(pipe, inputs)
    return float((latents - raw).norm() / raw.norm())


def final_latents(pipe: "DiffusionPipeline", inputs: Mapping[str, Any]) -> Tensor:
    """Of one generation, float32."""
    with observed(pipe.scheduler) as sampling, quiet(pipe, inputs.get("generator")):
        pipe(**inputs)
    return sampling.latents()


def measured_seconds(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], plan: Plan) -> tuple[float, float]:
    """Seconds of the transformer's calls in an untouched generation and in one with the plan."""
    seconds: list[float] = []
    transformer = pipe.transformer

    def timing(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        out = forward(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[-1] += time.perf_counter() - started
        return out

    for chosen in (None, plan):
        seconds.append(0.0)
        with nullcontext() if chosen is None else applied(pipe, chosen), quiet(pipe, inputs.get("generator")):
            forward, before = transformer.forward, vars(transformer).get("forward")
            transformer.forward = timing
            try:
                pipe(**inputs)
            finally:
                if before is None:
                    del transformer.forward
                else:
                    transformer.forward = before
    return seconds[0], seconds[1]
