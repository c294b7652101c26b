"""A user puts another function in the place of torch's attention, as SageAttention says to: one that ignores masks.

Bands and boxes stay right, whenever that happened; what the model computes in full goes on through the user's function.
"""

import subprocess
import sys

import own
import pytest
import torch
import torch.nn.functional as F
from pipelines import dit
from replay import assert_identical, assert_same, plan, replay, trace
from test_kernels import dense, random_mask, random_qkv
from test_own import SEPARATE, plan_of, sites_of
from test_processors_hooked import WAYS, AModule, ByAnotherClass, ByAnotherProcessor, ByImportedName, Counting

import arrowhead as ah
from arrowhead.errors import NotIntercepted
from arrowhead.kernels import dispatch
from arrowhead.kernels.cpu import boxes, chunked
from arrowhead.plans.cells import FULL, Arrow, Attend, Box
from arrowhead.plans.layout import Tokens
from arrowhead.upstream import TORCH_ATTENTION

GRID = ["FFF", "WXV", "REW", "CwR", "VYE"]
BY_MODE = [ByAnotherClass, ByAnotherProcessor, Counting]  # clones of their functions do not do


class Replacement:
    """Attention without masks, and without the arguments that nobody gives it; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        self.calls += 1
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


@pytest.fixture
def replacement():
    return Replacement()


def test_torchs_own_function_is_bound():
    assert TORCH_ATTENTION is F.scaled_dot_product_attention


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize("radius", [1, 40, 300, None, Box(rows=3, columns=2), Box(rows=5)], ids=str)
@pytest.mark.parametrize("kind", [None, "padding", "each"])
def test_kernels_do_not_call_it(kernel, radius, kind, replacement, monkeypatch):
    tokens, radii = Tokens.of_grid(1, 14, 12, text=5), [radius, radius, None]
    q, k, v = random_qkv(tokens, heads=3)
    mask = None if kind is None else random_mask(kind, tokens, [1, 1, 1], (2, 3))
    if isinstance(radius, Box) and kind == "padding":
        mask[..., -5:] = True
    monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)
    for tracked in (False, True):  # with gradients there are no windows
        q.requires_grad_(tracked)
        out = dispatch.arrow(q, k, v, tokens, radii, mask=mask, kernel=kernel)
        torch.testing.assert_close(out.double(), dense(q, k, v, tokens, radii, mask=mask), atol=2e-6, rtol=2e-5)
    assert replacement.calls == 0


def test_nor_where_it_is_there_before_arrowhead_is_imported():
    code = """
import torch
import torch.nn.functional as F
own, calls = F.scaled_dot_product_attention, []
def ignoring(q, k, v, attn_mask=None, **more):
    calls.append(1)
    return own(q, k, v)
F.scaled_dot_product_attention = ignoring
from arrowhead.kernels import dispatch
from arrowhead.plans.layout import Tokens
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 150, 8)
mask = torch.rand(150) < 0.8
out = dispatch.arrow(q, k, v, Tokens(150), 20, mask=mask, kernel="chunked")
i = torch.arange(150)
kept = ((i[:, None] - i).abs() <= 20) & mask
weights = (q @ k.mT * 8**-0.5).exp() * kept
assert torch.allclose(out, weights / weights.sum(-1, keepdim=True) @ v, atol=1e-5) and not calls
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("when", ["before apply", "after apply"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_plans_are_right_whenever_it_is_replaced(way, when, replacement, monkeypatch):
    """Full attention is the user's, and bands are torch's; unless the processor has imported torch's function by name."""
    bench = dit()
    wanted = replay(bench, GRID, bench.inputs())
    for attn in bench.attentions:
        del attn.processor
        attn.processor = way().eval() if way is AModule else way()
    if when == "before apply":
        monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)
    with ah.applied(bench.pipe, plan(bench, GRID)) as run:
        monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)
        if way in BY_MODE:
            with pytest.raises(NotIntercepted, match=r"scaled_dot_product_attention is replaced by a Replacement.*put torch's"):
                bench.pipe(**bench.inputs())
            return
        assert_same(trace(bench, bench.inputs()), wanted)
    assert run.summary().kernels["native"] == sum(row.count(letter) for row in GRID for letter in "FC")
    decoded = 1  # the decoder attends, too
    assert replacement.calls == decoded + (0 if way is ByImportedName else run.summary().kernels["native"])


@pytest.mark.parametrize("way", [way for way in WAYS if way not in BY_MODE], ids=lambda way: way.__name__)
def test_a_full_plan_changes_no_bit(way, replacement, monkeypatch):
    bench = dit()
    for attn in bench.attentions:
        del attn.processor
        attn.processor = way().eval() if way is AModule else way()
    monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)
    untouched, calls = trace(bench, bench.inputs()), replacement.calls
    with ah.applied(bench.pipe, plan(bench, ["FFF"] * 5)):
        assert_identical(trace(bench, bench.inputs()), untouched)
    assert replacement.calls == 2 * calls


@pytest.mark.parametrize("bound", [False, True], ids=["torch's by name", "the user's by name"])
@pytest.mark.parametrize("when", ["before apply", "after apply"])
def test_modules_of_custom_models(when, bound, replacement, monkeypatch):
    """Their forward, which runs under a mode of torch otherwise."""
    here = own.Own(own.STDiT2(fused=False).double(), SEPARATE)
    sites = sites_of(here)
    the_plan = plan_of(here, [[FULL] * len(sites), *[[Attend(Arrow(1))] * len(sites)] * (here.steps - 1)])
    wanted = here.sample()
    if bound:
        monkeypatch.setattr(own, "attend_by_another_name", replacement)
    with own.replaying(here, sites, the_plan.columns):
        banded = here.sample()
    if when == "before apply":
        monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)
    with ah.applied(here.model, the_plan, SEPARATE):
        monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)
        torch.testing.assert_close(here.sample(), banded, rtol=1e-5, atol=1e-5)
    assert (banded - wanted).norm() > 1e-2 * wanted.norm()
    assert (replacement.calls > 0) is bound


def test_nothing_of_the_kernels_reads_the_function_when_it_runs():
    for module in (boxes, chunked):
        assert module.TORCH_ATTENTION is TORCH_ATTENTION
