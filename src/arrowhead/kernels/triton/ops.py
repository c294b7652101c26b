"""The fused kernel as two operators of torch, which write their results into buffers of the caller. Imports triton.

A head's policy is two or three int32 numbers in device memory: its radius in visual tokens, or FULL or CACHED
(`launch_table.py`); whether its residual is added; and, if there is a third number, whether its scores are in int8. So a plan
that changes in every step is one graph under `torch.compile`. The rows of cached heads are neither read nor written in any
buffer, except that keys are read for their mean where some heads are in int8.
"""

import math

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from arrowhead.kernels import int8
from arrowhead.kernels.triton import launch_table
from arrowhead.kernels.triton.kernel import arrow_kernel
from arrowhead.kernels.triton.launch_table import CACHED, FULL, HEAD_DIMS, INT8_TAIL, INT8_UNIT, UNIT
from arrowhead.kernels.triton.rounding import rounding_kernel
from arrowhead.plans import masks
from arrowhead.plans.layout import Tokens
from arrowhead.upstream import is_fake


@torch.library.custom_op("arrowhead::arrow", mutates_args={"out"})
def arrow(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    residual: Tensor | None,
    seen: Tensor | None,
    visual: int,
    visual_start: int,
    scale: float,
) -> None:
    """Writes the attention of each head under its policy into `out`.

    `out`, `q`, `k` and `v` are (B, H, N, D) of one dtype, with any strides as long as the last dimension is contiguous.
    `policy` is (H, 2) int32; or (H, 3) where heads may be in int8, for four more launches. `residual`, (B, H, V, D), is added
    to the visual rows of the heads whose policy says so. `seen`, (B, N) bool, is a mask of keys; a query that sees none
    gives 0. The `visual` tokens are those from `visual_start` on, which is 0 or N − V. `scale`, above 0, multiplies the scores.
    """
    _launch(out, q, k, v, policy, residual, seen, visual, visual_start, scale, split=False)


@torch.library.custom_op("arrowhead::full_and_residual", mutates_args={"out", "residual"})
def full_and_residual(
    out: Tensor,
    residual: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    seen: Tensor | None,
    visual: int,
    visual_start: int,
    scale: float,
) -> None:
    """Writes full attention O into `out`, and O − W of the visual tokens into `residual`, in one pass over the keys.

    W is the attention of the head's band. Heads without a radius leave `residual` as it is. All else is as for `arrow`.
    """
    _launch(out, q, k, v, policy, residual, seen, visual, visual_start, scale, split=True)


# the results have the shapes and strides of the buffers
arrow.register_fake(lambda *_: None)
full_and_residual.register_fake(lambda *_: None)


@register_flop_formula(torch.ops.arrowhead.arrow, get_raw=True)
def _arrow_flops(
    _out: Tensor,
    q: Tensor,
    _k: Tensor,
    _v: Tensor,
    policy: Tensor,
    _residual: Tensor | None,
    _seen: Tensor | None,
    visual: int,
    visual_start: int,
    _scale: float,
    **_: object,
) -> int:
    """4·D for each query–key pair that the policy keeps; for every pair where tensors are fake, and the policy unknown."""
    batch, heads, n, dim = q.shape
    tokens = Tokens(visual, n - visual, visual_start > 0)
    kept = [masks.pairs(tokens, None if radius == FULL else radius) for radius in _radii(policy, heads) if radius != CACHED]
    return 4 * dim * batch * sum(kept)


@register_flop_formula(torch.ops.arrowhead.full_and_residual, get_raw=True)
def _full_and_residual_flops(
    _out: Tensor, _residual: Tensor, q: Tensor, _k: Tensor, _v: Tensor, policy: Tensor, *_: object, **__: object
) -> int:
    """4·D for every pair, once. The kernel's second pass over the tiles on the band's edges does not count."""
    batch, heads, n, dim = q.shape
    return 4 * dim * batch * n**2 * sum(radius != CACHED for radius in _radii(policy, heads))


def _radii(policy: Tensor, heads: int) -> list[int]:
    """The radius of each head, FULL or CACHED; FULL for all where the policy has no values."""
    return [FULL] * heads if is_fake(policy) or policy.is_meta else policy[:, 0].tolist()


def _launch(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    residual: Tensor | None,
    seen: Tensor | None,
    visual: int,
    visual_start: int,
    scale: float,
    *,
    split: bool,
) -> None:
    _require(out, q, k, v, policy, residual, seen, visual, scale, split=split)
    operands = out, v, policy, residual, seen, visual, visual_start, scale
    _attend(q, k, None, None, *operands, split=split)
    if policy.shape[1] > 2:
        q, q_scales = _rounded(q, None, policy, int8.QUERIES)
        k, k_scales = _rounded(k, k.mean(2, dtype=torch.float32), policy, int8.KEYS)
        _attend(q, k, q_scales, k_scales, *operands, split=split)


def _rounded(x: Tensor, mean: Tensor | None, policy: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Encodes queries or keys as in `int8.py`: (B, H, N, width) int8 and scales (B, H, blocks), undefined for native heads."""
    batch, heads, n, dim = x.shape
    width, tail = HEAD_DIMS[dim]
    values = x.new_empty(batch, heads, n, width + (tail and INT8_TAIL), dtype=torch.int8)
    scales = x.new_empty(batch, heads, -(-n // block), dtype=torch.float32)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        rounding_kernel[scales.shape[2], heads, batch](
            values, scales, x, mean, policy, x.stride()[:3], n,
            DIM=dim, WIDTH=values.shape[3], COLUMNS=triton.next_power_of_2(values.shape[3]), ROWS=block,
            enable_fp_fusion=False,
        )  # fmt: skip
    return values, scales


def _attend(
    q: Tensor,
    k: Tensor,
    q_scales: Tensor | None,
    k_scales: Tensor | None,
    out: Tensor,
    v: Tensor,
    policy: Tensor,
    residual: Tensor | None,
    seen: Tensor | None,
    visual: int,
    visual_start: int,
    scale: float,
    *,
    split: bool,
) -> None:
    """Launches the kernel once: for the heads in int8, whose `q` and `k` are encoded, or for the native heads."""
    batch, heads, n, dim = v.shape
    int8 = q_scales is not None
    in_dtype = [tensor for tensor in (out, v, residual, *(() if int8 else (q, k))) if tensor is not None]
    unit = UNIT if all(stride % UNIT == 0 for tensor in in_dtype for stride in tensor.stride()[:3]) else 1
    described = unit == UNIT and all(_describable(tensor) for tensor in (q, k, v))
    spare = split or seen is not None
    config = launch_table.chosen(dim, n, _architecture(v), described=described, spare=spare)
    width, tail = HEAD_DIMS[dim]
    tma = config.variant != "pointers"
    wide = tails = (q, k, v)
    if tma:
        qk_tail = INT8_TAIL if int8 and tail else tail
        wide, tails = (
            tuple(
                TensorDescriptor.from_tensor(tensor, [1, 1, rows, columns or width])
                for tensor, rows, columns in zip((q, k, v), (config.queries, config.keys, config.keys), parts, strict=True)
            )
            for parts in ((width,) * 3, (qk_tail, qk_tail, tail))
        )
    units = unit, *((INT8_UNIT,) * 2 if int8 else (unit,) * 2), unit, unit
    blocks = -(-visual // config.queries) + -(-(n - visual) // config.queries)
    with torch.cuda.device_of(v):  # type: ignore[no-untyped-call]
        arrow_kernel[blocks, heads, batch](
            out, *wide, *tails, q_scales, k_scales, policy, residual, seen,
            *map(_strides, (out, q, k, v, residual), units),
            (0, 0) if seen is None else seen.stride(),
            n, visual, visual_start, scale * math.log2(math.e),
            UNIT=unit, DIM=dim, WIDTH=width, TAIL=tail, M=config.queries, T=config.keys,
            TMA=tma, SPECIALISED=config.variant == "specialised", SPLIT=split, COLUMNS=policy.shape[1],
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _require(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    residual: Tensor | None,
    seen: Tensor | None,
    visual: int,
    scale: float,
    *,
    split: bool,
) -> None:
    """Check all operands, because the kernel itself would read and write beyond them."""
    batch, heads, n, dim = q.shape
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {"k": (k, q.shape), "v": (v, q.shape), "out": (out, q.shape)}
    in_int8 = policy.shape[-1] == 3 and not split  # residuals are made from native full attention alone
    shapes["policy"] = policy, (heads, 3 if in_int8 else 2)
    if residual is not None:
        shapes["residual"] = residual, (batch, heads, visual, dim)
    if seen is not None:
        shapes["seen"] = seen, (batch, n)
    for name, (tensor, shape) in shapes.items():
        dtype = {"policy": torch.int32, "seen": torch.bool}.get(name, q.dtype)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device:
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: got {got}, wanted {tuple(shape)} {dtype} on {q.device}")
    if dim not in HEAD_DIMS or scale <= 0 or not policy.is_contiguous():
        raise ValueError(
            f"got head dim {dim}, scale {scale} and a policy with strides {policy.stride()}, wanted one of "
            f"{', '.join(map(str, HEAD_DIMS))}, a scale above 0 and a contiguous policy"
        )
    rows = {"q": q, "k": k, "v": v, "out": out, **({} if residual is None else {"residual": residual})}
    for name, tensor in rows.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: got strides {tensor.stride()}, wanted the last one to be 1")


def _describable(tensor: Tensor) -> bool:
    """Whether a hardware descriptor can describe a tensor whose strides are multiples of UNIT."""
    return tensor.data_ptr() % 16 == 0 and all(tensor.stride()[:3])


def _architecture(tensor: Tensor) -> tuple[int, int]:
    """The compute capability; the oldest for Triton's interpreter."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)


def _strides(tensor: Tensor | None, unit: int) -> tuple[int, ...]:
    """The strides of batch, head and row, in units of `unit` elements."""
    return (0, 0, 0) if tensor is None else tuple(stride // unit for stride in tensor.stride()[:3])
