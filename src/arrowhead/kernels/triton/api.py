"""The fused kernel as `dispatch` calls it, and what it can compute. Triton is imported when the kernel first runs.

`ops.py` has its operators, which write into the caller's buffers.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.triton.launch_table import FULL, HEAD_DIMS, UNIT, chosen
from arrowhead.plans.cells import Box

OLDEST = (8, 0)
"""The lowest compute capability that the kernel runs on: Ampere."""


def attend(call: Call) -> Tensor:
    """Arrow attention of a call, (B, H, N, D), with residuals added.

    The result has the dtype of `q`, and its strides where they leave no gaps.

    Raises:
        KernelUnavailable: the kernel cannot compute the call: see `obstacle`.
    """
    reason = obstacle(call)
    if reason is not None:
        raise KernelUnavailable(f'kernel="fused": {reason}, or use kernel="chunked" or "auto"')
    from arrowhead.kernels.triton import ops  # noqa: PLC0415 - it imports triton

    q, k, v = map(_contiguous_rows, (call.q, call.k, call.v))
    residual = None if call.residual is None else _contiguous_rows(call.residual)
    out = torch.empty_like(q)
    tokens, mask = call.tokens, call.mask
    seen = None if mask is None else mask.expand(q.shape[0], 1, 1, tokens.total)[:, 0, 0]  # (B, N)
    policy = _policy(call.policies, call.adds, q.device)
    ops.arrow(out, q, k, v, policy, residual, seen, tokens.visual, tokens.visual_slice.start, call.scale)
    return out


def tile(call: Call) -> tuple[int, int]:
    """Queries and keys in a tile of the kernel that computes a call."""
    q, n = call.q, call.tokens.total
    described = all(
        tensor.data_ptr() % 16 == 0 and all(stride and stride % UNIT == 0 for stride in tensor.stride()[:3])
        for tensor in (q, call.k, call.v)
    )
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else OLDEST
    config = chosen(q.shape[-1], n, capability, described=described, spare=call.mask is not None)
    return config.queries, config.keys


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def obstacle(call: Call) -> str | None:
    """Why the kernel cannot compute a call: "got ..., wanted ...; remedy". None where it can."""
    return next(_obstacles(call), None)


def _obstacles(call: Call) -> Iterator[str]:
    q, scale, mask = call.q, call.scale, call.mask
    dtypes = [torch.bfloat16, torch.float16]
    if find_spec("triton") is None:
        yield "got no triton, wanted 3.6 or later; pip install arrowhead[gpu]"
    if q.is_cuda:
        capability = torch.cuda.get_device_capability(q.device)
        if capability < OLDEST:
            yield f"got a device of compute capability {capability}, wanted {OLDEST} or later; take another device"
    else:
        dtypes = [torch.float16, torch.float32]  # the interpreter multiplies bfloat16 wrongly
        if os.environ.get("TRITON_INTERPRET") != "1":
            yield f"got tensors on {q.device}, wanted a CUDA device; move the pipeline there"
    if q.dtype not in dtypes:
        yield f"got {q.dtype}, wanted {' or '.join(map(str, dtypes))}; cast the pipeline"
    if any(isinstance(policy.radius, Box) for policy in call.policies):
        yield "got a Box, wanted radii in tokens; search again without boxes"
    if q.shape[-1] not in HEAD_DIMS:
        yield f"got head dim {q.shape[-1]}, wanted one of {', '.join(map(str, HEAD_DIMS))}; take another model"
    if scale <= 0:
        yield f"got scale {scale}, wanted one above 0; negate the queries"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] > 1 or mask.shape[2] > 1):
        yield (
            f"got a {mask.dtype} mask of shape {tuple(mask.shape)}, wanted a boolean mask of keys, (B, 1, 1, N); make it one "
            "that is the same for every head and query"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, call.k, call.v)):
        yield "got queries, keys or values that require a gradient, wanted inference; use torch.no_grad()"


@lru_cache(maxsize=2**14)  # a head-wise plan needs another policy for every site and step
def _policy(policies: tuple[Policy, ...], adds: tuple[int, ...], device: torch.device) -> Tensor:
    """The policies as the operators take them: (H, 2) int32, or (H, 3) where heads are in int8.

    Cached, because a copy to the device costs more than the kernel's launch. Copied from pinned memory, so that the copy does
    not wait for the work that the device has queued.
    """
    with torch.inference_mode(False):
        rows = [
            [min(policy.radius, 2**31 - 1) if isinstance(policy.radius, int) else FULL, head in adds]
            for head, policy in enumerate(policies)
        ]
        if any(policy.precision == "int8" for policy in policies):
            rows = [[*row, policy.precision == "int8"] for row, policy in zip(rows, policies, strict=True)]
        made = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
        return made.to(device, non_blocking=True)
