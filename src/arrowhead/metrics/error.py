"""Errors of a compressed output against the full output, as the searches of both papers use them."""

from typing import Literal

import torch
from torch import Tensor

LossForm = Literal["paper", "signed"]


def relative_error(reference: Tensor, output: Tensor, form: LossForm = "paper") -> float:
    """The loss of DiTFastAttn's Algorithm 1: mean clip(|O − O'| / (max(|O|, |O'|) + 1e-6), 0, 10) over all elements.

    Both tensors have the same shape; the loss is computed in float32. The form `signed` divides by max(O, O') without absolute
    values, as the authors' code does, and negative quotients are clipped to 0. Thresholds of one form do not fit the other.
    Where O = O' the quotient is 0. The loss of an output that is not finite is NaN, which is below no threshold.
    """
    a, b = reference.float(), output.float()
    larger = torch.maximum(a.abs(), b.abs()) if form == "paper" else torch.maximum(a, b)
    quotient = (a - b).abs() / (larger + 1e-6)
    return torch.where(a == b, 0.0, quotient.clamp(0, 10)).mean().item()


def relative_squared_error(reference: Tensor, output: Tensor) -> Tensor:
    """The error of each head (DiTFastAttnV2): mean (O_m − O)² / mean (O − Ō)², where Ō is the mean over the head's elements.

    Both (B, H, N, D); returns (H,) in float32. A head with constant full output has no variance: its error is 0 if the outputs
    are equal, else infinite.
    """
    return error_from_moments(error_moments(reference, output))


def error_moments(reference: Tensor, output: Tensor) -> Tensor:
    """The means that `relative_squared_error` is computed from, (3, H): mean (O_m − O)², mean O, and mean (O − Ō)²."""
    full, other = reference.float(), output.float()
    mean = full.mean((0, 2, 3), keepdim=True)
    squared, variance = ((a - b).square().mean((0, 2, 3)) for a, b in ((other, full), (full, mean)))
    return torch.stack([squared, mean.flatten(), variance])


def error_from_moments(moments: Tensor) -> Tensor:
    """The relative squared error (…,) from moments (3, …)."""
    squared, _, variance = moments
    return torch.where(squared == 0, 0.0, squared / variance)
