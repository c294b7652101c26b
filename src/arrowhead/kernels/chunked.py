"""Chunks of queries, each against the slice of keys that its band can reach, through torch's own attention.

Exact on any device and without compilation: the edges of a slice are masked. With chunks of c queries and radius w a query
meets c + 2w keys instead of N. Heads of one radius are taken together. On the CPU, without gradients or a mask of the model's
own, `windows` does the same faster.

Heads in int8 attend by the queries and keys that quantising leaves, in float32: exact in effect, and slower than native ones.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arrowhead.kernels import masks, quantise, windows
from arrowhead.layout import Tokens
from arrowhead.methods import Precision


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    radii: Sequence[int | None],
    precisions: Sequence[Precision],
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """Arrow attention, (B, H, N, D) each; the dtype is kept."""
    kinds = list(zip(radii, precisions, strict=True))
    distinct = list(dict.fromkeys(kinds))
    if len(distinct) == 1:
        return _one_kind(q, k, v, tokens, *distinct[0], scale, mask)
    out = torch.empty_like(q)
    for kind in distinct:
        heads = torch.tensor([head for head, own in enumerate(kinds) if own == kind], device=q.device)
        own_mask = None if mask is None else masks.part(mask, 1, heads)
        out[:, heads] = _one_kind(q[:, heads], k[:, heads], v[:, heads], tokens, *kind, scale, own_mask)
    return out


def _one_kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    radius: int | None,
    precision: Precision,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    if precision == "native":
        return _one_radius(q, k, v, tokens, radius, scale, mask)
    wide = quantise.emulated(q, k, v)
    own_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(wide[0].dtype)
    return _one_radius(*wide, tokens, radius, scale, own_mask).to(q.dtype)


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
    if mask is None and windows.serve(q, k, v):
        out[:, :, visual] = windows.visual_rows(q, k, v, tokens, radius, scale)
        return out
    q_visual, k_visual, v_visual = q[:, :, visual], k[:, :, visual], v[:, :, visual]  # (B, H, V, D)
    out_visual, chunk = out[:, :, visual], windows.chunk_length(radius)
    for start in range(0, tokens.visual, chunk):
        stop = min(start + chunk, tokens.visual)
        low, high = max(0, start - radius), min(tokens.visual, stop + radius)
        keys, values = k_visual[:, :, low:high], v_visual[:, :, low:high]  # (B, H, high − low, D)
        if tokens.text:
            keys = torch.cat([keys, k[:, :, text]], 2)
            values = torch.cat([values, v[:, :, text]], 2)
        bias = F.pad(windows.chunk_bias(start, stop, low, high, radius, q.dtype, q.device), (0, tokens.text))
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
