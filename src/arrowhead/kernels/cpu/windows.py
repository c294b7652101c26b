"""A band on the CPU, faster than chunk by chunk: keys as overlapping windows, text apart and merged.

Chunks of queries whose reach lies within the sequence are alike: the windows of keys that they meet are views of one tensor,
c + 2w long and c apart, and one call under one mask attends them all. Text keys are attended apart, and the two attentions are
merged by the logarithms of their sums, which torch's operator for the CPU gives, though not to autograd.
"""

from functools import lru_cache

import torch
from torch import Tensor

from arrowhead.plans import masks
from arrowhead.plans.layout import Tokens
from arrowhead.upstream import CPU_ATTENTION

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys, (B, H, N, D), and for each query log Σ exp(score) over them, (B, H, N)."""
_attend = CPU_ATTENTION  # gives a Part


def serve(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these can be attended here: on the CPU, without gradients, each vector in one piece."""
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    return q.is_cpu and not tracked and all(tensor.stride(-1) == 1 for tensor in (q, k, v))


def visual_rows(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, radius: int, scale: float) -> Tensor:
    """Arrow attention of the visual queries, for a radius under V − 1: q, k, v are (B, H, N, D), the result (B, H, V, D)."""
    text, visual = tokens.text_slice, tokens.visual_slice
    part = _band(q[:, :, visual], k[:, :, visual], v[:, :, visual], radius, scale)
    if tokens.text:
        part = _merged(part, _attend(q[:, :, visual], k[:, :, text], v[:, :, text], scale=scale))
    return part[0]


def _band(q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float) -> Part:
    """Each query over the keys within the radius; (B, H, V, D) each."""
    count, length, chunk = q.shape[2], window_length(radius), chunk_length(radius)
    out, sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    windows = max(count - 2 * radius, 0) // length
    first, last = (radius, radius + windows * length) if windows else (0, 0)
    if windows:
        inner = slice(first, last)
        _windows(q[:, :, inner], k, v, radius, scale, (out[:, :, inner], sums[:, :, inner]))
    for begin, end in ((0, first), (last, count)):
        for start in range(begin, end, chunk):
            stop = min(start + chunk, end)
            low, high = max(0, start - radius), min(count, stop + radius)
            seen = chunk_bias(start, stop, low, high, radius, q.dtype, q.device)
            own = q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high]
            out[:, :, start:stop], sums[:, :, start:stop] = _attend(*own, attn_mask=seen, scale=scale)
    return out, sums


def _windows(q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float, into: Part) -> None:
    """Query i over keys i to i + 2w, for n·c queries."""
    length = window_length(radius)
    seen = bias(length, radius, q.dtype, q.device)
    queries, out, sums = (torch.unflatten(x, 2, (-1, length)) for x in (q, *into))  # (B, H, n, c, ·)
    keys, values = (x.unfold(2, length + 2 * radius, length)[:, :, : queries.shape[2]].mT for x in (k, v))  # views of c + 2w
    apart = 0 if q.shape[0] <= q.shape[1] else 1  # the operator takes four dimensions: one is left to a loop
    for *own, to, sums_to in zip(*(x.unbind(apart) for x in (queries, keys, values, out, sums)), strict=True):
        part, its_sums = _attend(*own, attn_mask=seen, scale=scale)
        to.copy_(part)
        sums_to.copy_(its_sums)


def _merged(a: Part, b: Part) -> Part:
    """Attention over the keys of both."""
    (out_a, sums_a), (out_b, sums_b) = a, b
    share = torch.sigmoid(sums_b - sums_a)[..., None]  # e^b / (e^a + e^b), (B, H, N, 1)
    return torch.lerp(out_a.to(share.dtype), out_b.to(share.dtype), share), torch.logaddexp(sums_a, sums_b)


def window_length(radius: int) -> int:
    """Queries per window: as few as torch's operator takes at a time, more where the keys outgrow the cache (LOG.md)."""
    return 32 * min(max(radius // 512, 1), 4)


def chunk_length(radius: int) -> int:
    """Queries per chunk: few, so that little is computed beside the band, but not so few that calls cost more than work.

    With a band of N/8, 64 was best at 1024 and 4096 tokens, and near it at 256 (CPU, one thread; LOG.md).
    """
    return min(max(radius // 8, 64), 256)


def chunk_bias(start: int, stop: int, low: int, high: int, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bias for visual queries from `start` to `stop` and keys from `low` to `high`, a part of one that all chunks share."""
    whole = bias(chunk_length(radius), radius, dtype, device)
    return whole[: stop - start, low - start + radius : high - start + radius]


@lru_cache(maxsize=16)
def bias(queries: int, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a pair is kept, −∞ elsewhere, (c, c + 2w), for c queries and all keys in the reach of one of them."""
    with torch.inference_mode(False):  # it is kept, and autograd may need it later
        seen = masks.band(range(radius, radius + queries), range(queries + 2 * radius), radius, device)
        return masks.bias(seen, dtype)
