"""How far generated images are from the uncompressed pipeline's, without any network."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(images: Tensor, raw: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all images; infinite when they are equal.

    Both (B, C, H, W) in [0, 1].
    """
    error = torch.mean((images.double() - raw.double()) ** 2).item()
    return float("inf") if error == 0 else float(-10 * torch.log10(torch.tensor(error, dtype=torch.float64)))


def ssim(images: Tensor, raw: Tensor) -> float:
    """Structural similarity (Gaussian window of 11 pixels, σ 1.5), the mean over images. Both (B, C, H, W) in [0, 1]."""
    return float(structural_similarity_index_measure(images.float(), raw.float(), data_range=1.0))
