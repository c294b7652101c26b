"""Errors of a compressed output against the full one, as a search uses them."""

from typing import Literal

import torch
from torch import Tensor

LossForm = Literal["paper", "signed"]


def relative_error(reference: Tensor, output: Tensor, form: LossForm = "paper") -> float:
    """Mean clip(|O − O'| / (max(|O|, |O'|) + 1e-6), 0, 10) over all elements (DiTFastAttn, the loss of Algorithm 1).

    `signed` divides by max(O, O') without absolute values, as the authors' code does; a negative quotient is clipped
    to 0. Where O = O' the quotient is 0, whatever the divisor. Thresholds do not carry over between the two forms. Both
    tensors have one shape; computed in float32. The error of an output that is not finite is NaN, below no threshold.
    """
    a, b = reference.float(), output.float()
    larger = torch.maximum(a.abs(), b.abs()) if form == "paper" else torch.maximum(a, b)
    quotient = (a - b).abs() / (larger + 1e-6)
    return torch.where(a == b, 0.0, quotient.clamp(0, 10)).mean().item()


def relative_squared_error(reference: Tensor, output: Tensor) -> Tensor:
    """Mean (O_m − O)² over mean (O − Ō)² for each head, Ō the mean of all elements of the head (DiTFastAttnV2).

    Both (B, H, N, D); (H,) in float32. A head whose full output is constant has no variance: its error is 0 if it is met
    exactly, else infinite.
    """
    return of_moments(moments(reference, output))


def moments(reference: Tensor, output: Tensor) -> Tensor:
    """What `relative_squared_error` is made of, (3, H): mean (O_m − O)², mean O, and mean (O − Ō)²."""
    full, other = reference.float(), output.float()
    mean = full.mean((0, 2, 3), keepdim=True)
    squared, variance = ((a - b).square().mean((0, 2, 3)) for a, b in ((other, full), (full, mean)))
    return torch.stack([squared, mean.flatten(), variance])


def of_moments(found: Tensor) -> Tensor:
    """The error that follows from moments (3, …)."""
    squared, _, variance = found
    return torch.where(squared == 0, 0.0, squared / variance)
