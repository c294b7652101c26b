"""Distances between generated images and the untouched pipeline's that need no network: PSNR and SSIM."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(images: Tensor, raw: Tensor) -> float:
    """The peak signal-to-noise ratio in dB over all pixels of all images, both (B, C, H, W) in [0, 1]; infinite if equal."""
    return decibels(torch.mean((images.double() - raw.double()) ** 2)).item()


def decibels(error: Tensor) -> Tensor:
    """PSNR in dB from mean squared errors of values in [0, 1], elementwise; infinite where the error is 0."""
    return -10 * torch.log10(error.double())


def squared_errors(images: Tensor, raw: Tensor) -> Tensor:
    """The mean squared error of each image, (B,) in float64; both (B, C, H, W)."""
    return (images.double() - raw.double()).square().mean((1, 2, 3))


def ssim(images: Tensor, raw: Tensor) -> float:
    """Mean structural similarity (Gaussian window of 11 pixels, σ 1.5) over images, both (B, C, H, W) in [0, 1]."""
    return float(structural_similarity_index_measure(images.float(), raw.float(), data_range=1.0))


def ssim_each(images: Tensor, raw: Tensor) -> Tensor:
    """The structural similarity of each image, (B,) in float32; both (B, C, H, W) in [0, 1]."""
    each: Tensor = structural_similarity_index_measure(images.float(), raw.float(), data_range=1.0, reduction="none")
    return each.reshape(-1)  # torchmetrics gives a scalar for one image
