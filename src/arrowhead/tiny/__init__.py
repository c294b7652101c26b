"""Three small trained pipelines, bundled so that everything can be tried offline."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from arrowhead.errors import InputsInvalid

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The names of the classes of the bundled `dit`, in order."""
PIPELINES = {
    "dit": ("pipeline", "TinyDiTPipeline"),
    "mmdit": ("text_to_image", "TinyMMDiTPipeline"),
    "mmdit32": ("text_to_image", "TinyMMDiTPipeline"),
}


def load(name: str = "dit", *, dtype: torch.dtype = torch.float32) -> Any:
    """Load a bundled pipeline. A model card lies beside the weights of each.

    Args:
        name: `dit` generates 32 × 32 pictures of the ten classes of CIFAR-10. `mmdit` generates 64 × 64 emoji from a prompt,
            such as "a twemoji of a hatching chick". `mmdit32` is the same model, trained at 32 × 32 only, six times as fast.
        dtype: dtype of the weights.

    Raises:
        InputsInvalid: there is no bundled pipeline of this name.

    Example:
        >>> pipe = ah.tiny.load("dit")
        >>> image = pipe(class_labels=[7], num_inference_steps=20).images[0]
    """
    if not isinstance(name, str) or name not in PIPELINES:
        raise InputsInvalid(f"got {name!r}, wanted the name of a bundled pipeline: {', '.join(map(repr, PIPELINES))}")
    module, cls = PIPELINES[name]
    pipeline = getattr(import_module(f"arrowhead.tiny.{module}"), cls)  # imported here: diffusers takes seconds
    pipe = pipeline.from_pretrained(Path(__file__).parent / name, dtype=dtype)
    pipe.register_to_config(_name_or_path=f"tiny:{name}")  # instead of the path of the installed package
    pipe.set_progress_bar_config(disable=True)
    return pipe
