"""Attention functions as the authors have them, in a file of their own, from which the models' files import them."""

import types

import torch
import torch.nn.functional as F
from torch import Tensor


def rope(ids: Tensor, width: int) -> Tensor:
    """Cosines and sines for FLUX's ids: (B, N) to (B, N, width / 2, 2)."""
    angle = ids[..., None].double() / torch.arange(1, width // 2 + 1)
    return torch.stack([angle.cos(), angle.sin()], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """As in FLUX: heads (B, H, N, D) in, tokens (B, N, H · D) out; queries and keys are turned here."""
    q, k = turned(q, pe), turned(k, pe)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def turned(x: Tensor, pe: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = pe.to(x.dtype).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens=None,
    k_lens=None,
    dropout_p=0.0,
    softmax_scale=None,
    q_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
    dtype=torch.bfloat16,
    version=None,
) -> Tensor:
    """As in Wan: tokens before heads, (B, N, H, D), and no call of torch's attention. Keys from `k_lens` on do not count."""
    assert q_lens is q_scale is version is None
    assert not causal
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if k_lens is not None:
        scores = scores.masked_fill(torch.arange(k.shape[1]) >= k_lens[:, None, None, None], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias=None, p: float = 0.0, scale=None) -> Tensor:
    """As in xformers: (B, N, H, D). A bias here is the lengths of the samples that are packed into one row."""
    if attn_bias is None:
        return flash_attention(query, key, value, softmax_scale=scale)
    rows = zip(query.split(attn_bias[0], 1), key.split(attn_bias[1], 1), value.split(attn_bias[1], 1), strict=True)
    return torch.cat([flash_attention(*row) for row in rows], 1)


xformers = types.ModuleType("xformers")
xformers.ops = types.ModuleType("xformers.ops")
xformers.ops.memory_efficient_attention = memory_efficient_attention
other_impls = types.ModuleType("other_impls")


def _attention_of_sd3(q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None) -> Tensor:
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False).transpose(1, 2).flatten(2)


other_impls.attention = _attention_of_sd3
