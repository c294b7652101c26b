"""torch's FlexAttention, compiled: each head's band as blocks that are computed whole, in part, or not at all.

Which blocks those are follows from their ends, since |i − j| is least and greatest there. Radii are a tensor that the compiled
kernel reads, so that it is compiled once for a layout (the shapes of q, k and v; seconds) and serves every policy.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels.call import Call, Policy
from arrowhead.plans import masks
from arrowhead.plans.cells import Box
from arrowhead.plans.layout import Tokens
from arrowhead.upstream import is_compiler_error, no_dispatch_modes, recompile_limit

BLOCK = 128  # tokens on a block's side
LAYOUTS = 64  # so many are compiled; torch's own limit is 8, and past it FlexAttention would run uncompiled, with N² scores
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(call: Call) -> Tensor:
    """Arrow attention, (B, H, N, D) each; the dtype is kept. A mask of the model's own is read where it lies, uncopied.

    Raises:
        KernelUnavailable: what FlexAttention cannot do here: other devices than CUDA and CPU, gradients or float64 on the CPU,
            a head dimension that it refuses, heads in int8, boxes, no C++ compiler, more than 64 layouts.
    """
    q, k, v, mask = call.q, call.k, call.v, call.mask
    _refuse(call)
    if q.is_cpu:  # a third faster than through the strides that processors leave
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    score_mod = None if mask is None else _own_mask(mask.expand(*q.shape[:3], k.shape[2]))
    blocks = _block_mask(call.tokens, call.policies, q.device)
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    try:
        with recompile_limit(LAYOUTS), torch.set_grad_enabled(tracked), no_dispatch_modes():
            return _compiled()(q, k, v, score_mod=score_mod, block_mask=blocks, scale=call.scale)
    except Exception as error:
        if not is_compiler_error(error):
            raise
        raise KernelUnavailable(
            f"kernel='flex': got {type(error).__name__} when compiling for {tuple(q.shape)}, {q.dtype}, {q.device}; wanted "
            f"a shape that FlexAttention takes, {LAYOUTS} layouts at most and, on the CPU, a C++ compiler (g++, or what CXX "
            "names); kernel='chunked' needs none of these"
        ) from error


def _refuse(call: Call) -> None:
    q, wrong = call.q, None
    if q.device.type not in ("cpu", "cuda"):
        wrong = f"device {q.device}", "cpu or cuda"
    elif q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        wrong = f"{q.dtype}", "float32, bfloat16 or float16"
    elif q.is_cpu and any(tensor.requires_grad for tensor in (q, call.k, call.v)):
        wrong = "tensors that require gradients on the CPU", "detached ones"
    elif any(policy.precision == "int8" for policy in call.policies):
        wrong = "heads in int8", "native precision"
    elif any(isinstance(policy.radius, Box) for policy in call.policies):
        wrong = "boxes", "radii in tokens"
    if wrong:
        raise KernelUnavailable(f"kernel='flex': got {wrong[0]}, wanted {wrong[1]}; or take kernel='chunked'")


@cache
def _compiled() -> Any:
    """Imported late, since it brings torch's compiler, which `import arrowhead` leaves alone."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _own_mask(mask: Tensor) -> ScoreMod:
    """The model's mask, (B, H, N, N) by its strides alone: boolean, or added to the scores."""
    if mask.dtype == torch.bool:
        return lambda score, b, h, i, j: torch.where(mask[b, h, i, j], score, -torch.inf)
    return lambda score, b, h, i, j: score + mask[b, h, i, j]


@lru_cache(maxsize=32)
def _block_mask(tokens: Tokens, policies: tuple[Policy, ...], device: torch.device) -> Any:
    """The blocks of each head and the rule within those that are kept in part."""
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415

    first, stop = tokens.visual_slice.start, tokens.visual_slice.stop
    with torch.inference_mode(False):  # it is kept, and is not always read in inference mode
        radii = [policy.radius if isinstance(policy.radius, int) else tokens.visual for policy in policies]
        radius = torch.tensor(radii, device=device)
        some, every = block_kinds(tokens, radius)

        def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001
            text = (i < first) | (i >= stop) | (j < first) | (j >= stop)
            return text | masks.near(i, j, radius[h])

        return BlockMask.from_kv_blocks(
            *_listed(some & ~every), *_listed(every), BLOCK, mask_mod=kept, seq_lengths=(tokens.total, tokens.total)
        )


def block_kinds(tokens: Tokens, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Of which blocks some pair is kept, and of which every pair; boolean, (H, n, n), for radii (H,)."""
    first, stop = tokens.visual_slice.start, tokens.visual_slice.stop
    starts = torch.arange(0, tokens.total, BLOCK, device=radius.device)
    ends = (starts + BLOCK).clamp(max=tokens.total)
    low, high = starts.clamp(first, stop), ends.clamp(first, stop) - 1  # its first and last visual token; none where low > high
    text, visual = (high - low + 1 < ends - starts), low <= high
    apart = low[:, None] - high[None, :]  # (n, n): from the queries' first token to the keys' last
    least, most = torch.maximum(apart, apart.T).clamp(min=0), torch.maximum(-apart, -apart.T)
    zero, radius = torch.zeros_like(least), radius[:, None, None]
    both = visual[:, None] & visual[None, :]
    some = text[:, None] | text[None, :] | (both & masks.near(least, zero, radius))
    every = ~both | masks.near(most, zero, radius)
    every &= (ends - starts == BLOCK)[None, :]  # the sequence's end is looked for in blocks that are kept in part
    return some, every


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (1, H, n), and which, first in their row, (1, H, n, n)."""
    which = blocks.byte().sort(dim=-1, descending=True, stable=True).indices
    return blocks.sum(-1, dtype=torch.int32)[None], which.int()[None]
