"""Resize modes for the inputs of networks. The mode changes FID by more than plans do, so results state it by name."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear resizing as in TensorFlow 1, which the original FID used: (n, C, H, W) to (n, C, size, size).

    Neither corners nor pixel centres are aligned, and nothing is antialiased.
    """
    (top, bottom, down), (left, right, across) = (_taps(n, size, images) for n in images.shape[2:])
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = torch.lerp(upper[..., left], upper[..., right], across)
    return torch.lerp(upper, torch.lerp(lower[..., left], lower[..., right], across), down[:, None])


def _taps(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each output pixel: the indices (size,) of its two neighbours among `length` pixels, and the weight of the second."""
    at = torch.arange(size, device=like.device, dtype=like.dtype) * (length / size)
    low = at.floor().long().clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), at - low


def bilinear(images: Tensor, size: int) -> Tensor:
    """Torch's bilinear resizing without antialiasing, as in pytorch-fid: (n, C, H, W) to (n, C, size, size)."""
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def antialiased(images: Tensor, size: int) -> Tensor:
    """Torch's antialiased bicubic resizing, close to clean-fid: (n, C, H, W) to (n, C, size, size)."""
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)


MODES: Mapping[str, Callable[[Tensor, int], Tensor]] = {"tf1": tf1, "bilinear": bilinear, "antialiased": antialiased}
"""Resize modes by name, for images (n, C, H, W) in [0, 255]."""
DESCRIPTIONS: Mapping[str, str] = {
    "tf1": "TensorFlow 1's bilinear, as in the original FID",
    "bilinear": "torch's bilinear, no antialiasing",
    "antialiased": "torch's antialiased bicubic",
}
"""What each mode is, for the notes of a table."""
