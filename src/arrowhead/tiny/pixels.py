"""Converts the output of a model trained on pixels to images, in the formats of diffusers' pipelines."""

from typing import Any

from diffusers.utils.pil_utils import numpy_to_pil
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt")


def from_latents(latents: Tensor, output_type: str) -> Any:
    """Convert pixels (B, 3, H, W) in [−1, 1] to `pt` (B, 3, H, W) or `np` (B, H, W, 3), clipped to [0, 1], or to `pil`."""
    pixels = (latents / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).float().cpu().numpy()
    return numpy_to_pil(array) if output_type == "pil" else array
