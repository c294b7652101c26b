"""The fused kernel, in Triton: one launch for all heads, in which each program computes one block of queries of one head.

The softmax is computed online, in powers of two (FlashAttention-2, arXiv:2307.08691). A block of queries sees two ranges of
keys: the text, and a stretch of visual tokens. The ranges are cut into tiles. Tiles inside a range need no mask, tiles on an
edge do, so there are two loops, each over tiles of both ranges. Text rows and full heads have one range, from the first token
to the last.

Heads in int8 are computed in a second launch, from queries and keys that `rounding.py` encodes. So the launch for native heads
uses no register more.

This file imports triton, so only `ops.py` imports it. Shapes: M queries and T keys in a tile, D = WIDTH + TAIL columns.
"""

# Triton compiles these functions, and gives their arguments types of its own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, PLR0912, PLR0915, RET505, SIM108

import triton
import triton.language as tl

from arrowhead.kernels import int8
from arrowhead.kernels.triton.launch_table import CACHED, FULL, INT8_TAIL, INT8_UNIT

_CACHED = tl.constexpr(CACHED)
_FULL = tl.constexpr(FULL)
_INT8_TAIL = tl.constexpr(INT8_TAIL)
_INT8_UNIT = tl.constexpr(INT8_UNIT)
_QUERIES = tl.constexpr(int8.QUERIES)
_KEYS = tl.constexpr(int8.KEYS)
_FLOOR = tl.constexpr(-1e30)  # the first maximum: finite, so that −∞ − maximum is not NaN while all keys are hidden


@triton.jit
def arrow_kernel(
    out,  # (B, H, N, D)
    q,  # (B, H, N, D); if TMA, a descriptor of it that gives (1, 1, M, WIDTH)
    k,  # the same, of T rows
    v,
    q_tail,  # the same again; if TMA, descriptors that give (1, 1, M or T, TAIL)
    k_tail,
    v_tail,
    q_scales,  # (B, H, blocks) if q and k are in int8, for the blocks of tokens of `int8.py`; else None
    k_scales,
    policy,  # (H, COLUMNS) int32: radius, FULL or CACHED; whether the residual is added; whether scores are in int8
    residual,  # (B, H, V, D), of the visual tokens, or None
    seen,  # (B, N) bool, or None
    out_strides,  # of batch, head and row, in units of UNIT elements
    q_strides,
    k_strides,
    v_strides,
    residual_strides,
    seen_strides,  # of batch and row
    n,
    visual,  # the number of visual tokens, and the index of the first
    visual_start,
    scale,  # of the scores, times log₂ e
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALISED: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes the attention of one block of M queries of one head.

    SPLIT: heads with a radius are full, too, and their residual O − W of the visual tokens is written instead of added.
    """
    INT8: tl.constexpr = q_scales is not None
    QK_UNIT: tl.constexpr = _INT8_UNIT if INT8 else UNIT
    QK_TAIL: tl.constexpr = _INT8_TAIL if INT8 and TAIL else TAIL
    QK_DIM: tl.constexpr = WIDTH + QK_TAIL if INT8 else DIM
    head, batch = tl.program_id(1), tl.program_id(2)
    radius = tl.load(policy + COLUMNS * head)
    if COLUMNS > 2:  # heads of the other launch are skipped, like cached ones
        radius = tl.where((tl.load(policy + COLUMNS * head + 2) != 0) == INT8, radius, _CACHED)
    if radius != _CACHED:
        text = n - visual
        text_start = tl.where(visual_start > 0, 0, visual)
        text_blocks = _divided(text, M)
        block = tl.program_id(0)
        of_text = block < text_blocks  # text rows see most keys, so they come first
        first = tl.where(of_text, text_start + block * M, visual_start + (block - text_blocks) * M)
        end = tl.where(of_text, text_start + text, visual_start + visual)  # the end of the text, or of the visual tokens
        rows = first + tl.arange(0, M)

        # the stretch of keys that holds the band, and the text; for text rows and full heads one stretch, all of it in the band
        whole = of_text | (radius == _FULL)
        start = tl.where(whole, 0, visual_start)
        length = tl.where(whole, n, visual)
        radius = tl.where(whole, n, tl.minimum(radius, n))
        text = tl.where(whole, 0, text)

        # of the stretch, tiles t0 … t3 overlap the band, and tiles t1 … t2 lie inside it
        top, bottom = first - start, tl.minimum(first + M, end) - 1 - start
        t0 = tl.maximum(top - radius, 0) // T
        t3 = _divided(tl.minimum(bottom + radius + 1, length), T)
        if SPECIALISED:  # the compiler allows one loop only, so every tile is masked
            text_tiles, t1, t2 = 0, t0, t0
        else:
            text_tiles = text // T
            t1 = _divided(tl.maximum(bottom - radius, 0), T)
            t2 = tl.maximum(tl.minimum(top + radius + 1, length) // T, t1)

        q_stride, k_stride, v_stride = 0, 0, 0  # descriptors know their strides
        if not TMA:
            q, q_stride = _of_head(q, q_strides, batch, head, QK_UNIT)
            k, k_stride = _of_head(k, k_strides, batch, head, QK_UNIT)
            v, v_stride = _of_head(v, v_strides, batch, head, UNIT)
            q_tail, k_tail, v_tail = q, k, v
        if seen is not None:
            seen += batch.to(tl.int64) * seen_strides[0]
        factor = scale
        if INT8:
            of_both = batch * tl.num_programs(1) + head
            k_scales += of_both * _divided(n, _KEYS)
            q_scales += of_both * _divided(n, _QUERIES)
            factor = scale * tl.load(q_scales + rows // _QUERIES, mask=rows < end, other=1.0)  # (M,)
        queries = _rows(q, batch, head, first, q_stride, end, 0, WIDTH, QK_DIM, M, TMA, True)  # (M, WIDTH)
        queries_tail = queries
        if TAIL:
            queries_tail = _rows(q_tail, batch, head, first, q_stride, end, WIDTH, QK_TAIL, QK_DIM, M, TMA, True)
        keys = k, k_tail, k_stride, k_scales, v, v_tail, v_stride, seen, seen_strides[1]
        at = batch, head, n, rows

        acc = tl.zeros([M, WIDTH], tl.float32)
        acc_tail = tl.zeros([M, TAIL if TAIL else 16], tl.float32)
        peak = tl.full([M], _FLOOR, tl.float32)
        total = tl.zeros([M], tl.float32)

        if not SPECIALISED:
            tiles = text_tiles, text_start, 0, text_tiles + t2 - t1, start + t1 * T, 0, 0, 0, n
            acc, acc_tail, peak, total = _scan(
                acc, acc_tail, peak, total, queries, queries_tail, keys, at, tiles, factor,
                DIM, WIDTH, TAIL, QK_DIM, QK_TAIL, T, TMA, False, False, False,
            )  # fmt: skip
        rest = _divided(text - text_tiles * T, T)
        tiles = (
            rest, text_start + text_tiles * T, text_start + text,
            rest + t3 - t0 - (t2 - t1), start + t0 * T, start + length, t1 - t0, t2 - t1, radius,
        )  # fmt: skip
        acc, acc_tail, peak, total = _scan(
            acc, acc_tail, peak, total, queries, queries_tail, keys, at, tiles, factor,
            DIM, WIDTH, TAIL, QK_DIM, QK_TAIL, T, TMA, True, False, SPECIALISED,
        )  # fmt: skip

        # the residual of the visual tokens, to add or to write
        if residual is not None:
            residual, r_stride = _of_head(residual, residual_strides, batch, head, UNIT)
            row = first - visual_start  # rows up to `r_end`, which is `row` where there is nothing to add or write
            if SPLIT:
                r_end = tl.where(whole, row, visual)
                # W is parked in the residual's buffer, so that one accumulator is enough
                divisor = tl.where(total == 0, 1.0, total)[:, None]
                _put(residual, acc / divisor, row, r_stride, r_end, 0, WIDTH, DIM, M)
                if TAIL:
                    _put(residual, acc_tail / divisor, row, r_stride, r_end, WIDTH, TAIL, DIM, M)
                # then the rest: tiles before t0 and from t3 on, an incomplete last one, and the other pairs of the edges
                inner = tl.maximum(length // T, t3)
                tiles = 0, 0, 0, tl.where(whole, 0, inner - (t3 - t0)), start, 0, t0, t3 - t0, 0
                acc, acc_tail, peak, total = _scan(
                    acc, acc_tail, peak, total, queries, queries_tail, keys, at, tiles, factor,
                    DIM, WIDTH, TAIL, QK_DIM, QK_TAIL, T, TMA, False, False, False,
                )  # fmt: skip
                rest = _divided(length - inner * T, T)
                tiles = (
                    rest, start + inner * T, start + length,
                    tl.where(whole, 0, rest + t3 - t0 - (t2 - t1)), start + t0 * T, start + length, t1 - t0, t2 - t1, radius,
                )  # fmt: skip
                acc, acc_tail, peak, total = _scan(
                    acc, acc_tail, peak, total, queries, queries_tail, keys, at, tiles, factor,
                    DIM, WIDTH, TAIL, QK_DIM, QK_TAIL, T, TMA, True, True, False,
                )  # fmt: skip
                tl.debug_barrier()  # threads read what other threads wrote
            else:
                added = tl.load(policy + COLUMNS * head + 1) != 0
                r_end = tl.where(of_text | ~added, row, visual)
            other = _rows(residual, batch, head, row, r_stride, r_end, 0, WIDTH, DIM, M, False, True)  # (M, WIDTH)
            other_tail = other
            if TAIL:
                other_tail = _rows(residual, batch, head, row, r_stride, r_end, WIDTH, TAIL, DIM, M, False, True)  # (M, TAIL)
            if SPLIT:
                tl.debug_barrier()  # write only after all threads have read

        divisor = tl.where(total == 0, 1.0, total)[:, None]  # a query that sees no key gives 0
        acc = acc / divisor
        acc_tail = acc_tail / divisor
        if residual is not None:
            if SPLIT:
                _put(residual, acc - other, row, r_stride, r_end, 0, WIDTH, DIM, M)
                if TAIL:
                    _put(residual, acc_tail - other_tail, row, r_stride, r_end, WIDTH, TAIL, DIM, M)
            else:
                acc += other
                if TAIL:
                    acc_tail += other_tail
        out, out_stride = _of_head(out, out_strides, batch, head, UNIT)
        _put(out, acc, first, out_stride, end, 0, WIDTH, DIM, M)
        if TAIL:
            _put(out, acc_tail, first, out_stride, end, WIDTH, TAIL, DIM, M)


@triton.jit
def _scan(
    acc,
    acc_tail,
    peak,
    total,
    q,
    q_tail,
    keys,
    at,
    tiles,
    factor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    QK_DIM: tl.constexpr,
    QK_TAIL: tl.constexpr,
    T: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
    OUTSIDE: tl.constexpr,
    SPECIALISED: tl.constexpr,
):
    """Continues the softmax over some tiles of keys.

    The tiles are in two runs, each with its start and end: `aside` tiles of text, in which all keys are seen, and tiles of the
    band's stretch, without those from `left` to `left + gap`. OUTSIDE: the pairs of the stretch beyond the radius are kept
    instead of those within it. `factor` multiplies the scores: one number, or in int8 one for each query.
    """
    k, k_tail, k_stride, k_scales, v, v_tail, v_stride, seen, seen_stride = keys
    batch, head, n, rows = at
    aside, aside_start, aside_end, count, start, end, left, gap, radius = tiles
    for tile in tl.range(0, count, warp_specialize=SPECIALISED):
        beside = tile < aside
        own = tile - aside
        first = tl.where(beside, aside_start + tile * T, start + (own + tl.where(own >= left, gap, 0)) * T)
        columns = first + tl.arange(0, T)
        scores = tl.dot(q, _rows(k, batch, head, first, k_stride, n, 0, WIDTH, QK_DIM, T, TMA, MASKED).T)  # (M, T)
        if TAIL:
            other = _rows(k_tail, batch, head, first, k_stride, n, WIDTH, QK_TAIL, QK_DIM, T, TMA, MASKED)
            scores = tl.dot(q_tail, other.T, scores)
        if k_scales is not None:
            scores = scores.to(tl.float32) * tl.load(k_scales + columns // _KEYS, mask=columns < n, other=1.0)[None, :]
        if MASKED:
            distance = tl.abs(rows[:, None] - columns[None, :])
            if OUTSIDE:
                kept = distance > tl.where(beside, -1, radius)
            else:
                kept = distance <= tl.where(beside, n, radius)
            kept = kept & (columns < tl.where(beside, aside_end, end))[None, :]
            scores = tl.where(kept, scores, float("-inf"))
        if seen is not None:
            visible = tl.load(seen + columns * seen_stride, mask=columns < n, other=0) != 0
            scores = tl.where(visible[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * factor)  # (M,)
        weights = tl.exp2(scores * (factor if k_scales is None else factor[:, None]) - higher[:, None])  # (M, T)
        shrink = tl.exp2(peak - higher)
        peak = higher
        total = total * shrink + tl.sum(weights, 1)
        values = _rows(v, batch, head, first, v_stride, n, 0, WIDTH, DIM, T, TMA, MASKED)
        weights = weights.to(values.dtype)
        acc = tl.dot(weights, values, acc * shrink[:, None])  # (M, WIDTH)
        if TAIL:
            values = _rows(v_tail, batch, head, first, v_stride, n, WIDTH, TAIL, DIM, T, TMA, MASKED)
            acc_tail = tl.dot(weights, values, acc_tail * shrink[:, None])  # (M, TAIL)
    return acc, acc_tail, peak, total


@triton.jit
def _divided(a, b: tl.constexpr):
    """⌈a / b⌉ for a ≥ 0."""
    return (a + b - 1) // b


@triton.jit
def _of_head(source, strides, batch, head, UNIT: tl.constexpr):
    """The pointer to a head's first row, and the stride of its rows."""
    # UNIT is a constant, so that the compiler knows how many elements it can move at once
    return source + (batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]) * UNIT, strides[2] * UNIT


@triton.jit
def _rows(
    source,
    batch,
    head,
    first,
    stride,
    end,
    START: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Loads rows from `first` on and columns from START on: (ROWS, COLUMNS), 0 beyond DIM and, if EDGE, from row `end` on."""
    if TMA:
        return source.load([batch, head, first, START]).reshape(ROWS, COLUMNS)
    else:  # in a branch, because Triton would else compile it for a descriptor, too
        rows = tl.arange(0, ROWS)[:, None]
        columns = START + tl.arange(0, COLUMNS)[None, :]
        places = source + first.to(tl.int64) * stride + rows * stride + columns
        if EDGE:
            return tl.load(places, mask=(first + rows < end) & (columns < DIM), other=0.0)
        elif START + COLUMNS > DIM:
            return tl.load(places, mask=columns < DIM, other=0.0)
        else:
            return tl.load(places)


@triton.jit
def _put(
    target,
    value,
    first,
    stride,
    end,
    START: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Stores (ROWS, COLUMNS) at rows from `first` up to `end`, and columns from START up to DIM."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = START + tl.arange(0, COLUMNS)[None, :]
    places = target + first.to(tl.int64) * stride + rows * stride + columns
    tl.store(places, value.to(target.dtype.element_ty), mask=(first + rows < end) & (columns < DIM))
