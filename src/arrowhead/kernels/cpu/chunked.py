"""Bands on any device without compilation: chunks of queries attend over the slice of keys within their reach.

Torch's own attention computes each chunk, with the edges of the slice masked. With c queries in a chunk and radius w, a query
meets c + 2w keys instead of N. Heads of one policy are computed together. On the CPU, without gradients or a mask of the
model's own, `windows` computes the same faster; `boxes` computes boxes.

Heads in int8 attend with encoded and decoded queries and keys, in float32: the result is that of int8, but not faster.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from arrowhead.kernels import int8
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.cpu import boxes, windows
from arrowhead.kernels.head_index import head_index
from arrowhead.plans import masks
from arrowhead.plans.cells import Box, Radius, grouped
from arrowhead.plans.layout import Tokens
from arrowhead.upstream import TORCH_ATTENTION


def attend(call: Call) -> Tensor:
    """Arrow attention of a call, (B, H, N, D), in the dtype of `q`."""
    if call.mask is not None and call.mask.dtype != torch.bool:
        call = replace(call, mask=call.mask.to(_mask_dtype(call.mask.dtype, call.q.dtype)))
    groups, by_windows = list(grouped(call.policies)), uses_windows(call)
    if len(groups) == 1:
        return _one_policy(call, call.policies[0], by_windows)
    out = torch.empty_like(call.q)
    for policy, heads in groups:
        out[:, head_index(heads, out.device)] = _one_policy(call.of_heads(heads), policy, by_windows)
    return out


def uses_windows(call: Call) -> bool:
    """Whether `windows` computes the bands of a call."""
    return call.mask is None and windows.can_attend(call.q, call.k, call.v)


def _mask_dtype(mask: torch.dtype, q: torch.dtype) -> torch.dtype:
    """The dtype in which torch's attention adds a mask of some dtype in full: that of `q`, or float32.

    The lowest number of float32 is −∞ in half precision: a query that sees nothing else would give 0 instead of a mean.
    """
    return torch.float32 if mask != q and q.itemsize == 2 else q


def _one_policy(call: Call, policy: Policy, by_windows: bool) -> Tensor:
    """Attention of heads that have the same policy, (B, H, N, D)."""
    if policy.precision == "native":
        return _one_radius(call, policy.radius, by_windows)
    q, k, v = int8.emulated(call.q, call.k, call.v)
    mask = call.mask if call.mask is None or call.mask.dtype == torch.bool else call.mask.to(q.dtype)
    return _one_radius(replace(call, q=q, k=k, v=v, mask=mask), policy.radius, by_windows).to(call.q.dtype)


def _one_radius(call: Call, radius: Radius | None, by_windows: bool) -> Tensor:
    """Attention of native heads that have the same radius, (B, H, N, D)."""
    q, k, v, tokens, scale, mask = call.q, call.k, call.v, call.tokens, call.scale, call.mask
    if radius is None or masks.covers(tokens, radius):
        return TORCH_ATTENTION(q, k, v, attn_mask=mask, scale=scale)
    out = torch.empty_like(q)
    text, visual = tokens.text_slice, tokens.visual_slice
    if tokens.text:
        rows = None if mask is None else masks.part(mask, 2, text)
        out[:, :, text] = TORCH_ATTENTION(q[:, :, text], k, v, attn_mask=rows, scale=scale)
    if isinstance(radius, Box):
        boxes.visual_rows(call, radius, out)
        return out
    if by_windows:
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
        dtype = q.dtype if mask is None or mask.dtype == torch.bool else mask.dtype
        bias = F.pad(windows.chunk_bias(start, stop, low, high, radius, dtype, q.device), (0, tokens.text))
        if mask is not None:
            first = visual.start
            queries, seen = slice(first + start, first + stop), slice(first + low, first + high)
            bias = bias + _chunk_mask(mask, tokens, queries, seen, dtype)
        out_visual[:, :, start:stop] = TORCH_ATTENTION(q_visual[:, :, start:stop], keys, values, attn_mask=bias, scale=scale)
    return out


def _chunk_mask(mask: Tensor, tokens: Tokens, queries: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    """The model's own mask as a bias for a chunk: rows of its queries, columns of its visual keys and of the text."""
    rows = masks.part(mask, 2, queries)
    if mask.shape[3] > 1:
        rows = torch.cat([rows[..., keys], rows[..., tokens.text_slice]], -1)
    return masks.bias(rows, dtype) if rows.dtype == torch.bool else rows
