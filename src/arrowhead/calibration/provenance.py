"""How a search was made, for people to read in what it gives."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from arrowhead.calibration.sharding import Part
from arrowhead.models.custom import CustomModel
from arrowhead.models.model import transformers_of
from arrowhead.plans.target import to_json_value
from arrowhead.upstream import name_or_path
from arrowhead.versions import versions

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def provenance(
    pipe: "DiffusionPipeline", inputs: Mapping[str, Any], settings: Mapping[str, Any], what: str = "search"
) -> dict[str, Any]:
    """The pipeline, the settings of the search, or of `what` else it is, the inputs of its run, and versions, for JSON."""
    inputs = inputs.whole if isinstance(inputs, Part) else inputs
    generator = inputs.get("generator")
    transformer, *_ = transformers_of(pipe)
    own, weight = isinstance(pipe, CustomModel), next(transformer.parameters())
    seeds = [g.initial_seed() for g in ([generator] if isinstance(generator, torch.Generator) else generator or [])]
    return {
        "pipeline": type(transformer if own else pipe).__name__,
        "model": "" if own else name_or_path(pipe),
        what: {name: to_json_value(value) for name, value in settings.items()},
        "inputs": {name: _said(value) for name, value in inputs.items() if name != "generator"},
        "seeds": seeds,
        "device": str(weight.device if own else transformer.device),
        "dtype": str(weight.dtype if own else transformer.dtype),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _said(value: Any) -> Any:
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else to_json_value(value)
