"""Which query–key pairs are kept: defined here, once, for every kernel and every test."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead.plans.cells import Box, Radius
from arrowhead.plans.layout import Tokens


def near(i: Tensor, j: Tensor, radius: int | Tensor) -> Tensor:
    """Whether visual query i sees visual key j, or a box's block i its block j: |i − j| ≤ radius. Boolean, broadcast."""
    return (i - j).abs() <= radius


def band(queries: range, keys: range, radius: int, device: torch.device | None = None) -> Tensor:
    """Whether each visual query sees each visual key. Boolean, (len(queries), len(keys))."""
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
    return near(i, j, radius)


@dataclass(frozen=True)
class Axis:
    """One dimension of a grid under a box: `size` places in blocks of `block`, of which `reach` are seen on each side."""

    size: int
    block: int
    reach: int

    @classmethod
    def of(cls, size: int, radius: int | None, whole: bool = False) -> "Axis":
        """Under a radius; in blocks of it, or where each place is a block as it is."""
        if radius is None:
            return cls(size, size, 0)
        return cls(size, 1, radius) if whole or radius == 0 else cls(size, min(radius, size), 1)

    @property
    def blocks(self) -> int:
        """How many, the last of which may be smaller."""
        return -(-self.size // self.block)

    @property
    def pairs(self) -> int:
        """How many pairs of places see each other: those of whole blocks, and those with the last."""
        m, last = self.blocks - 1, self.size - (self.blocks - 1) * self.block
        w, beside = min(self.reach, max(m - 1, 0)), min(self.reach, m)
        return (m * (2 * w + 1) - w * (w + 1)) * self.block**2 + 2 * beside * self.block * last + last**2


def axes(tokens: Tokens, box: Box) -> tuple[Axis, Axis, Axis]:
    """Frames, rows and columns under a box.

    Raises:
        ValueError: nobody knows the tokens' grid.
    """
    if tokens.grid is None:
        raise ValueError(
            f"got {box!r} for {tokens}, whose grid is not known; wanted tokens of a known grid; take a radius in tokens"
        )
    frames, rows, columns = tokens.grid.frames, tokens.grid.rows, tokens.grid.columns
    return Axis.of(frames, box.frames, whole=True), Axis.of(rows, box.rows), Axis.of(columns, box.columns)


def _boxes(tokens: Tokens, box: Box, device: torch.device | None) -> Tensor:
    """Whether each visual query sees each visual key, in a box. Boolean, (V, V)."""
    own, visual = axes(tokens, box), torch.arange(tokens.visual, device=device)
    seen = torch.ones(tokens.visual, tokens.visual, dtype=torch.bool, device=device)
    for axis, places in zip(own, torch.unravel_index(visual, [axis.size for axis in own]), strict=True):
        block = places // axis.block
        seen &= near(block[:, None], block[None, :], axis.reach)
    return seen


def arrow(tokens: Tokens, radius: Radius, device: torch.device | None = None) -> Tensor:
    """The whole mask, boolean (N, N): a band or boxes over the visual tokens, text rows and columns dense."""
    allowed = torch.ones(tokens.total, tokens.total, dtype=torch.bool, device=device)
    visual = range(tokens.visual)
    own = _boxes(tokens, radius, device) if isinstance(radius, Box) else band(visual, visual, radius, device)
    allowed[tokens.visual_slice, tokens.visual_slice] = own
    return allowed


def pairs(tokens: Tokens, radius: Radius | None) -> int:
    """How many query–key pairs a head keeps; all of them where `radius` is None.

    A band of radius w over V visual tokens keeps V(2w + 1) − w(w + 1) of their V² pairs, and so it is with whole blocks along
    each axis of a box; text rows and columns are dense.
    """
    if radius is None:
        return tokens.total**2
    visual, text = tokens.visual, tokens.text
    own = axes(tokens, radius) if isinstance(radius, Box) else (Axis(visual, 1, radius),)
    return math.prod(axis.pairs for axis in own) + text * tokens.total + visual * text


def covers(tokens: Tokens, radius: Radius) -> bool:
    """Whether a band is full attention."""
    return pairs(tokens, radius) == tokens.total**2


def bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a pair is seen, −∞ elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def part(mask: Tensor, dim: int, where: slice | Tensor) -> Tensor:
    """A model's own mask, broadcastable to (B, H, N, N), at some places of a dimension; as it is where it broadcasts."""
    if mask.shape[dim] == 1:
        return mask
    return mask[(slice(None),) * dim + (where,)]
