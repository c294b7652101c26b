"""Small trained pipelines inside the package, so that everything can be tried offline."""

from pathlib import Path
from typing import Any

import torch

from arrowhead.errors import InputsInvalid

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""What the classes of the bundled `dit` are called."""


def load(name: str = "dit", *, dtype: torch.dtype = torch.float32) -> Any:
    """A bundled pipeline: `dit` draws 32 × 32 pictures of the ten classes of CIFAR-10 (see `tiny/dit/README.md`).

    Raises:
        InputsInvalid: there is no bundled pipeline of this name.
    """
    if name != "dit":
        raise InputsInvalid(f"got {name!r}, wanted the name of a bundled pipeline: 'dit'")
    from arrowhead.tiny.pipeline import TinyDiTPipeline  # noqa: PLC0415  # diffusers' pipelines take seconds to import

    pipe = TinyDiTPipeline.from_pretrained(Path(__file__).parent / name, dtype=dtype)
    pipe.register_to_config(_name_or_path=f"tiny:{name}")  # rather than where the package happens to be installed
    pipe.set_progress_bar_config(disable=True)
    return pipe
