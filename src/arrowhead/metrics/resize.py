"""How images come to the size that a network takes. It changes FID by more than plans do, so it has a name and is stated."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def tf1(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear, which the original FID has: corners not aligned, pixels' centres neither, no antialiasing.

    (n, C, H, W) to (n, C, size, size).
    """
    (top, bottom, down), (left, right, across) = (_taps(n, size, images) for n in images.shape[2:])
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = torch.lerp(upper[..., left], upper[..., right], across)
    return torch.lerp(upper, torch.lerp(lower[..., left], lower[..., right], across), down[:, None])


def _taps(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` pixels the two that it lies between, and how far from the first."""
    at = torch.arange(size, device=like.device, dtype=like.dtype) * (length / size)
    low = at.floor().long().clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), at - low


def bilinear(images: Tensor, size: int) -> Tensor:
    """Torch's bilinear without antialiasing, as pytorch-fid has it."""
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def antialiased(images: Tensor, size: int) -> Tensor:
    """Torch's antialiased bicubic, close to what clean-fid has."""
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)


MODES: Mapping[str, Callable[[Tensor, int], Tensor]] = {"tf1": tf1, "bilinear": bilinear, "antialiased": antialiased}
"""Of images (n, C, H, W) in [0, 255]."""
SAID: Mapping[str, str] = {
    "tf1": "TensorFlow 1's bilinear, as in the original FID",
    "bilinear": "torch's bilinear, no antialiasing",
    "antialiased": "torch's antialiased bicubic",
}
