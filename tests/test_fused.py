"""The fused kernel against the reference kernel: under Triton's interpreter, or on the device where there is one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import CUDA, DEVICE, DTYPE, SMALL, arrow, attended, close, full_and_residual, inputs, random_keys

from arrowhead.kernels.triton import launch_table, ops
from arrowhead.kernels.triton.launch_table import CACHED, FULL, HEAD_DIMS, Config
from arrowhead.plans.layout import Tokens

LAYOUTS = [
    pytest.param(41, 0, False, id="no text"),
    pytest.param(41, 5, False, id="text after"),
    pytest.param(41, 19, True, id="text before"),
]
every_layout = pytest.mark.parametrize(("visual", "text", "text_first"), LAYOUTS)
every_dim = pytest.mark.parametrize("dim", HEAD_DIMS)
few = settings(max_examples=10, deadline=None)


@pytest.fixture
def config(monkeypatch):
    """Sets how the kernel is launched; small tiles at first, so that short sequences have several of them."""

    def set_to(config):
        monkeypatch.setattr(launch_table, "chosen", lambda *_, **__: config)

    set_to(SMALL)
    return set_to


def check_arrow(tokens, radii, adds, dim=64, seen=None, **kwargs):
    """Check that each head is computed by its policy, and that cached heads and residuals are left as they were."""
    x = inputs(tokens, radii, dim, adds=adds, **kwargs)
    x.seen, before, residual = seen, x.out.clone(), x.residual.clone()
    arrow(x)
    wanted = attended(x, tokens, radii)
    for head, (radius, add) in enumerate(zip(radii, adds, strict=True)):
        if radius == CACHED:
            assert torch.equal(x.out[:, head], before[:, head])
            continue
        if add:
            wanted[:, head, tokens.visual_slice] += residual[:, head].float()
        close(x.out[:, head], wanted[:, head])
    assert torch.equal(x.residual, residual)


def check_full_and_residual(tokens, radii, dim=64, seen=None, **kwargs):
    """Check full outputs and residuals of each head by its policy, and that all others are left as they were."""
    x = inputs(tokens, radii, dim, **kwargs)
    x.seen, out, residual = seen, x.out.clone(), x.residual.clone()
    full_and_residual(x)
    whole, window = attended(x, tokens, [FULL] * len(radii)), attended(x, tokens, radii)
    for head, radius in enumerate(radii):
        if radius == CACHED:
            assert torch.equal(x.out[:, head], out[:, head])
        else:
            close(x.out[:, head], whole[:, head])
        if radius in {FULL, CACHED}:
            assert torch.equal(x.residual[:, head], residual[:, head])
        else:
            close(x.residual[:, head], (whole - window)[:, head, tokens.visual_slice])


radius_or_other = st.integers(0, 50) | st.sampled_from([FULL, CACHED])
policies = st.lists(st.tuples(radius_or_other, st.booleans()), min_size=1, max_size=3)
lengths = st.builds(Tokens, visual=st.integers(1, 45), text=st.integers(0, 20), text_first=st.booleans())
tiles = st.builds(
    Config, queries=st.sampled_from([16, 32]), keys=st.sampled_from([16, 32]), warps=st.just(4), stages=st.just(2)
)


@few
@given(lengths, policies, tiles, st.integers(0, 2**32), st.booleans())
def test_agrees_with_the_reference(tokens, policy, tile, seed, masked):
    radii, adds = zip(*policy, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_table, "chosen", lambda *_, **__: tile)
        check_arrow(tokens, radii, adds, seed=seed, batch=1, seen=random_keys(tokens, radii, 1, seed) if masked else None)


@few
@given(lengths, policies, tiles, st.integers(0, 2**32), st.booleans())
def test_residuals_agree_with_the_reference(tokens, policy, tile, seed, masked):
    radii, _ = zip(*policy, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_table, "chosen", lambda *_, **__: tile)
        seen = random_keys(tokens, radii, 1, seed) if masked else None
        check_full_and_residual(tokens, radii, seed=seed, batch=1, seen=seen)


@every_dim
@every_layout
def test_every_head_dim(config, dim, visual, text, text_first):
    check_arrow(Tokens(visual, text, text_first), [0, 20, CACHED, FULL, 40], [0, 1, 1, 0, 0], dim, batch=1)


@every_dim
@every_layout
def test_residuals_of_every_head_dim(config, dim, visual, text, text_first):
    check_full_and_residual(Tokens(visual, text, text_first), [7, FULL, CACHED], dim, batch=1)


@every_dim
@pytest.mark.parametrize("variant", ["tma", "specialised"])
def test_descriptors(config, dim, variant):
    for text_first in (True, False):
        config(Config(16, 32, 4, 2, variant))
        tokens = Tokens(41, 5, text_first)
        check_arrow(tokens, [FULL, 20], [1, 1], dim)
        check_full_and_residual(tokens, [5], dim, batch=1)


@every_layout
def test_keys_that_are_padding(config, visual, text, text_first):
    tokens, radii = Tokens(visual, text, text_first), [3, FULL]
    seen = random_keys(tokens, radii, 2)
    assert not torch.equal(seen[0], seen[1])
    check_arrow(tokens, radii, [1, 0], seen=seen)
    check_full_and_residual(tokens, radii, seen=seen)


def test_a_query_that_sees_no_key_gives_zero(config):
    tokens = Tokens(53)
    x = inputs(tokens, [2, FULL])
    x.seen = torch.ones(2, 53, dtype=torch.bool, device=DEVICE)
    x.seen[0, 10:30] = False
    arrow(x, residual=False)
    assert not x.out[0, 0, 12:28].any()
    assert x.out[0, 0, :12].any(-1).all()
    assert x.out[:, 1].any(-1).all()
    assert x.out.isfinite().all()


def test_float16(config):
    check_arrow(Tokens(41, 5), [FULL, 9], [0, 1], 72, batch=1, dtype=torch.float16)
    check_full_and_residual(Tokens(41, 5), [9], 72, batch=1, dtype=torch.float16)


def test_large_scores_do_not_overflow(config):
    tokens, radii = Tokens(53, 7), [FULL, 9]
    x = inputs(tokens, radii)
    x.q *= 30
    x.k[:, :, -9:] *= 30  # the running maximum rises at the end, as it does not among small scores
    arrow(x, residual=False)
    torch.testing.assert_close(x.out.float(), attended(x, tokens, radii), atol=2e-2 if CUDA else 5e-4, rtol=1e-2)


@pytest.mark.parametrize("layout", ["heads first", "a projection of all three", "odd strides"])
def test_strides(config, layout):
    tokens, radii = Tokens(53, 7, True), [FULL, 9, CACHED]
    x = inputs(tokens, radii)
    if layout == "heads first":
        x.q, x.k, x.v = (tensor.contiguous() for tensor in (x.q, x.k, x.v))
    elif layout == "odd strides":
        room = torch.randn(2, 60, 3, 67, device=DEVICE).to(DTYPE)
        x.q, x.k = (room[..., start : start + 64].transpose(1, 2) for start in (0, 3))
    else:
        together = torch.randn(2, 60, 3, 3, 64, device=DEVICE).to(DTYPE)
        x.q, x.k, x.v = (part.transpose(1, 2) for part in together.unbind(2))
    x.residual = x.residual[:1].expand(2, -1, -1, -1)  # of the conditional branch, for both
    before = x.out.clone()
    x.policy[:, 1] = 1
    arrow(x)
    wanted = attended(x, tokens, radii)
    wanted[:, :, tokens.visual_slice] += x.residual.float()
    close(x.out[:, :2], wanted[:, :2])
    assert torch.equal(x.out[:, 2], before[:, 2])


def test_outputs_that_share_memory_with_others(config):
    tokens, radii = Tokens(53, 7), [FULL, 9]
    x = inputs(tokens, radii)
    room = torch.zeros(2, 64, 2, 80, device=DEVICE, dtype=DTYPE)
    x.out = room[:, 2:62, :, 8:72].transpose(1, 2)
    arrow(x, residual=False)
    close(x.out, attended(x, tokens, radii))
    x.out.zero_()
    assert not room.any()  # nothing was written beside it


@pytest.mark.parametrize("variant", ["pointers", "tma"])
@pytest.mark.parametrize("dim", [72, 128])
def test_memory_between_rows_and_after_them_is_never_read(config, dim, variant):
    """Not even to be multiplied by zero: the memory may hold NaN."""
    config(Config(16, 16, 4, 2, variant))
    tokens, radii = Tokens(41, 5), [9, FULL]
    x = inputs(tokens, radii, dim, batch=1)
    for name in ("q", "k", "v", "residual"):
        tensor = getattr(x, name)
        room = tensor.new_full((1, 80, 2, dim + 8), torch.nan)
        inner = room[:, : tensor.shape[2], :, :dim].transpose(1, 2)
        setattr(x, name, inner.copy_(tensor))
    x.policy[:, 1] = 1
    wanted, window = attended(x, tokens, [FULL] * 2), attended(x, tokens, radii)
    added = window.clone()
    added[:, :, tokens.visual_slice] += x.residual.float()
    arrow(x)
    close(x.out, added)
    full_and_residual(x)
    close(x.out, wanted)
    close(x.residual[:, 0], (wanted - window)[:, 0, tokens.visual_slice])


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_shipped_table(dim, capability):
    """With the sizes of tiles that will run; 300 tokens have more than one tile of each."""
    x = inputs(Tokens(290, 10), [40], dim, batch=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_architecture", lambda _: capability)
        patch.setattr(launch_table, "SHORT", 0)
        arrow(x, residual=False)
    close(x.out, attended(x, Tokens(290, 10), [40]))
