"""Bands on the CPU, faster than chunk by chunk: the keys are overlapping windows of one tensor.

Chunks of c queries whose reach lies within the sequence all have the same mask. Their windows of c + 2w keys are views of one
tensor, c keys apart, so that one call computes all of them. Text keys are attended in a second call, and the two results are
merged by the logarithms of their softmax sums, which torch's operator for the CPU returns (without gradients).
"""

from functools import lru_cache

import torch
from torch import Tensor

from arrowhead.plans import masks
from arrowhead.plans.layout import Tokens
from arrowhead.upstream import CPU_ATTENTION

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys, (B, H, N, D), and for each query log Σ exp(score) over them, (B, H, N)."""
_attend = CPU_ATTENTION  # returns a Part


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this file can compute them: on the CPU, without gradients, with contiguous channels."""
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    return q.is_cpu and not tracked and all(tensor.stride(-1) == 1 for tensor in (q, k, v))


def visual_rows(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, radius: int, scale: float) -> Tensor:
    """The visual queries' attention for a radius below V − 1, (B, H, V, D); q, k and v are (B, H, N, D)."""
    text, visual = tokens.text_slice, tokens.visual_slice
    part = _band(q[:, :, visual], k[:, :, visual], v[:, :, visual], radius, scale)
    if tokens.text:
        part = _merged(part, _attend(q[:, :, visual], k[:, :, text], v[:, :, text], scale=scale))
    return part[0]


def _band(q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float) -> Part:
    """The attention of visual queries over the visual keys within the radius; q, k and v are (B, H, V, D)."""
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
            mask = chunk_bias(start, stop, low, high, radius, q.dtype, q.device)
            chunk_qkv = q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high]
            out[:, :, start:stop], sums[:, :, start:stop] = _attend(*chunk_qkv, attn_mask=mask, scale=scale)
    return out, sums


def _windows(q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float, into: Part) -> None:
    """Writes the attention of n·c queries, of which query i sees keys i to i + 2w, into `into`."""
    length = window_length(radius)
    mask = bias(length, radius, q.dtype, q.device)
    queries, out, sums = (torch.unflatten(x, 2, (-1, length)) for x in (q, *into))  # (B, H, n, c, ·)
    keys, values = (x.unfold(2, length + 2 * radius, length)[:, :, : queries.shape[2]].mT for x in (k, v))  # views of c + 2w
    looped = 0 if q.shape[0] <= q.shape[1] else 1  # the operator takes four dimensions, so loop over the batch, or the heads
    for *qkv, out_part, sums_part in zip(*(x.unbind(looped) for x in (queries, keys, values, out, sums)), strict=True):
        attended, log_sums = _attend(*qkv, attn_mask=mask, scale=scale)
        out_part.copy_(attended)
        sums_part.copy_(log_sums)


def _merged(a: Part, b: Part) -> Part:
    """The attention over the keys of both parts."""
    (out_a, sums_a), (out_b, sums_b) = a, b
    share = torch.sigmoid(sums_b - sums_a)[..., None]  # e^b / (e^a + e^b), (B, H, N, 1)
    return torch.lerp(out_a.to(share.dtype), out_b.to(share.dtype), share), torch.logaddexp(sums_a, sums_b)


def window_length(radius: int) -> int:
    """Queries per window: 32, which torch's operator takes at a time; more where the keys outgrow the CPU's cache (LOG.md)."""
    return 32 * min(max(radius // 512, 1), 4)


def chunk_length(radius: int) -> int:
    """Queries per chunk: few, so that few masked pairs are computed, but not so few that calls cost more than the work.

    With a band of N/8, 64 was best at 1024 and 4096 tokens, and near it at 256 (CPU, one thread; LOG.md).
    """
    return min(max(radius // 8, 64), 256)


def chunk_bias(start: int, stop: int, low: int, high: int, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bias for visual queries `start` to `stop` and keys `low` to `high`: a view of one tensor for all chunks."""
    whole = bias(chunk_length(radius), radius, dtype, device)
    return whole[: stop - start, low - start + radius : high - start + radius]


@lru_cache(maxsize=16)
def bias(queries: int, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bias of a band for c queries and all keys within their reach, (c, c + 2w): 0 where a pair is kept, −∞ elsewhere."""
    with torch.inference_mode(False):  # the cached tensor is also used outside of inference mode
        seen = masks.band(range(radius, radius + queries), range(queries + 2 * radius), radius, device)
        return masks.bias(seen, dtype)
