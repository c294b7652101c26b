"""Encodes queries and keys of heads in int8, in Triton, by the rule in `kernels/int8.py`.

This file imports triton, so only `ops.py` imports it.
"""

# Triton compiles this function, and gives its arguments types of its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, N803

import triton
import triton.language as tl

from arrowhead.kernels import int8

_LARGEST = tl.constexpr(int8.LARGEST)
_ROUNDING = tl.constexpr(1.5 * 2**23)  # adding it rounds to a whole number, halves to even


@triton.jit
def rounding_kernel(
    values,  # (B, H, N, WIDTH) int8; columns beyond DIM are zero
    scales,  # (B, H, blocks) float32
    x,  # (B, H, N, D)
    mean,  # (B, H, D) float32, to subtract, or None
    policy,  # (H, 3) int32, see `arrow_kernel`
    x_strides,  # of batch, head and row
    n,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Encodes one block of ROWS tokens of one head. COLUMNS is a power of two, and at least WIDTH."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(policy + 3 * head + 2) != 0:
        rows, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        of_both = (batch * tl.num_programs(1) + head).to(tl.int64)
        there = (rows < n)[:, None] & (columns < DIM)[None, :]
        source = x + batch.to(tl.int64) * x_strides[0] + head.to(tl.int64) * x_strides[1]
        own = tl.load(source + rows[:, None].to(tl.int64) * x_strides[2] + columns[None, :], mask=there, other=0.0)
        own = own.to(tl.float32)
        if mean is not None:
            own -= tl.load(mean + of_both * DIM + columns, mask=columns < DIM, other=0.0)[None, :]
            own = tl.where(there, own, 0.0)
        largest = tl.max(tl.max(tl.abs(own), 1), 0)
        scale = tl.where(largest > 0, tl.div_rn(largest, 1.0 * _LARGEST), 1.0)
        whole = (tl.div_rn(own, tl.full([ROWS, COLUMNS], 1.0, tl.float32) * scale) + _ROUNDING) - _ROUNDING
        target = values + (of_both * n + rows[:, None]) * WIDTH + columns[None, :]
        tl.store(target, whole.to(tl.int8), mask=(rows < n)[:, None] & (columns < WIDTH)[None, :])
        tl.store(scales + of_both * tl.num_programs(0) + block, scale)
