"""A plan checked against the calibration's own run: what it really does to the final latents."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from arrowhead.apply import applied
from arrowhead.plan import Plan
from arrowhead.search.budget.samplers import observed
from arrowhead.search.calibrate import quiet

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def measured_error(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], plan: Plan, raw: Tensor) -> float:
    """Norm of the change of the final latents over their norm, from one generation with the plan; `raw` are those without."""
    with applied(pipe, plan), observed(pipe.scheduler) as sampling, quiet(pipe, inputs.get("generator")):
        pipe(**inputs)
    return float((sampling.latents() - raw).norm() / raw.norm())
