"""Which query–key pairs are kept: defined here, once, for every kernel and every test."""

import torch
from torch import Tensor

from arrowhead.layout import Tokens


def near(i: Tensor, j: Tensor, radius: int | Tensor) -> Tensor:
    """Whether visual query i sees visual key j: |i − j| ≤ radius. Boolean, as the three broadcast."""
    return (i - j).abs() <= radius


def band(queries: range, keys: range, radius: int, device: torch.device | None = None) -> Tensor:
    """Whether each visual query sees each visual key. Boolean, (len(queries), len(keys))."""
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
    return near(i, j, radius)


def arrow(tokens: Tokens, radius: int, device: torch.device | None = None) -> Tensor:
    """The whole mask, boolean (N, N): a band over the visual tokens, text rows and columns dense."""
    allowed = torch.ones(tokens.total, tokens.total, dtype=torch.bool, device=device)
    visual = range(tokens.visual)
    allowed[tokens.visual_slice, tokens.visual_slice] = band(visual, visual, radius, device)
    return allowed


def pairs(tokens: Tokens, radius: int | None) -> int:
    """How many query–key pairs a head keeps; all of them where `radius` is None.

    A band of radius w over V visual tokens keeps V(2w + 1) − w(w + 1) of their V² pairs; text rows and columns are dense.
    """
    if radius is None:
        return tokens.total**2
    visual, text = tokens.visual, tokens.text
    w = min(radius, visual - 1)
    return visual * (2 * w + 1) - w * (w + 1) + text * tokens.total + visual * text


def bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a pair is seen, −∞ elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def part(mask: Tensor, dim: int, where: slice | Tensor) -> Tensor:
    """A model's own mask, broadcastable to (B, H, N, N), at some places of a dimension; as it is where it broadcasts."""
    if mask.shape[dim] == 1:
        return mask
    return mask[(slice(None),) * dim + (where,)]
