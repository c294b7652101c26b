"""Which query–key pairs a head computes. All kernels take their masks from here.

Letters: N tokens in a sequence, V of them visual, T of them text. True means that the query sees the key.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead.plans.cells import Box, Radius
from arrowhead.plans.layout import Tokens


def near(i: Tensor, j: Tensor, radius: int | Tensor) -> Tensor:
    """Whether |i − j| ≤ radius: visual query i sees visual key j, or block i of a box's axis sees block j.

    Boolean, of the shape to which the arguments broadcast.
    """
    return (i - j).abs() <= radius


def band(queries: range, keys: range, radius: int, device: torch.device | None = None) -> Tensor:
    """The mask of a band between some visual queries and some visual keys: boolean, (len(queries), len(keys))."""
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
    return near(i, j, radius)


@dataclass(frozen=True)
class Axis:
    """One axis of a grid under a box: `size` positions, cut into blocks of `block` positions.

    A query sees its own block, and `reach` blocks on each side. The last block may be smaller.
    """

    size: int
    block: int
    reach: int

    @classmethod
    def of(cls, size: int, radius: int | None, whole: bool = False) -> "Axis":
        """The axis under a radius: in blocks of `radius` positions, or of one position each if `whole`. None: one block."""
        if radius is None:
            return cls(size, size, 0)
        return cls(size, 1, radius) if whole or radius == 0 else cls(size, min(radius, size), 1)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.size // self.block)

    @property
    def pairs(self) -> int:
        """The number of pairs of positions, of which one sees the other."""
        m, last = self.blocks - 1, self.size - (self.blocks - 1) * self.block  # m whole blocks, and the last one's positions
        w, neighbours = min(self.reach, max(m - 1, 0)), min(self.reach, m)
        among_whole_blocks = (m * (2 * w + 1) - w * (w + 1)) * self.block**2
        return among_whole_blocks + 2 * neighbours * self.block * last + last**2


def axes(tokens: Tokens, box: Box) -> tuple[Axis, Axis, Axis]:
    """The axes of the tokens' grid under a box: frames, rows and columns.

    Raises:
        ValueError: the tokens have no grid.
    """
    if tokens.grid is None:
        raise ValueError(
            f"got {box!r} for {tokens}, whose grid is not known; wanted tokens of a known grid; take a radius in tokens"
        )
    frames, rows, columns = tokens.grid.frames, tokens.grid.rows, tokens.grid.columns
    return Axis.of(frames, box.frames, whole=True), Axis.of(rows, box.rows), Axis.of(columns, box.columns)


def _boxes(tokens: Tokens, box: Box, device: torch.device | None) -> Tensor:
    """The mask of a box between all visual queries and keys: boolean, (V, V)."""
    along, visual = axes(tokens, box), torch.arange(tokens.visual, device=device)
    seen = torch.ones(tokens.visual, tokens.visual, dtype=torch.bool, device=device)
    for axis, positions in zip(along, torch.unravel_index(visual, [axis.size for axis in along]), strict=True):
        block = positions // axis.block  # (V,)
        seen &= near(block[:, None], block[None, :], axis.reach)
    return seen


def arrow(tokens: Tokens, radius: Radius, device: torch.device | None = None) -> Tensor:
    """The mask of arrow attention, boolean (N, N): a band or boxes among the visual tokens; text rows and columns are all True.

    >>> arrow(Tokens(visual=3, text=1), radius=0).int().tolist()
    [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    """
    allowed = torch.ones(tokens.total, tokens.total, dtype=torch.bool, device=device)
    visual = range(tokens.visual)
    among_visual = _boxes(tokens, radius, device) if isinstance(radius, Box) else band(visual, visual, radius, device)
    allowed[tokens.visual_slice, tokens.visual_slice] = among_visual
    return allowed


def pairs(tokens: Tokens, radius: Radius | None) -> int:
    """The number of query–key pairs that a head computes: N² where `radius` is None.

    A band of radius w keeps V(2w + 1) − w(w + 1) of the V² pairs of visual tokens, and all pairs with text. A box multiplies
    such a number of each axis, counted in blocks.

    >>> pairs(Tokens(visual=1024), radius=128), pairs(Tokens(visual=1024), radius=None)
    (246656, 1048576)
    """
    if radius is None:
        return tokens.total**2
    visual, text = tokens.visual, tokens.text
    along = axes(tokens, radius) if isinstance(radius, Box) else (Axis(visual, 1, radius),)
    return math.prod(axis.pairs for axis in along) + text * tokens.total + visual * text


def covers(tokens: Tokens, radius: Radius) -> bool:
    """Whether a band, or box, keeps all pairs, so that it is full attention."""
    return pairs(tokens, radius) == tokens.total**2


def bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as a bias to add to the scores: 0 where it is True, −∞ elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def part(mask: Tensor, dim: int, where: slice | Tensor) -> Tensor:
    """A part of a model's own mask, which broadcasts to (B, H, N, N): the indices `where` of a dimension.

    Returns the mask itself where the dimension is 1, and so holds for all indices.
    """
    if mask.shape[dim] == 1:
        return mask
    return mask[(slice(None),) * dim + (where,)]
