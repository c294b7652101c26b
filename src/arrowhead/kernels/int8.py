"""How queries and keys are encoded in 8 bits, for all kernels: as in SageAttention (arXiv:2410.02367, section 4).

Keys are smoothed first: their mean over the tokens is subtracted. That shifts all scores of a query by the same number, which
the softmax cancels. Then queries and keys are rounded to whole numbers from −127 to 127, with one scale for each head and block
of tokens, such that the largest element of the block becomes ±127. Blocks count from the first token of the sequence, be it
text or visual.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
QUERIES, KEYS = 128, 64
"""Tokens in a block of queries, and in a block of keys."""


@dataclass(frozen=True)
class Encoded:
    """`values`, (B, H, N, D) int8, and the `scales` that multiply them, (B, H, N) float32, equal within a block."""

    values: Tensor
    scales: Tensor

    def decoded(self) -> Tensor:
        """The original up to rounding, (B, H, N, D), float32."""
        return self.values * self.scales[..., None]


def queries(q: Tensor) -> Encoded:
    """Encodes queries, (B, H, N, D) of any floating dtype."""
    return _encoded(q.float(), QUERIES)


def keys(k: Tensor) -> Encoded:
    """Smooths and encodes keys, (B, H, N, D) of any floating dtype."""
    k = k.float()
    return _encoded(k - k.mean(2, keepdim=True), KEYS)


def products(q: Tensor, k: Tensor) -> Tensor:
    """The scores Q·Kᵀ in int8, (B, H, N, N) float32, up to a constant for each query (see the smoothing above).

    The whole numbers are multiplied exactly: float32 holds sums of up to 1040 of their products.
    """
    q8, k8 = queries(q), keys(k)
    return q8.values.float() @ k8.values.float().mT * q8.scales[..., None] * k8.scales[..., None, :]


def emulated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with which native attention gives what attention in int8 does.

    In float32, or in float64 where `q` is in float64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    return queries(q).decoded().to(dtype), keys(k).decoded().to(dtype), v.to(dtype)


def _encoded(x: Tensor, block: int) -> Encoded:
    """Encodes x, (B, H, N, D), with one scale for each head and `block` tokens."""
    batch, heads, n, _ = x.shape
    largest = x.new_zeros(batch, heads, -(-n // block) * block)
    largest[:, :, :n] = x.abs().amax(-1)
    scales = (largest.view(batch, heads, -1, block).amax(3) / LARGEST).repeat_interleave(block, 2)[:, :, :n]
    divisor = torch.where(scales > 0, scales, 1.0)  # a block of zeros stays zeros
    return Encoded((x / divisor[..., None]).round().to(torch.int8), scales)
