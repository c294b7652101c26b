"""How a search was made, for people to read in what it gives."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from arrowhead.apply import plain
from arrowhead.versions import versions

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def about(
    pipe: "DiffusionPipeline", inputs: Mapping[str, Any], settings: Mapping[str, Any], what: str = "search"
) -> dict[str, Any]:
    """The pipeline, the settings of the search, or of `what` else it is, the inputs of its run, and versions, for JSON."""
    generator = inputs.get("generator")
    seeds = [g.initial_seed() for g in ([generator] if isinstance(generator, torch.Generator) else generator or [])]
    return {
        "pipeline": type(pipe).__name__,
        "model": str(pipe.config.get("_name_or_path") or ""),
        what: {name: plain(value) for name, value in settings.items()},
        "inputs": {name: _said(value) for name, value in inputs.items() if name != "generator"},
        "seeds": seeds,
        "device": str(pipe.transformer.device),
        "dtype": str(pipe.transformer.dtype),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _said(value: Any) -> Any:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else plain(value)
