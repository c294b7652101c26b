"""Bands by torch's FlexAttention, compiled: blocks of queries × keys are computed whole, in part, or not at all.

A block's kind follows from its first and last tokens, where |i − j| is smallest and largest. The radii are a tensor that the
compiled kernel reads. So it is compiled once (in seconds) for a layout, the shapes of q, k and v, and serves all policies.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.flop_formulas import count_pairs
from arrowhead.plans import masks
from arrowhead.plans.cells import Box
from arrowhead.plans.layout import Tokens
from arrowhead.upstream import dispatch_mode_is_active, is_compiler_error, no_dispatch_modes, recompile_limit

BLOCK = 128  # tokens on each side of a block
LAYOUTS = 64  # compiled at most. By torch's default of 8, FlexAttention would then run uncompiled, and store N² scores
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(call: Call) -> Tensor:
    """Arrow attention of a call, (B, H, N, D), in the dtype of `q`. The model's own mask is read without a copy.

    Raises:
        KernelUnavailable: the call has what FlexAttention cannot compute: another device than CUDA and CPU, gradients on a CPU,
            another dtype than float32, bfloat16 and float16, a head dim that FlexAttention refuses, heads in int8, or boxes;
            or there is no C++ compiler, or there are more than 64 layouts.
    """
    q, k, v, mask = call.q, call.k, call.v, call.mask
    _refuse(call)
    if q.is_cpu:  # contiguous tensors are a third faster than the views that processors make
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    score_mod = None if mask is None else _model_mask(mask.expand(*q.shape[:3], k.shape[2]))
    tokens, blocks = call.tokens, _block_mask(call.tokens, call.policies, q.device)
    if dispatch_mode_is_active():
        radii = [tokens.visual if policy.radius is None else policy.radius for policy in call.policies]
        count_pairs(q, q.shape[0] * sum(computed_pairs(tokens, radius) for radius in radii if isinstance(radius, int)))
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
    """Raises KernelUnavailable for what FlexAttention cannot compute."""
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
    """FlexAttention, compiled. Imported late, because it imports torch's compiler, which `import arrowhead` does not."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _model_mask(mask: Tensor) -> ScoreMod:
    """The model's own mask, (B, H, N, N) by strides, as a change of scores: boolean, or added to them."""
    if mask.dtype == torch.bool:
        return lambda score, b, h, i, j: torch.where(mask[b, h, i, j], score, -torch.inf)
    return lambda score, b, h, i, j: score + mask[b, h, i, j]


@lru_cache(maxsize=32)
def _block_mask(tokens: Tokens, policies: tuple[Policy, ...], device: torch.device) -> Any:
    """The blocks of each head, and the mask within those that are computed in part."""
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415

    first, stop = tokens.visual_slice.start, tokens.visual_slice.stop
    with torch.inference_mode(False):  # the cached tensors are also used outside of inference mode
        radii = [policy.radius if isinstance(policy.radius, int) else tokens.visual for policy in policies]
        radius = torch.tensor(radii, device=device)
        some, every = block_kinds(tokens, radius)

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001
            text = (i < first) | (i >= stop) | (j < first) | (j >= stop)
            return text | masks.near(i, j, radius[h])

        return BlockMask.from_kv_blocks(
            *_listed(some & ~every), *_listed(every), BLOCK, mask_mod=mask_mod, seq_lengths=(tokens.total, tokens.total)
        )


def block_kinds(tokens: Tokens, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks in which some pair is kept, and those in which every pair is: boolean, (H, n, n), for radii (H,)."""
    first, stop = tokens.visual_slice.start, tokens.visual_slice.stop
    starts = torch.arange(0, tokens.total, BLOCK, device=radius.device)
    ends = (starts + BLOCK).clamp(max=tokens.total)
    low, high = (
        starts.clamp(first, stop),
        ends.clamp(first, stop) - 1,
    )  # first and last visual token; none where low > high
    text, visual = (high - low + 1 < ends - starts), low <= high
    distance = low[:, None] - high[None, :]  # (n, n): from the last key to the first query
    least, most = torch.maximum(distance, distance.T).clamp(min=0), torch.maximum(-distance, -distance.T)
    zero, radius = torch.zeros_like(least), radius[:, None, None]
    both = visual[:, None] & visual[None, :]
    some = text[:, None] | text[None, :] | (both & masks.near(least, zero, radius))
    every = ~both | masks.near(most, zero, radius)
    every &= (ends - starts == BLOCK)[None, :]  # a block beyond the sequence's end needs a mask
    return some, every


@lru_cache(maxsize=2**10)
def computed_pairs(tokens: Tokens, radius: int) -> int:
    """The query–key pairs of the blocks in which some pair is kept."""
    some, _ = block_kinds(tokens, torch.tensor([radius]))
    sizes = (tokens.total - torch.arange(0, tokens.total, BLOCK)).clamp(max=BLOCK)
    return int((some[0] * sizes[:, None] * sizes[None, :]).sum())


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries, the number of its blocks of keys, (1, H, n), and their indices first, (1, H, n, n)."""
    which = blocks.byte().sort(dim=-1, descending=True, stable=True).indices
    return blocks.sum(-1, dtype=torch.int32)[None], which.int()[None]
