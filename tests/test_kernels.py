"""Every kernel against dense attention written here, and how `dispatch` chooses a kernel."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from independent import dense_mask, few, token_layouts

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import dispatch
from arrowhead.kernels.call import Call, Policy
from arrowhead.plans import masks
from arrowhead.plans.layout import Tokens

KERNELS = ["chunked", "reference"]
LAYOUTS = [
    pytest.param(0, False, id="no text"),
    pytest.param(7, False, id="text after"),
    pytest.param(7, True, id="text before"),
]
MASKS = ["padding", "one", "two dimensions", "each", "each row"]
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_layout = pytest.mark.parametrize(("text", "text_first"), LAYOUTS)


def random_qkv(tokens, batch=2, heads=3, dim=8, dtype=torch.float32, seed=None):
    """Three tensors (B, H, N, D)."""
    generator = torch.Generator()
    seed = generator.seed() if seed is None else seed
    print(f"seed {seed}")  # pytest shows it when a test fails
    generator.manual_seed(seed)
    return [torch.randn(batch, heads, tokens.visual + tokens.text, dim, generator=generator).to(dtype) for _ in "qkv"]


def dense(q, k, v, tokens, radii, scale=None, mask=None):
    """Masked attention in float64, (B, H, N, D): weights are exponentials, zero where a mask forbids, over their sum."""
    q, k, v = q.double(), k.double(), v.double()
    radii = [radii] * q.shape[1] if isinstance(radii, int) else radii
    allowed = torch.stack([dense_mask(tokens, 10**6 if radius is None else radius) for radius in radii])  # (H, N, N)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        seen = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.double()
        scores = scores + seen
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * allowed  # (B, H, N, N)
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v)


def random_mask(kind, tokens, radii, shape, seed=None):
    """A model's own mask, under which each query still sees a key: itself, a text token, or a visual one within every radius.

    `padding` hides keys from all queries, (B, 1, 1, N), boolean. The others are added to the scores, and hide pairs, too.
    """
    generator = torch.Generator()
    seed = generator.seed() if seed is None else seed
    print(f"mask's seed {seed}")
    generator.manual_seed(seed)
    (batch, heads), n = shape, tokens.visual + tokens.text
    if kind == "padding":
        first = tokens.text if tokens.text_first else 0
        last = tokens.text - 1 if tokens.text_first else n - 1
        seen = torch.rand(batch, 1, 1, n, generator=generator) < 0.4
        if tokens.text:
            seen[..., last] = True
        else:
            seen[..., first :: min([n if radius is None else radius for radius in radii]) + 1] = True
        return seen
    sizes = {"one": (1, 1, n, n), "two dimensions": (n, n), "each": (batch, heads, n, n), "each row": (batch, 1, n, n)}
    bias = torch.randn(sizes[kind], generator=generator)
    hidden = (torch.rand(sizes[kind], generator=generator) < 0.4) & ~torch.eye(n, dtype=torch.bool)
    return bias.masked_fill(hidden, -torch.inf)


@every_kernel
@few
@given(
    tokens=token_layouts,
    radius=st.integers(0, 20),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 4, 9]),
    scale=st.sampled_from([None, 0.3, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_dense_attention(kernel, tokens, radius, batch, heads, dim, scale, seed):
    q, k, v = random_qkv(tokens, batch, heads, dim, seed=seed)
    out = dispatch.arrow(q, k, v, tokens, radius, scale=scale, kernel=kernel)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radius, scale), atol=2e-6, rtol=2e-5)


@every_kernel
@few
@given(
    tokens=token_layouts,
    radii=st.lists(st.none() | st.integers(0, 20), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    kind=st.sampled_from([None, *MASKS]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_each_head_has_its_radius_under_the_models_own_mask(kernel, tokens, radii, batch, kind, scale, seed):
    q, k, v = random_qkv(tokens, batch, len(radii), 4, seed=seed)
    mask = None if kind is None else random_mask(kind, tokens, radii, (batch, len(radii)), seed)
    out = dispatch.arrow(q, k, v, tokens, radii, scale=scale, mask=mask, kernel=kernel)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radii, scale, mask), atol=2e-6, rtol=2e-5)


@every_kernel
@every_layout
@pytest.mark.parametrize("kind", MASKS)
def test_radii_and_mask_agree_where_the_sequence_is_longer_than_a_chunk(kernel, text, text_first, kind):
    tokens, radii = Tokens(301, text, text_first), (40, None, 1, 40, 300)
    q, k, v = random_qkv(tokens, heads=len(radii))
    mask = random_mask(kind, tokens, radii, (2, len(radii)))
    out = dispatch.arrow(q, k, v, tokens, radii, mask=mask, kernel=kernel)
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radii, mask=mask), atol=2e-6, rtol=2e-5)


@every_kernel
@every_layout
@pytest.mark.parametrize("radius", [0, 1, 40, 64, 100, 299])
def test_agrees_where_the_sequence_is_longer_than_a_chunk(kernel, text, text_first, radius):
    tokens = Tokens(301, text, text_first)
    q, k, v = random_qkv(tokens)
    out = dispatch.arrow(q, k, v, tokens, radius, kernel=kernel)
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radius), atol=2e-6, rtol=2e-5)


@every_kernel
@every_layout
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
@pytest.mark.parametrize("radius", [0, 20, 500, (20, None, 0)])
def test_half_precision_is_kept_and_is_close_to_float32(kernel, text, text_first, dtype, tolerance, radius):
    tokens = Tokens(131, text, text_first)
    q, k, v = random_qkv(tokens, dtype=dtype)
    out = dispatch.arrow(q, k, v, tokens, radius, kernel=kernel)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radius), atol=tolerance, rtol=tolerance)


@every_kernel
@every_layout
@pytest.mark.parametrize("radius", [88, 89, 1000])
def test_band_that_covers_everything_is_full_attention(kernel, text, text_first, radius):
    tokens = Tokens(89, text, text_first)
    q, k, v = random_qkv(tokens)
    full = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(dispatch.arrow(q, k, v, tokens, radius, kernel=kernel), full, atol=2e-6, rtol=2e-5)


@every_kernel
def test_band_of_radius_zero_without_text_gives_each_token_its_own_value(kernel):
    tokens = Tokens(70)
    q, k, v = random_qkv(tokens)
    torch.testing.assert_close(dispatch.arrow(q, k, v, tokens, 0, kernel=kernel), v, atol=1e-6, rtol=1e-6)


@every_kernel
@every_layout
def test_tokens_beyond_the_band_have_no_influence(kernel, text, text_first):
    tokens = Tokens(90, text, text_first)
    first = text if text_first else 0
    q, k, v = random_qkv(tokens)
    before = dispatch.arrow(q, k, v, tokens, 5, kernel=kernel)
    changed = first + 50
    k[:, :, changed] += 3
    v[:, :, changed] += 3
    moved = (dispatch.arrow(q, k, v, tokens, 5, kernel=kernel) != before).flatten(3).any(-1).any(0).any(0)  # (N,)
    allowed = dense_mask(tokens, 5)[:, changed]
    assert torch.equal(moved, allowed)


@every_kernel
@every_layout
@pytest.mark.parametrize("radius", [0, 30, 500])
def test_inputs_are_left_as_they_were(kernel, text, text_first, radius):
    tokens = Tokens(131, text, text_first)
    inputs = random_qkv(tokens)
    copies = [tensor.clone() for tensor in inputs]
    out = dispatch.arrow(*inputs, tokens, radius, kernel=kernel)
    out += 1  # the engine adds residuals in place
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


@every_kernel
def test_strided_inputs_as_processors_make_them(kernel):
    tokens = Tokens(75, 4)
    flat = [tensor.transpose(1, 2).contiguous() for tensor in random_qkv(tokens)]  # (B, N, H, D)
    q, k, v = (tensor.transpose(1, 2) for tensor in flat)
    out = dispatch.arrow(q, k, v, tokens, 9, kernel=kernel)
    torch.testing.assert_close(out.double(), dense(q, k, v, tokens, 9), atol=2e-6, rtol=2e-5)


@few
@given(tokens=token_layouts, radius=st.integers(0, 20))
def test_mask_is_the_definition_pair_by_pair(tokens, radius):
    visual = set(range(tokens.text, tokens.text + tokens.visual) if tokens.text_first else range(tokens.visual))
    mask = masks.arrow(tokens, radius)
    assert mask.shape == (tokens.total, tokens.total)
    for i in range(tokens.total):
        for j in range(tokens.total):
            wanted = i not in visual or j not in visual or abs(i - j) <= radius
            assert mask[i, j].item() is wanted


@few
@given(
    start=st.integers(0, 9), queries=st.integers(1, 9), low=st.integers(0, 9), keys=st.integers(1, 9), radius=st.integers(0, 9)
)
def test_band_of_a_block_is_the_definition_pair_by_pair(start, queries, low, keys, radius):
    rows, cols = range(start, start + queries), range(low, low + keys)
    assert masks.band(rows, cols, radius).tolist() == [[abs(i - j) <= radius for j in cols] for i in rows]


def test_an_unknown_kernel_is_refused_and_the_known_ones_are_named():
    tokens = Tokens(8)
    with pytest.raises(KernelUnavailable) as refused:
        dispatch.arrow(*random_qkv(tokens), tokens, 1, kernel="fussed")
    assert all(name in str(refused.value) for name in ["fussed", "auto", *KERNELS])


def test_auto_chooses_a_kernel_and_a_named_one_is_kept():
    call = Call(*torch.randn(3, 1, 1, 8, 64), Tokens(8), (Policy(),), 1.0)
    assert dispatch.resolve("auto", call) == "chunked"  # on a CPU
    assert [dispatch.resolve(name, call) for name in dispatch.KERNELS] == list(dispatch.KERNELS)


def test_auto_runs_the_kernel_it_names():
    tokens = Tokens(140, 3)
    q, k, v = random_qkv(tokens)
    picked = dispatch.resolve("auto", Call(q, k, v, tokens, (Policy(11),) * 3, 1.0))
    named = dispatch.arrow(q, k, v, tokens, 11, kernel=picked)
    assert torch.equal(dispatch.arrow(q, k, v, tokens, 11), named)
    torch.testing.assert_close(named.double(), dense(q, k, v, tokens, 11), atol=2e-6, rtol=2e-5)
