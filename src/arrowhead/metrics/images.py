"""How far generated images are from the uncompressed pipeline's, without any network."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(images: Tensor, raw: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all images; infinite when they are equal.

    Both (B, C, H, W) in [0, 1].
    """
    return decibels(torch.mean((images.double() - raw.double()) ** 2)).item()


def decibels(error: Tensor) -> Tensor:
    """PSNR in dB of mean squared errors of values in [0, 1], of any shape; infinite where there is none."""
    return -10 * torch.log10(error.double())


def squared_errors(images: Tensor, raw: Tensor) -> Tensor:
    """Mean squared error of each image, (B,) in float64; both (B, C, H, W)."""
    return (images.double() - raw.double()).square().mean((1, 2, 3))


def ssim(images: Tensor, raw: Tensor) -> float:
    """Structural similarity (Gaussian window of 11 pixels, σ 1.5), the mean over images. Both (B, C, H, W) in [0, 1]."""
    return float(structural_similarity_index_measure(images.float(), raw.float(), data_range=1.0))


def ssim_each(images: Tensor, raw: Tensor) -> Tensor:
    """`ssim` of each image, (B,) in float32."""
    each: Tensor = structural_similarity_index_measure(images.float(), raw.float(), data_range=1.0, reduction="none")
    return each.reshape(-1)  # of one image torchmetrics gives a number
