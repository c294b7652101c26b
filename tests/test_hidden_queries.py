"""A model's own mask means the same to every kernel: queries that see no key give 0, and any dtype counts in full."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from independent import dense_mask, few
from test_flex import compiles
from test_kernels import random_qkv

from arrowhead.kernels import dispatch
from arrowhead.plans.cells import Box
from arrowhead.plans.layout import Tokens

RADII = [None, 0, 8, 40, 500, Box(rows=3, columns=2), Box(rows=0)]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def attended(q, k, v, tokens, radii, mask):
    """From the definition, in float64: weights are exponentials over their sum, and 0 where a query sees no key."""
    bias = mask.double() if mask.dtype != torch.bool else torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5 + bias
    for head, radius in enumerate(radii):
        if radius is not None:
            scores[:, head] = scores[:, head].masked_fill(~dense_mask(tokens, radius), -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest.where(highest.isfinite(), torch.zeros(()).double())).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.where(total > 0, torch.ones(()).double()) @ v.double()


def hiding(kind, shape, generator):
    """A mask of a kind that hides some pairs, and every key from some queries."""
    hidden = torch.rand(shape, generator=generator) < 0.4
    if shape[2] > 1:
        hidden |= torch.rand(*shape[:3], 1, generator=generator) < 0.3
    else:
        hidden[-1] = True  # a sample without a single key
    if kind is bool:
        return ~hidden
    dtype, lowest = kind
    return torch.randn(shape, generator=generator).to(dtype).masked_fill(hidden, lowest or torch.finfo(dtype).min)


@few
@given(
    kernel=st.sampled_from(["chunked", "reference"]),
    text=st.sampled_from([0, 5]),
    radii=st.lists(st.sampled_from(RADII), min_size=1, max_size=3),
    dtype=st.sampled_from(list(TOLERANCE)),
    kind=st.sampled_from([bool, bool, *((dtype, low) for dtype in (torch.float32, None) for low in (-torch.inf, None))]),
    rows=st.booleans(),
    of_heads=st.booleans(),
    in_int8=st.booleans(),
    tracked=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_kernel_gives_what_the_definition_does(kernel, text, radii, dtype, kind, rows, of_heads, in_int8, tracked, seed):
    tokens, generator = Tokens.of_grid(1, 12, 9, text=text), torch.Generator().manual_seed(seed)
    q, k, v = random_qkv(tokens, 2, len(radii), dtype=dtype, seed=seed)
    kind = kind if kind is bool or kind[0] else (dtype, kind[1])
    n = tokens.total
    mask = hiding(kind, (2, len(radii) if of_heads else 1, n if rows else 1, n), generator)
    wanted = attended(q, k, v, tokens, radii, mask)
    q.requires_grad_(tracked)
    out = dispatch.arrow(q, k, v, tokens, radii, mask=mask, kernel=kernel).detach()
    torch.testing.assert_close(out.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    if in_int8:
        eight = dispatch.arrow(q, k, v, tokens, radii, mask=mask, precision="int8", kernel=kernel).detach()
        assert eight.isfinite().all()
        hidden = mask.expand(2, len(radii), n, n).eq(False if kind is bool else -torch.inf).all(-1)
        assert not eight[hidden].any()


@pytest.mark.slow  # each is compiled
@compiles
@pytest.mark.parametrize("kind", [bool, (torch.float32, -torch.inf), (torch.float32, None)], ids=str)
def test_flex_too(kind):
    tokens, radii = Tokens(150, 5), [8, None]
    q, k, v = random_qkv(tokens, 2, 2, dim=16)
    mask = hiding(kind, (2, 1, 155, 155), torch.Generator().manual_seed(0))
    out = dispatch.arrow(q, k, v, tokens, radii, mask=mask, kernel="flex")
    torch.testing.assert_close(out.double(), attended(q, k, v, tokens, radii, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fused_too(dtype):
    tokens, radii = Tokens(150, 5), [8, None]
    q, k, v = random_qkv(tokens, 2, 2, dim=64, dtype=dtype)
    mask = hiding(bool, (2, 1, 1, 155), torch.Generator().manual_seed(0))
    out = dispatch.arrow(q, k, v, tokens, radii, mask=mask, kernel="fused")
    torch.testing.assert_close(out.double(), attended(q, k, v, tokens, radii, mask), atol=4e-3, rtol=4e-3)
