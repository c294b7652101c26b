"""Chunks of queries, each against the slice of keys that its band can reach, through torch's own attention.

Exact on any device and without compilation: the edges of a slice are masked. With chunks of c queries and radius w a query
meets c + 2w keys instead of N. Heads of one radius are taken together.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from arrowhead.kernels import masks
from arrowhead.layout import Tokens


def attend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, radii: Sequence[int | None], scale: float, mask: Tensor | None
) -> Tensor:
    """Arrow attention, (B, H, N, D) each; the dtype is kept."""
    distinct = list(dict.fromkeys(radii))
    if len(distinct) == 1:
        return _one_radius(q, k, v, tokens, distinct[0], scale, mask)
    out = torch.empty_like(q)
    for radius in distinct:
        heads = torch.tensor([head for head, own in enumerate(radii) if own == radius], device=q.device)
        own_mask = None if mask is None else masks.part(mask, 1, heads)
        out[:, heads] = _one_radius(q[:, heads], k[:, heads], v[:, heads], tokens, radius, scale, own_mask)
    return out


def _one_radius(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, radius: int | None, scale: float, mask: Tensor | None
) -> Tensor:
    if radius is None or radius >= tokens.visual - 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = torch.empty_like(q)
    text, visual = tokens.text_slice, tokens.visual_slice
    if tokens.text:
        rows = None if mask is None else masks.part(mask, 2, text)
        out[:, :, text] = F.scaled_dot_product_attention(q[:, :, text], k, v, attn_mask=rows, scale=scale)
    q_visual, k_visual, v_visual = q[:, :, visual], k[:, :, visual], v[:, :, visual]  # (B, H, V, D)
    out_visual = out[:, :, visual]
    chunk = chunk_length(radius)
    for start in range(0, tokens.visual, chunk):
        stop = min(start + chunk, tokens.visual)
        low, high = max(0, start - radius), min(tokens.visual, stop + radius)
        keys, values = k_visual[:, :, low:high], v_visual[:, :, low:high]  # (B, H, high − low, D)
        if tokens.text:
            keys = torch.cat([keys, k[:, :, text]], 2)
            values = torch.cat([values, v[:, :, text]], 2)
        bias = _bias(start - low, stop - start, high - low, radius, tokens.text, q.dtype, q.device)
        if mask is not None:
            first = visual.start
            bias = bias + _of_chunk(mask, tokens, slice(first + start, first + stop), slice(first + low, first + high), q.dtype)
        out_visual[:, :, start:stop] = F.scaled_dot_product_attention(
            q_visual[:, :, start:stop], keys, values, attn_mask=bias, scale=scale
        )
    return out


def _of_chunk(mask: Tensor, tokens: Tokens, queries: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    """The model's own mask as a bias for a chunk: its queries against its visual keys and the text."""
    rows = masks.part(mask, 2, queries)
    if mask.shape[3] > 1:
        rows = torch.cat([rows[..., keys], rows[..., tokens.text_slice]], -1)
    return masks.bias(rows, dtype) if rows.dtype == torch.bool else rows.to(dtype)


def chunk_length(radius: int) -> int:
    """Queries per chunk: few, so that little is computed beside the band, but not so few that calls cost more than work.

    With a band of N/8, 64 was best at 1024 and 4096 tokens, and near it at 256 (CPU, one thread; LOG.md).
    """
    return min(max(radius // 8, 64), 256)


@lru_cache(maxsize=64)
def _bias(offset: int, queries: int, keys: int, radius: int, text: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a pair is kept, −∞ elsewhere, (queries, keys + text): inner chunks are alike and share one."""
    with torch.inference_mode(False):  # it is kept, and autograd may need it later
        seen = masks.band(range(offset, offset + queries), range(keys), radius, device)
        return masks.bias(torch.cat([seen, seen.new_ones(queries, text)], 1), dtype)
