"""Small trained pipelines inside the package, so that everything can be tried offline."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from arrowhead.errors import InputsInvalid

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""What the classes of the bundled `dit` are called."""
PIPELINES = {
    "dit": ("pipeline", "TinyDiTPipeline"),
    "mmdit": ("text_to_image", "TinyMMDiTPipeline"),
    "mmdit32": ("text_to_image", "TinyMMDiTPipeline"),
}


def load(name: str = "dit", *, dtype: torch.dtype = torch.float32) -> Any:
    """A bundled pipeline; each has its model card beside its weights.

    `dit` draws 32 × 32 pictures of the ten classes of CIFAR-10, `mmdit` 64 × 64 emoji after a prompt such as "a twemoji of a
    hatching chick"; `mmdit32` is the same model as it was at 32 × 32, six times as fast.

    Raises:
        InputsInvalid: there is no bundled pipeline of this name.
    """
    if not isinstance(name, str) or name not in PIPELINES:
        raise InputsInvalid(f"got {name!r}, wanted the name of a bundled pipeline: {', '.join(map(repr, PIPELINES))}")
    room, cls = PIPELINES[name]
    pipeline = getattr(import_module(f"arrowhead.tiny.{room}"), cls)  # now: diffusers takes seconds to import
    pipe = pipeline.from_pretrained(Path(__file__).parent / name, dtype=dtype)
    pipe.register_to_config(_name_or_path=f"tiny:{name}")  # rather than where the package happens to be installed
    pipe.set_progress_bar_config(disable=True)
    return pipe
