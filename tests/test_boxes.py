"""Boxes in the tokens' grid: the pairs they keep, kernels against dense attention, and what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from independent import boxes, dense_mask, few, grid_layouts, in_box
from test_int8 import dense as dense_int8
from test_int8 import exact_qkv
from test_kernels import dense, every_kernel, random_mask, random_qkv
from test_windows import LargestStorage

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import dispatch
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.cpu import boxes as cpu_boxes
from arrowhead.kernels.cpu import chunked
from arrowhead.plans import masks
from arrowhead.plans.cells import Arrow, Box
from arrowhead.plans.layout import Grid, Tokens

ALL = Box()
RADII = st.none() | st.integers(0, 40) | boxes


@few
@given(tokens=grid_layouts(), box=boxes)
def test_the_mask_and_the_number_of_pairs_are_those_of_the_definition(tokens, box):
    mask = masks.arrow(tokens, box)
    assert torch.equal(mask, dense_mask(tokens, box))
    assert masks.pairs(tokens, box) == int(mask.sum())
    assert masks.covers(tokens, box) is bool(mask.all())
    assert torch.equal(mask, mask.T)


@few
@given(tokens=grid_layouts(), box=st.builds(Box, *[st.integers(0, 5)] * 3))
def test_a_query_sees_at_least_the_radius_and_less_than_twice_as_far(tokens, box):
    places = [(f, r, c) for f in range(tokens.grid.frames) for r in range(tokens.grid.rows) for c in range(tokens.grid.columns)]
    reaches = box.frames, box.rows, box.columns
    for a, row in zip(places, in_box(tokens, box), strict=True):
        for b, seen in zip(places, row, strict=True):
            apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
            assert seen or any(own > reach for own, reach in zip(apart, reaches, strict=True))
            assert not seen or all(own < max(2 * reach, 1) for own, reach in zip(apart[1:], reaches[1:], strict=True))


@every_kernel
@few
@given(
    tokens=grid_layouts(),
    radii=st.lists(RADII, min_size=1, max_size=4),
    batch=st.integers(1, 2),
    kind=st.sampled_from([None, "padding", "one", "two dimensions", "each", "each row"]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_dense_attention(kernel, tokens, radii, batch, kind, scale, seed):
    q, k, v = random_qkv(tokens, batch, len(radii), 4, seed=seed)
    kind = None if kind == "padding" and not tokens.text else kind  # some queries would see nothing
    mask = None if kind is None else random_mask(kind, tokens, radii, (batch, len(radii)), seed)
    out = dispatch.arrow(q, k, v, tokens, radii, scale=scale, mask=mask, kernel=kernel)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radii, scale, mask), atol=2e-6, rtol=2e-5)


@every_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
def test_half_precision_is_kept(kernel, dtype, tolerance):
    tokens, radii = Tokens.of_grid(2, 9, 7, text=4), (Box(0, 2, 3), None, Box(1, 4, None))
    q, k, v = random_qkv(tokens, dtype=dtype)
    out = dispatch.arrow(q, k, v, tokens, radii, kernel=kernel)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radii), atol=tolerance, rtol=tolerance)


@every_kernel
def test_scores_in_int8(kernel):
    tokens, radii, precisions = Tokens.of_grid(3, 10, 9, text=5), (Box(1, 3, 4), None, Box(0)), ("int8", "int8", "native")
    q, k, v = exact_qkv(tokens, dim=16)
    out = dispatch.arrow(q, k, v, tokens, radii, precision=precisions, kernel=kernel)
    torch.testing.assert_close(out.double(), dense_int8(q, k, v, tokens, radii, precisions), atol=3e-5, rtol=3e-4)


def test_gradients_are_those_of_dense_attention():
    tokens, radii = Tokens.of_grid(2, 5, 4, text=3), (Box(1, 2, 2), None, 3)
    inputs = random_qkv(tokens, dtype=torch.float64)
    towards = torch.randn_like(inputs[0])
    gradients = []
    for attend in (dense, lambda *args: dispatch.arrow(*args, kernel="chunked")):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        attend(*leaves, tokens, radii).backward(towards)
        gradients.append([leaf.grad for leaf in leaves])
    for ours, wanted in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-11, rtol=1e-9)


@every_kernel
@pytest.mark.parametrize("box", [ALL, Box(2), Box(5, 8, 8), Box(None, 4, 5), Box(2, 7, None)])
def test_a_box_that_covers_everything_is_full_attention(kernel, box):
    tokens = Tokens.of_grid(3, 7, 10, text=2)
    assert masks.covers(tokens, box)
    q, k, v = random_qkv(tokens)
    full = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(dispatch.arrow(q, k, v, tokens, box, kernel=kernel), full, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("grid", "box", "radius"),
    [
        ((9, 1, 1), Box(3), 3),  # frames of one token
        ((9, 1, 1), Box(0), 0),
        ((1, 1, 9), Box(columns=1), 1),  # one row, in blocks of one
        ((1, 9, 1), Box(rows=1), 1),
        ((2, 3, 4), Box(0, 0, 0), 0),
        ((1, 4, 5), Box(None, None, 5), 19),
    ],
)
def test_where_a_box_is_a_band_of_the_sequence(grid, box, radius):
    tokens = Tokens.of_grid(*grid, text=2, text_first=True)
    assert torch.equal(masks.arrow(tokens, box), masks.arrow(tokens, radius))


def test_no_masked_pair_is_computed(monkeypatch):
    """Torch computes exactly the pairs that are kept, without a mask."""
    tokens, box, pairs, real = Tokens.of_grid(3, 13, 10, text=6), Box(1, 4, 3), [], F.scaled_dot_product_attention

    def counted(q, k, v, attn_mask=None, scale=None):
        assert attn_mask is None
        pairs.append(q[..., 0].numel() * k.shape[-2])
        return real(q, k, v, scale=scale)

    for module in (chunked, cpu_boxes):
        monkeypatch.setattr(module, "TORCH_ATTENTION", counted)
    dispatch.arrow(*random_qkv(tokens, 1, 2), tokens, box, kernel="chunked")
    assert sum(pairs) == 2 * int(dense_mask(tokens, box).sum())


def test_memory_is_a_small_part_of_all_pairs():
    tokens = Tokens.of_grid(4, 32, 32)
    q, k, v = random_qkv(tokens, batch=1, heads=2)
    cpu_boxes.blocks.cache_clear()
    with LargestStorage() as largest:
        dispatch.arrow(q, k, v, tokens, Box(1, 4, 4), kernel="chunked")
    assert q.nbytes <= largest.bytes < 4 * 4096**2 / 10


def test_grids_of_one_size_are_told_apart():
    """Cached blocks of one grid are not used for another grid."""
    box = Box(rows=2, columns=2)
    for tokens in (Tokens.of_grid(1, 4, 9), Tokens.of_grid(1, 9, 4), Tokens.of_grid(2, 3, 6)):
        q, k, v = random_qkv(tokens)
        out = dispatch.arrow(q, k, v, tokens, box, kernel="chunked")
        torch.testing.assert_close(out.double(), dense(q, k, v, tokens, [box] * 3), atol=2e-6, rtol=2e-5)


@every_kernel
def test_tokens_whose_grid_is_not_known_are_refused(kernel):
    q, k, v = random_qkv(Tokens(12))
    with pytest.raises(ValueError, match="whose grid is not known; wanted tokens of a known grid; take a radius in tokens"):
        dispatch.arrow(q, k, v, Tokens(12), Box(0, 1, 1), kernel=kernel)


@pytest.mark.parametrize("kernel", ["fused", "flex"])
def test_kernels_without_boxes_refuse_them_by_name(kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    tokens = Tokens.of_grid(1, 4, 5)
    q, k, v = random_qkv(tokens, dim=64)
    with pytest.raises(KernelUnavailable, match=rf"kernel=.{kernel}.: got (a Box|boxes), wanted radii in tokens.*chunked"):
        dispatch.arrow(q, k, v, tokens, [3, Box(0, 1, 1), None], kernel=kernel)


def test_auto_takes_a_kernel_that_has_boxes(monkeypatch):
    """For a stand-in of a tensor on a CUDA device."""

    class CudaTensor:
        is_cuda, device, dtype, shape, requires_grad = True, "cuda:0", torch.bfloat16, (2, 2, 25, 72), False

    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    call = Call(CudaTensor(), CudaTensor(), CudaTensor(), Tokens.of_grid(1, 5, 5), (Policy(3), Policy()), 1.0)
    assert dispatch.resolve("auto", call) == "fused"
    assert dispatch.resolve("auto", replace(call, policies=(Policy(3), Policy(Box(1))))) == "chunked"


@pytest.mark.parametrize("make", [lambda: Box(-1), lambda: Box(rows=1.5), lambda: Box(columns=True), lambda: Box("all")])
def test_a_box_of_something_else_than_numbers_is_refused(make):
    with pytest.raises(ValueError, match="wanted numbers of frames, rows and columns of 0 or more, or None for all"):
        make()


def test_a_grid_of_another_size_than_its_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one of each"):
        Grid(1, 0, 3)
    with pytest.raises(ValueError, match=r"got 11 visual tokens on a Grid\(frames=1, rows=3, columns=4\), wanted 12"):
        Tokens(11, grid=Grid(1, 3, 4))
    assert Arrow(Box(1)) != Arrow(1)
