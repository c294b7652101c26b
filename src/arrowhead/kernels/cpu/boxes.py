"""Boxes on any device: each block of queries attends over the blocks of keys that it sees, gathered into one tensor.

A block is seen whole or not at all, so no masked pair is computed. Blocks of one shape are attended together, as many at a time
as gather at most twice the sequence's keys.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from arrowhead.kernels.call import Call
from arrowhead.plans import masks
from arrowhead.plans.cells import Box
from arrowhead.plans.layout import Grid, Tokens
from arrowhead.upstream import TORCH_ATTENTION


@dataclass(frozen=True)
class Blocks:
    """n blocks of one shape, as indices in the sequence.

    `queries`, (n, q), are the tokens of each block; `keys`, (n, k), are the visual and text tokens that they see.
    """

    queries: Tensor
    keys: Tensor


def visual_rows(call: Call, box: Box, out: Tensor) -> None:
    """Writes the visual queries' attention under a box into `out`, (B, H, N, D)."""
    for same in blocks(call.tokens, box, call.q.device):
        at_once = max(2 * call.tokens.total // same.keys.shape[1], 1)
        for queries, keys in zip(torch.split(same.queries, at_once), torch.split(same.keys, at_once), strict=True):
            q, k, v = (x[:, :, index].flatten(0, 1) for x, index in ((call.q, queries), (call.k, keys), (call.v, keys)))
            mask = None if call.mask is None else _block_mask(call.mask, call.q, queries, keys)
            attended = TORCH_ATTENTION(q, k, v, attn_mask=mask, scale=call.scale)  # (B · H, n, q, D)
            out[:, :, queries] = torch.unflatten(attended, 0, call.q.shape[:2])


def _block_mask(mask: Tensor, q: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The model's own mask for some blocks: (B · H, n, q or 1, k)."""
    rows = queries[:, :, None] if mask.shape[2] > 1 else queries.new_zeros(1, 1, 1)
    part = mask.expand(-1, -1, -1, q.shape[2])[:, :, rows, keys[:, None, :]]
    return part.expand(*q.shape[:2], -1, -1, -1).flatten(0, 1)


@lru_cache(maxsize=16)
def blocks(tokens: Tokens, box: Box, device: torch.device) -> tuple[Blocks, ...]:
    """All blocks of visual queries, those of one shape together.

    Raises:
        ValueError: the tokens have no grid.
    """
    axes, first = masks.axes(tokens, box), tokens.visual_slice.start
    grid = tokens.grid
    assert grid is not None
    text = torch.arange(tokens.text_slice.start, tokens.text_slice.stop, device=device)
    found = []
    with torch.inference_mode(False):  # the cached tensors are also used outside of inference mode
        for shape in product(*map(_along_axis, axes)):
            queries, keys = (first + _flat_index(grid, *(axis[i].to(device) for axis in shape)) for i in range(2))
            found.append(Blocks(queries, torch.cat([keys, text.expand(len(keys), -1)], 1)))
    return tuple(found)


def _along_axis(axis: masks.Axis) -> list[tuple[Tensor, Tensor]]:
    """The positions in each block of an axis, and those that the block sees: (n, positions) each, for each shape of blocks."""
    by_shape: dict[tuple[int, int], list[tuple[range, range]]] = {}
    for start in range(0, axis.size, axis.block):
        low, high = start - axis.reach * axis.block, start + (axis.reach + 1) * axis.block
        block, seen = range(start, min(start + axis.block, axis.size)), range(max(low, 0), min(high, axis.size))
        by_shape.setdefault((len(block), len(seen)), []).append((block, seen))
    return [
        (torch.tensor([list(block) for block, _ in same]), torch.tensor([list(seen) for _, seen in same]))
        for same in by_shape.values()
    ]


def _flat_index(grid: Grid, frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Indices among the visual tokens, from positions along each axis, (n, positions): (product of n, product of positions)."""
    f, r, c = frames[:, None, None, :, None, None], rows[None, :, None, None, :, None], columns[None, None, :, None, None, :]
    return ((f * grid.rows + r) * grid.columns + c).flatten(3).flatten(0, 2)
