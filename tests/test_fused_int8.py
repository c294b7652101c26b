"""Heads in int8 in the fused kernel, next to native ones, against the reference kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import CUDA, DEVICE, DTYPE, SMALL, arrow, attended, close, full_and_residual, inputs, random_keys

from arrowhead.kernels import dispatch
from arrowhead.kernels.triton import launch_table, ops
from arrowhead.kernels.triton.launch_table import CACHED, FULL, HEAD_DIMS, Config
from arrowhead.plans.layout import Tokens

TOKENS = Tokens(118, 19, True)  # two blocks of queries and three of keys; their ends are within tiles


@pytest.fixture(autouse=True)
def config(monkeypatch):
    def set_to(config):
        monkeypatch.setattr(launch_table, "chosen", lambda *_, **__: config)

    set_to(Config(32, 32, 4, 2))
    return set_to


def check(tokens, radii, adds, eights, dim=64, seen=None, **kwargs):
    x = inputs(tokens, radii, dim, adds=adds, eights=eights, **kwargs)
    x.seen, before = seen, x.out.clone()
    arrow(x)
    wanted = attended(x, tokens, radii)
    for head, (radius, add) in enumerate(zip(radii, adds, strict=True)):
        if radius == CACHED:
            wanted[:, head] = before[:, head]
        elif add:
            wanted[:, head, tokens.visual_slice] += x.residual[:, head].float()
    close(x.out, wanted)


heads = st.tuples(st.integers(0, 140) | st.sampled_from([FULL, CACHED]), st.booleans(), st.booleans())
lengths = st.builds(Tokens, visual=st.integers(1, 140), text=st.integers(0, 20), text_first=st.booleans())
tiles = st.builds(
    Config, queries=st.sampled_from([16, 64]), keys=st.sampled_from([32, 64]), warps=st.just(4), stages=st.just(2)
)


@settings(max_examples=6, deadline=None)
@given(lengths, st.lists(heads, min_size=1, max_size=3), tiles, st.integers(0, 2**32), st.booleans())
def test_agrees_with_the_reference(tokens, policy, tile, seed, masked):
    radii, adds, eights = zip(*policy, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_table, "chosen", lambda *_, **__: tile)
        seen = random_keys(tokens, radii, 1, seed) if masked else None
        check(tokens, radii, adds, eights, seed=seed, batch=1, seen=seen)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dim(dim):
    check(TOKENS, [FULL, 20, CACHED, 9], [0, 1, 1, 1], [1, 1, 0, 0], dim, batch=1)


@pytest.mark.slow
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("text_first", [False, True])
def test_descriptors(config, dim, text_first):
    config(Config(64, 32, 4, 2, "tma"))
    check(Tokens(141, 7, text_first), [FULL, 40, 40], [0, 1, 0], [1, 1, 0], dim)


@pytest.mark.slow
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_shipped_table(dim, capability):
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        patch.setattr(ops, "_architecture", lambda _: capability)
        patch.setattr(launch_table, "SHORT", 0)
        check(Tokens(290, 10), [40], [0], [1], dim, batch=1)


def test_float16():
    check(TOKENS, [FULL, 9], [0, 1], [1, 1], 72, batch=1, dtype=torch.float16)


def test_blocks_of_very_different_size():
    """And one block of zeros."""
    x = inputs(TOKENS, [FULL, 30], eights=[1, 1], batch=1)
    x.q[:, :, 128:] *= 4
    x.q[:, 1, :128] = 0
    x.k[:, :, 64:128] *= 2.0**-4
    arrow(x, residual=False)
    torch.testing.assert_close(x.out, attended(x, TOKENS, [FULL, 30]).to(DTYPE), atol=2e-2 if CUDA else 3e-5, rtol=1e-2)


def test_a_shift_of_all_keys_loses_no_precision():
    x = inputs(TOKENS, [FULL], eights=[1], batch=1)
    arrow(x, residual=False)
    before = x.out.clone()
    x.k += 64
    arrow(x, residual=False)
    assert (x.out - before).norm() < 1e-2 * before.norm()


def test_native_heads_are_the_same_to_the_bit():
    """With heads in int8 in the same call or without; and int8 differs from native."""
    x = inputs(TOKENS, [FULL, 20, 20], eights=[0, 0, 1], batch=1)
    arrow(x, residual=False)
    mixed = x.out.clone()
    x.policy = x.policy[:, :2].contiguous()
    arrow(x, residual=False)
    assert torch.equal(x.out[:, :2], mixed[:, :2])
    assert not torch.allclose(x.out[:, 2], mixed[:, 2], atol=1e-4)


def test_memory_between_rows_and_after_them_is_never_read():
    """Nor the keys of cached heads: they may hold NaN."""
    x = inputs(TOKENS, [FULL, 9, CACHED, 9], 72, eights=[1, 1, 0, 0], batch=1)
    for name in ("q", "k", "v"):
        tensor = getattr(x, name)
        room = tensor.new_full((1, 160, 4, 80), torch.nan)
        setattr(x, name, room[:, : TOKENS.total, :, :72].transpose(1, 2).copy_(tensor))
    x.k[:, 2] = torch.nan
    arrow(x, residual=False)
    wanted = attended(x, TOKENS, [FULL, 9, CACHED, 9])
    close(x.out[:, [0, 1, 3]], wanted[:, [0, 1, 3]])


def test_residuals_are_made_from_native_heads_alone():
    x = inputs(TOKENS, [FULL, 9], eights=[0, 1])
    with pytest.raises(ValueError, match=r"policy: got \(2, 3\) torch.int32.*wanted \(2, 2\)"):
        full_and_residual(x)


def test_opcheck(config):
    config(SMALL)
    x = inputs(Tokens(20, 5), [FULL, 3], batch=1, adds=[0, 1], eights=[1, 0])
    torch.library.opcheck(ops.arrow, (x.out, x.q, x.k, x.v, x.policy, x.residual, None, *x.image, x.scale))


@pytest.mark.parametrize("masked", [False, True])
def test_dispatch_agrees_with_the_reference(masked):
    x = inputs(TOKENS, [FULL] * 3, eights=[0] * 3)
    mask = random_keys(TOKENS, [0], 2)[:, None, None] if masked else None
    got, wanted = (
        dispatch.arrow(x.q, x.k, x.v, TOKENS, [None, 4, 9], precision=["int8", "native", "int8"], mask=mask, kernel=kernel)
        for kernel in ("fused", "reference")
    )
    assert got.dtype == DTYPE
    assert got.device.type == DEVICE
    close(got, wanted)
