"""Bands as windows: every case of chunks and windows, text merged in, gradients and memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import dense, random_qkv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arrowhead.kernels import dispatch
from arrowhead.kernels.cpu import windows
from arrowhead.plans.layout import Tokens

SHAPES = [  # visual tokens, radius, whether there are windows
    (40, 3, True),
    (301, 40, True),
    (96, 32, True),  # one window
    (95, 32, False),
    (300, 200, False),
    (300, 298, False),
    (64, 0, True),  # nothing but windows
    (2200, 1024, True),  # 64 queries each
]


class LargestStorage(TorchDispatchMode):
    """The bytes of the largest storage among the results of all operations."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return out


@pytest.fixture
def calls(monkeypatch):
    """For each call of `_windows`, the number of queries and the length of a window."""
    seen, real = [], windows._windows

    def counted(q, k, v, radius, scale, into):
        seen.append((q.shape[2], windows.window_length(radius)))
        return real(q, k, v, radius, scale, into)

    monkeypatch.setattr(windows, "_windows", counted)
    return seen


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (2, 2)], ids=str)  # the batch, or the heads, are taken one by one
@pytest.mark.parametrize(("text", "text_first"), [(0, False), (7, False), (7, True)])
@pytest.mark.parametrize(("visual", "radius", "in_windows"), SHAPES)
def test_agrees_with_dense_attention_and_uses_windows_where_there_are_any(
    visual, radius, in_windows, text, text_first, shape, calls
):
    tokens = Tokens(visual, text, text_first)
    q, k, v = random_qkv(tokens, *shape, dtype=torch.float64)
    out = dispatch.arrow(q, k, v, tokens, radius, kernel="chunked")
    torch.testing.assert_close(out, dense(q, k, v, tokens, radius), atol=1e-12, rtol=1e-10)
    assert bool(calls) is in_windows
    assert all(count % length == 0 and visual - 2 * radius - count < length for count, length in calls)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.builds(Tokens, st.integers(1, 400), st.sampled_from([0, 1, 30]), st.booleans()),
    radii=st.lists(st.none() | st.integers(0, 200), min_size=1, max_size=3),
    batch=st.integers(1, 4),
    sharpness=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 2**32),
)
def test_any_policy_agrees_with_dense_attention(tokens, radii, batch, sharpness, seed):
    """Also with large scales, where text or band has all the weight."""
    q, k, v = random_qkv(tokens, batch, len(radii), dtype=torch.float64, seed=seed)
    out = dispatch.arrow(q, k, v, tokens, radii, scale=sharpness, kernel="chunked")
    torch.testing.assert_close(out, dense(q, k, v, tokens, radii, sharpness), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("text", [0, 7])
def test_gradients_are_those_of_dense_attention(text):
    tokens = Tokens(150, text)
    inputs = random_qkv(tokens, dtype=torch.float64)
    towards = torch.randn_like(inputs[0])
    gradients = []
    for attend in (dense, lambda *args: dispatch.arrow(*args, kernel="chunked")):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        attend(*leaves, tokens, (20, None, 0)).backward(towards)
        gradients.append([leaf.grad for leaf in leaves])
    for ours, wanted in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-11, rtol=1e-9)


def test_channels_that_are_not_contiguous():
    tokens = Tokens(150, 7)
    q, k, v = (tensor[..., ::2] for tensor in random_qkv(tokens, dim=16))
    out = dispatch.arrow(q, k, v, tokens, 20, kernel="chunked")
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, 20), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("text", [0, 77])
@pytest.mark.parametrize("radii", [(512, 512), (512, 33)])
def test_memory_is_a_small_part_of_all_pairs(text, radii, calls):
    tokens = Tokens(4096, text)
    q, k, v = random_qkv(tokens, batch=1, heads=2)
    windows.bias.cache_clear()
    with LargestStorage() as largest:
        dispatch.arrow(q, k, v, tokens, radii, kernel="chunked")
    assert calls
    assert q.nbytes <= largest.bytes < 4 * 4096**2 / 100
    assert windows.bias.cache_info().currsize <= 2 * len(set(radii))  # one for windows and one for chunks, of any place
