"""Boxes in the grid, on any device: blocks of queries, each against the blocks of keys that it sees, gathered.

A block is seen whole or not at all, so nothing is computed to be masked away. Blocks of one shape are attended together, as
many at a time as bring no more keys than twice the sequence.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from arrowhead.kernels.call import Call
from arrowhead.plans import masks
from arrowhead.plans.cells import Box
from arrowhead.plans.layout import Grid, Tokens


@dataclass(frozen=True)
class Alike:
    """Blocks of one shape: where in the sequence their queries are, (n, q), and the keys that they see, (n, k), with text."""

    queries: Tensor
    keys: Tensor


def visual_rows(call: Call, box: Box, out: Tensor) -> None:
    """Arrow attention of the visual queries under a box, into `out`, (B, H, N, D)."""
    for alike in blocks(call.tokens, box, call.q.device):
        at_once = max(2 * call.tokens.total // alike.keys.shape[1], 1)
        for queries, keys in zip(torch.split(alike.queries, at_once), torch.split(alike.keys, at_once), strict=True):
            q, k, v = (x[:, :, where].flatten(0, 1) for x, where in ((call.q, queries), (call.k, keys), (call.v, keys)))
            mask = None if call.mask is None else _of_blocks(call.mask, call.q, queries, keys)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)  # (B · H, n, q, D)
            out[:, :, queries] = torch.unflatten(attended, 0, call.q.shape[:2])


def _of_blocks(mask: Tensor, q: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The model's own mask for each block: (B · H, n, q or 1, k)."""
    rows = queries[:, :, None] if mask.shape[2] > 1 else queries.new_zeros(1, 1, 1)
    own = mask.expand(-1, -1, -1, q.shape[2])[:, :, rows, keys[:, None, :]]
    return own.expand(*q.shape[:2], -1, -1, -1).flatten(0, 1)


@lru_cache(maxsize=16)
def blocks(tokens: Tokens, box: Box, device: torch.device) -> tuple[Alike, ...]:
    """All blocks of visual queries, those of one shape together.

    Raises what `masks.axes` raises.
    """
    axes, first = masks.axes(tokens, box), tokens.visual_slice.start
    grid = tokens.grid
    assert grid is not None
    text = torch.arange(tokens.text_slice.start, tokens.text_slice.stop, device=device)
    found = []
    with torch.inference_mode(False):  # it is kept, and is not always read in inference mode
        for shape in product(*map(_along, axes)):
            queries, keys = (first + _places(grid, *(own[i].to(device) for own in shape)) for i in range(2))
            found.append(Alike(queries, torch.cat([keys, text.expand(len(keys), -1)], 1)))
    return tuple(found)


def _along(axis: masks.Axis) -> list[tuple[Tensor, Tensor]]:
    """The places in each block of an axis and those that it sees, (n, places) each, blocks of one shape together."""
    alike: dict[tuple[int, int], list[tuple[range, range]]] = {}
    for start in range(0, axis.size, axis.block):
        low, high = start - axis.reach * axis.block, start + (axis.reach + 1) * axis.block
        own, seen = range(start, min(start + axis.block, axis.size)), range(max(low, 0), min(high, axis.size))
        alike.setdefault((len(own), len(seen)), []).append((own, seen))
    return [
        (torch.tensor([list(own) for own, _ in some]), torch.tensor([list(seen) for _, seen in some]))
        for some in alike.values()
    ]


def _places(grid: Grid, frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Where blocks' tokens are among the visual ones, from where they are along each axis, (n, places): (Π n, Π places)."""
    f, r, c = frames[:, None, None, :, None, None], rows[None, :, None, None, :, None], columns[None, None, :, None, None, :]
    return ((f * grid.rows + r) * grid.columns + c).flatten(3).flatten(0, 2)
