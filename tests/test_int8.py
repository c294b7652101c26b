"""Scores in int8, as in SageAttention: kernels and engine against an encoding written here, block by block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from independent import by_head, columns, dense_mask, few, in_int8, token_layouts
from outside import heads_seen
from pipelines import dit, sd3
from replay import compressed, distance, trace
from test_kernels import LAYOUTS, MASKS, random_mask, random_qkv

import arrowhead as ah
from arrowhead.errors import KernelUnavailable, PlanInvalid
from arrowhead.kernels import dispatch
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL, Arrow, Attend, Cached, Full
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import lifetimes
from arrowhead.plans.target import Target

KERNELS = ["chunked", "reference"]
PRECISIONS = st.sampled_from(["native", "int8"])
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def dense(q, k, v, tokens, radii, precisions, scale=None, mask=None):
    """Attention head by head, (B, H, N, D), in float64; int8 encodes queries and keys in blocks of 128 and 64 tokens."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(len(q)):
        for h, (radius, precision) in enumerate(zip(radii, precisions, strict=True)):
            queries, keys = in_int8(q[b, h], k[b, h]) if precision == "int8" else (q[b, h].double(), k[b, h].double())
            scores = queries @ keys.T * (q.shape[-1] ** -0.5 if scale is None else scale)
            scores = scores.masked_fill(~dense_mask(tokens, 10**6 if radius is None else radius), -torch.inf)
            if mask is not None:
                own = mask.expand(*q.shape[:2], *scores.shape)[b, h]
                scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
            out[b, h] = scores.softmax(-1) @ v[b, h].double()
    return out


def exact_qkv(*args, **kwargs):
    """Multiples of 1/256, whose sums are exact, so that they round to the same whole numbers in any order."""
    return [(256 * x).round() / 256 for x in random_qkv(*args, **kwargs)]


def assert_close(out, wanted, tolerance=3e-6):
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=10 * tolerance)


@every_kernel
@few
@given(
    tokens=token_layouts,
    heads=st.lists(st.tuples(st.none() | st.integers(0, 20), PRECISIONS), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    dim=st.sampled_from([1, 4, 9]),
    kind=st.sampled_from([None, *MASKS]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_each_head_has_its_precision(kernel, tokens, heads, batch, dim, kind, scale, seed):
    radii, precisions = zip(*heads, strict=True)
    q, k, v = exact_qkv(tokens, batch, len(heads), dim, seed=seed)
    mask = None if kind is None else random_mask(kind, tokens, radii, (batch, len(heads)), seed)
    out = dispatch.arrow(q, k, v, tokens, radii, precision=precisions, scale=scale, mask=mask, kernel=kernel)
    assert out.shape == q.shape
    assert_close(out, dense(q, k, v, tokens, radii, precisions, scale, mask))


@every_kernel
@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
@pytest.mark.parametrize("size", [4.0, 1e-2])
def test_blocks_of_sequences_longer_than_one(kernel, text, text_first, size):
    """Blocks of very different scales, and one of zeros."""
    tokens, radii, precisions = Tokens(301, text, text_first), (40, None, 1, None, 300), ("int8",) * 3 + ("native", "int8")
    q, k, v = exact_qkv(tokens, heads=5, dim=16)
    q[:, :, 128:256] = (256 * q[:, :, 128:256] * size).round() / 256
    q[:, 1, :128] = 0
    k[:, :, 64:128] = (256 * k[:, :, 64:128] * size).round() / 256
    out = dispatch.arrow(q, k, v, tokens, radii, precision=precisions, kernel=kernel)
    assert_close(out, dense(q, k, v, tokens, radii, precisions), 3e-5)


@every_kernel
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 3e-6)], ids=str
)
def test_the_dtype_is_kept(kernel, dtype, tolerance):
    tokens, radii = Tokens(150, 7), (20, None, None)
    q, k, v = (x.to(dtype) for x in exact_qkv(tokens, dim=16))
    out = dispatch.arrow(q, k, v, tokens, radii, precision="int8", kernel=kernel)
    assert out.dtype == dtype
    wanted = dense(q, k, v, tokens, radii, ["int8"] * 3)
    assert (out.double() - wanted).norm() < tolerance * wanted.norm()


@every_kernel
def test_a_shift_of_all_keys_loses_no_precision(kernel):
    """Keys far from zero round as finely, because their mean is subtracted first."""
    tokens = Tokens(200)
    q, k, v = exact_qkv(tokens, dim=32)
    shift = 64.0 * torch.randint(-3, 4, (1, 3, 1, 32))
    there = dispatch.arrow(q, k + shift, v, tokens, [None] * 3, precision="int8", kernel=kernel)
    native = dense(q, k, v, tokens, [None] * 3, ["native"] * 3)
    assert (there.double() - native).norm() < 0.02 * native.norm()


@every_kernel
@pytest.mark.parametrize("radius", [None, 30])
def test_is_near_native_attention_but_not_the_same(kernel, radius):
    tokens = Tokens(200, 9)
    q, k, v = random_qkv(tokens, dim=64)
    native = dense(q, k, v, tokens, [radius] * 3, ["native"] * 3)
    change = (dispatch.arrow(q, k, v, tokens, [radius] * 3, precision="int8", kernel=kernel).double() - native).norm()
    assert 1e-3 * native.norm() < change < 0.03 * native.norm()


def test_flex_has_no_int8_and_refuses_it_by_name():
    tokens = Tokens(20)
    q, k, v = random_qkv(tokens, dim=64)
    with pytest.raises(KernelUnavailable, match=r"kernel='flex': got heads in int8, wanted native precision.*chunked"):
        dispatch.arrow(q, k, v, tokens, [None, 3, None], precision=["native", "int8", "native"], kernel="flex")


def test_an_unknown_precision_is_refused():
    for method in (lambda: Full("int7"), lambda: Arrow(3, precision="int7")):
        with pytest.raises(ValueError, match="got precision 'int7', wanted one of native, int8"):
            method()


def test_native_is_the_default():
    assert (Full("native"), Arrow(3, True, "native")) == (Full(), Arrow(3, residual=True))
    assert Attend(Full("int8")) != FULL


@few
@given(column=st.integers(1, 9).flatmap(columns))
def test_no_residual_is_made_of_a_full_output_in_int8(column):
    for cell, writes in zip(column, lifetimes(column), strict=True):
        assert not writes.residuals or cell.method == Full()


def test_a_residual_needs_native_attention_before_it():
    site = Site("attn", 2, 8, 16)
    rows = ((Attend(Full("int8")),), (Attend(Arrow(3, residual=True)),))
    with pytest.raises(PlanInvalid, match="adds a residual, but no earlier step has full attention"):
        ah.Plan(rows, Target("Transformer", "Scheduler", {}, (site,)), Tokens(20), guided=False)


EIGHT, BAND, MIXED = Full("int8"), Arrow(3, precision="int8"), Arrow(3, residual=True, precision="int8")
ROWS = (
    (FULL, FULL, Attend(EIGHT)),
    (Attend(EIGHT), Attend((EIGHT, Full(), BAND)), Attend((Cached(), EIGHT, Full()))),
    (Attend(MIXED), Attend((MIXED, BAND, Arrow(3, residual=True))), Attend((EIGHT, Cached(), BAND))),
    (Attend(MIXED, share_cfg=True), Attend(EIGHT, share_cfg=True), Attend(BAND, share_cfg=True)),
    (Attend((Cached(), MIXED, EIGHT)), Attend((MIXED, Cached(), BAND)), Attend(EIGHT)),
)


def replayed(bench, rows, target, inputs, *, native=False):
    """The trace of the untouched pipeline with its heads' outputs replaced by the rows' formulas; `native`: without int8."""
    tokens, visual, heads = Tokens(bench.visual, bench.text), slice(0, bench.visual), target.sites[0].heads
    place, passed = {site.path: i for i, site in enumerate(target.sites)}, dict.fromkeys(range(len(target.sites)), 0)
    kept, residuals = {}, {}

    def change(path, q, k, v, out):
        if q is None:
            return out
        site, out = place[path], out.clone()
        own = tokens if q.shape[2] == tokens.total else Tokens(tokens.visual)
        cell = rows[passed[site]][site]
        for head, method in enumerate(by_head(cell, heads)):
            one_head = [x[:, head : head + 1] for x in (q, k, v)]
            if method == Full():
                residuals[site, head] = (out[:, head] - dense(*one_head, own, [3], ["native"])[:, 0])[:, visual]
            elif isinstance(method, Cached):
                out[:, head] = kept[site, head]
            else:
                precision = "native" if native else method.precision
                out[:, head] = dense(*one_head, own, [getattr(method, "radius", None)], [precision])[:, 0]
                if getattr(method, "residual", False):
                    out[:, head, visual] += residuals[site, head]
        if cell.share_cfg:
            out = torch.cat([out.chunk(2)[not bench.conditional_first]] * 2)
        kept.update({(site, head): out[:, head].clone() for head in range(heads)})
        passed[site] += 1
        return out

    with heads_seen(bench, change):
        found = trace(bench, bench.inputs(**inputs))
    assert set(passed.values()) == {len(rows)}
    return found


@pytest.mark.parametrize("make", [dit, sd3])
@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_a_plan_in_int8_gives_what_the_formulas_give(make, kernel):
    """Full, bands, with residuals of native attention, cached and shared; to the last digits, because ties are unlikely."""
    bench = make()
    target, inputs = target_of(find(bench.pipe)), {"steps": len(ROWS), "images": 2}
    rows = tuple(row[: len(target.sites)] for row in ROWS)
    plan = ah.Plan(rows, target, Tokens(bench.visual, bench.text), guided=True)
    got = compressed(bench, plan, bench.inputs(**inputs), kernel=kernel)
    assert distance(got, replayed(bench, rows, target, inputs)) < 1e-5
    assert distance(got, replayed(bench, rows, target, inputs, native=True)) > 1e-3
