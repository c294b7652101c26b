"""8-bit queries and keys: defined here, once, for every kernel, as SageAttention has them (arXiv:2410.02367, section 4).

Keys are smoothed first: their mean over the tokens is subtracted, which moves all of a query's scores by one number, and no
softmax. Then queries and keys are rounded to whole numbers from −127 to 127 by one scale for each block of tokens and head, so
that the block's largest element is ±127. Blocks are counted from the sequence's first token, text or image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
QUERIES, KEYS = 128, 64
"""Tokens of a block."""


@dataclass(frozen=True)
class Quantised:
    """Whole numbers (B, H, N, D), int8, and what they are to be multiplied by, (B, H, N), float32, equal within a block."""

    values: Tensor
    scales: Tensor

    def dequantised(self) -> Tensor:
        """What is left of the original, (B, H, N, D), float32."""
        return self.values * self.scales[..., None]


def queries(q: Tensor) -> Quantised:
    """Queries (B, H, N, D), of any floating dtype."""
    return _rounded(q.float(), QUERIES)


def keys(k: Tensor) -> Quantised:
    """Keys (B, H, N, D), smoothed."""
    k = k.float()
    return _rounded(k - k.mean(2, keepdim=True), KEYS)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Q·Kᵀ in int8, (B, H, N, N), float32, up to a number for each query.

    Whole numbers are multiplied exactly: float32 holds sums of up to 1040 products of them.
    """
    own, other = queries(q), keys(k)
    return own.values.float() @ other.values.float().mT * own.scales[..., None] * other.scales[..., None, :]


def emulated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What native attention has to be given to attend as in int8: q, k and v in float32, or in float64 if that is theirs."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return queries(q).dequantised().to(dtype), keys(k).dequantised().to(dtype), v.to(dtype)


def _rounded(x: Tensor, block: int) -> Quantised:
    batch, heads, n, _ = x.shape
    largest = x.new_zeros(batch, heads, -(-n // block) * block)
    largest[:, :, :n] = x.abs().amax(-1)
    scales = (largest.view(batch, heads, -1, block).amax(3) / LARGEST).repeat_interleave(block, 2)[:, :, :n]
    divisor = torch.where(scales > 0, scales, 1.0)  # a block of zeros stays one
    return Quantised((x / divisor[..., None]).round().to(torch.int8), scales)
