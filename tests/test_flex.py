"""FlexAttention against dense attention, how often it is compiled, and what it refuses."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import dense_mask
from test_kernels import dense, random_mask, random_qkv
from test_windows import LargestStorage
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import dispatch, flex
from arrowhead.kernels.call import Policy
from arrowhead.plans.layout import Tokens

CXX = os.environ.get("CXX", "g++")
compiles = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX}) for FlexAttention on the CPU")
LAYOUTS = [Tokens(301, 7, text_first=True), Tokens(301, 7), Tokens(256)]
slow = pytest.mark.slow
radii_of_three = st.lists(st.none() | st.integers(0, 310), min_size=3, max_size=3)


def attend(q, k, v, tokens, radii, **kwargs):
    return dispatch.arrow(q, k, v, tokens, radii, kernel="flex", **kwargs)


def graphs():
    return counters["stats"]["unique_graphs"]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.builds(Tokens, st.integers(1, 600), st.sampled_from([0, 1, 50, 128, 300]), st.booleans()),
    radii=st.lists(st.integers(0, 700), min_size=1, max_size=3),
)
def test_blocks_are_some_or_every_pair_as_the_mask_says(tokens, radii):
    some, every = flex.block_kinds(tokens, torch.tensor(radii))
    for head, radius in enumerate(radii):
        for i, rows in enumerate(dense_mask(tokens, radius).split(flex.BLOCK)):
            for j, block in enumerate(rows.split(flex.BLOCK, 1)):
                assert some[head, i, j].item() is block.any().item()
                assert every[head, i, j].item() is (block.all().item() and block.shape[1] == flex.BLOCK)


def test_no_tensor_of_all_pairs_is_made_for_the_blocks():
    with LargestStorage() as largest:
        flex._block_mask.__wrapped__(Tokens(16384, 100), (Policy(2048), Policy(), Policy(7)), torch.device("cpu"))
    assert 0 < largest.bytes < 16484**2 / 100


@compiles
@pytest.mark.parametrize("tokens", [LAYOUTS[0], *(pytest.param(layout, marks=slow) for layout in LAYOUTS[1:])], ids=str)
@settings(max_examples=25, deadline=None)
@given(radii=radii_of_three, seed=st.integers(0, 2**32))
def test_agrees_with_dense_attention(tokens, radii, seed):
    q, k, v = random_qkv(tokens, seed=seed)
    out = attend(q, k, v, tokens, radii)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radii), atol=2e-6, rtol=2e-5)


@compiles
@pytest.mark.parametrize("tokens", [LAYOUTS[0], pytest.param(LAYOUTS[1], marks=slow)], ids=str)
@pytest.mark.parametrize(
    "kind", ["padding", "each", *(pytest.param(kind, marks=slow) for kind in ("one", "two dimensions", "each row"))]
)
def test_the_models_own_mask_is_applied_too(tokens, kind):
    radii = (40, None, 1)
    q, k, v = random_qkv(tokens)
    mask = random_mask(kind, tokens, radii, (2, 3))
    out = attend(q, k, v, tokens, radii, mask=mask)
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radii, mask=mask), atol=2e-6, rtol=2e-5)


@compiles
def test_a_layout_is_compiled_once_whatever_the_policies():
    tokens = LAYOUTS[0]
    attend(*random_qkv(tokens), tokens, 3)
    before = graphs()
    for radii in ((1, 2, 3), 5, (None, 5, 0), (300, None, None), 1000, *((r, r + 1, 2 * r) for r in range(20))):
        q, k, v = random_qkv(tokens)
        with torch.no_grad():
            out = attend(q, k, v, tokens, radii)
        torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radii), atol=2e-6, rtol=2e-5)
    assert graphs() == before


@compiles
def test_it_runs_under_a_flop_counter():
    """Which counts every block of 128 × 128 pairs in which some pair is kept, as far as there are tokens."""
    tokens = LAYOUTS[0]
    q, k, v = random_qkv(tokens)
    with FlopCounterMode(display=False) as counter:
        out = attend(q, k, v, tokens, (40, None, 1))
    kept = [dense_mask(tokens, radius) for radius in (40, 10**6, 1)]
    blocks = [part for seen in kept for rows in seen.split(128) for part in rows.split(128, 1) if part.any()]
    assert counter.get_total_flops() == 4 * q.shape[0] * q.shape[3] * sum(part.numel() for part in blocks)
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, (40, None, 1)), atol=2e-6, rtol=2e-5)


@compiles
@slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
def test_half_precision_is_kept(dtype, tolerance):
    tokens = LAYOUTS[1]
    q, k, v = random_qkv(tokens, dtype=dtype)
    out = attend(q, k, v, tokens, (40, None, 1))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, (40, None, 1)), atol=tolerance, rtol=tolerance)


@compiles
@slow
@pytest.mark.parametrize(("visual", "dim", "scale"), [(1, 8, None), (16, 9, 0.3), (129, 72, None), (200, 1, 1.0)])
def test_short_sequences_odd_widths_and_scales(visual, dim, scale):
    tokens = Tokens(visual)
    flat = [
        tensor.transpose(1, 2).contiguous() for tensor in random_qkv(tokens, dim=dim)
    ]  # (B, N, H, D), as processors have it
    q, k, v = (tensor.transpose(1, 2) for tensor in flat)
    out = attend(q, k, v, tokens, (5, None, 0), scale=scale)
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, (5, None, 0), scale), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: x.requires_grad_(), "gradients"),
        (lambda x: x.to("meta"), "device meta"),
    ],
    ids=["float64", "gradients", "device"],
)
def test_what_flex_cannot_compute_is_refused(change, named):
    tokens = Tokens(20)
    with pytest.raises(KernelUnavailable, match=f"{named}.*wanted.*chunked"):
        attend(*map(change, random_qkv(tokens)), tokens, 3)


@compiles
def test_too_many_layouts_are_refused_rather_than_run_uncompiled(monkeypatch):
    torch.compiler.reset()  # another test may have compiled either layout
    attend(*random_qkv(LAYOUTS[0]), LAYOUTS[0], 3)
    monkeypatch.setattr(flex, "LAYOUTS", 1)
    with pytest.raises(KernelUnavailable, match="1 layouts at most"):
        attend(*random_qkv(Tokens(33)), Tokens(33), 3)


def test_without_a_compiler_it_is_refused_and_nothing_else_runs(tmp_path):
    """In another process, because torch looks for a compiler once."""
    code = """if True:
        import torch
        from arrowhead.errors import KernelUnavailable
        from arrowhead.kernels import dispatch
        from arrowhead.plans.layout import Tokens
        try:
            dispatch.arrow(*torch.randn(3, 1, 2, 50, 8), Tokens(50), 3, kernel="flex")
        except KernelUnavailable as error:
            print(error)
    """
    env = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "C++ compiler" in said
    assert "chunked" in said
