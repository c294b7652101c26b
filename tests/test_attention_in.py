"""Attention that is a function: how it is reached, what stays as it is, what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from authored import MODELS, flux_model, pixart_model, replaying, sd3_model, wan_model
from authors import flux as bfl
from authors import functions, images, wan
from family_replay import RADII, random_cells
from torch import nn

import arrowhead as ah
from arrowhead.errors import (
    AlreadyApplied,
    ArrowheadError,
    InputsInvalid,
    NotIntercepted,
    PlanMismatch,
    UnsupportedPipeline,
)
from arrowhead.models.custom import CustomModel
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Arrow, Attend
from arrowhead.searches.headwise import Headwise


def cell_plan(own, cell, steps=None):
    sites = len(own.found().sites)
    return own.plan([[FULL] * sites, *[[cell] * sites] * ((steps or own.steps) - 1)])


@pytest.mark.parametrize("padding", [0, 3])
def test_keys_behind_a_sample_s_length_are_hidden(padding):
    """Wan pads videos to `seq_len` tokens: they are queries, and no keys."""
    own = wan_model()
    tokens = ah.Tokens(18 + padding, text=5)
    model = own.found()
    cells = random_cells(3, model.sites, own.steps, own.guided)
    plan = replace(own.plan(cells), tokens=tokens.image)
    with ah.applied(own.model, plan, own.adapter):
        given = own.sample(1, padding=padding)
    with replaying(own, model, plan.columns, tokens):
        torch.testing.assert_close(given, own.sample(1, padding=padding), rtol=1e-6, atol=1e-6)


SEARCHES = {
    "greedy": {"threshold": 0.7},
    "headwise": {"strategy": Headwise(radii=RADII, share_cfg=True, residual=True), "threshold": 0.8},
    "budget": {"budget": ah.Budget(attention_flops=0.6)},
}
QUICK = {("flux", "budget"), ("sd3", "headwise"), ("wan", "greedy")}


@pytest.mark.parametrize(
    ("name", "search"),
    [
        pytest.param(name, search, marks=() if (name, search) in QUICK else pytest.mark.slow)
        for name in MODELS
        for search in SEARCHES
    ],
)
def test_searches_compress_and_their_plans_run(name, search):
    own, how = MODELS[name](), SEARCHES[search]
    own = replace(own, model=own.model.float())
    untouched = own.sample()
    plan = ah.search(own.model, own.sample, adapter=own.adapter, progress=False, **how)
    assert torch.equal(own.sample(), untouched)
    assert {*plan.target.sites} == {*own.found().sites}
    with ah.applied(own.model, plan, own.adapter) as run:
        compressed = own.sample()
        assert run.summary().flops.attention == pytest.approx(plan.flops().attention)
    assert plan.flops().attention < 1
    assert not torch.equal(compressed, untouched)
    if "budget" in how:
        error = ((compressed - untouched).norm() / untouched.norm()).item()
        assert plan.about["search"]["measured_error"] == pytest.approx(error, rel=1e-2)


def test_no_other_model_of_the_file_sees_a_plan():
    own, other = flux_model(), bfl.Flux().double()
    before, untouched = dict(vars(bfl)), bfl.denoise(other)
    with ah.applied(own.model, cell_plan(own, AST), own.adapter):
        assert torch.equal(bfl.denoise(other), untouched)
        assert dict(vars(bfl)) == before
        assert isinstance(own.model.double_blocks[0], bfl.DoubleStreamBlock)
        assert type(other.double_blocks[0]) is bfl.DoubleStreamBlock
        assert not torch.equal(own.sample(), untouched)
    assert type(own.model.double_blocks[0]) is bfl.DoubleStreamBlock


def test_a_block_with_a_plan_is_not_copied():
    own = flux_model()
    with ah.applied(own.model, cell_plan(own, AST), own.adapter):
        with pytest.raises(AlreadyApplied, match="copy, or a pickle"):
            copy.deepcopy(own.model.double_blocks[0])
        with pytest.raises(AlreadyApplied):
            ah.search(own.model, own.sample, adapter=own.adapter, progress=False)
    copy.deepcopy(own.model)


def test_what_keeps_a_method_while_a_plan_is_on_runs_it_as_without_afterwards():
    own = flux_model()
    untouched = own.sample()
    with ah.applied(own.model, cell_plan(own, AST), own.adapter):
        kept = own.model.single_blocks[0].forward
    own.model.single_blocks[0].forward = kept
    assert torch.equal(own.sample(), untouched)


class Inline(nn.Module):
    """A block that calls torch's attention in its own code."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        nn.init.normal_(self.qkv.weight)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Flash(Inline):
    """A block that calls an attention function of another layout."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return x + self.out(functions.flash_attention(q, k, v, **self.more()).flatten(2))

    def more(self):
        return {}


class Twice(Inline):
    def forward(self, x):
        return Inline.forward(self, x) + functions.attention(x, x, x)


class Stack(nn.Module):
    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.double().requires_grad_(False)

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return x


def generate(model, steps=4):
    x = torch.randn(2, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        x = x - model(x, torch.full((2,), float(steps - step))) / steps
    return x


def adapter_of(**more):
    return ah.Adapter(functions=[ah.AttentionIn(r"blocks\.\d+", **more)], tokens=lambda _, call: ah.Tokens(call["x"].shape[1]))


def applied_to(model, adapter, cell, steps=4):
    target = target_of(find(CustomModel(model, adapter)))
    cells = ((FULL,) * 2, *((cell,) * 2,) * (steps - 1))
    return ah.applied(model, ah.Plan(cells, target, ah.Tokens(12), False), adapter)


def banded(radius):
    def attention(q, k, v, **_):
        near = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs() <= radius
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~near, -torch.inf)
        return scores.softmax(-1) @ v

    return attention


@pytest.mark.parametrize("inline", [True, False])
def test_a_band_in_the_code_of_a_block(inline, monkeypatch):
    """Torch's attention in the block's own code, or a function with tokens before heads, beside the block by hand."""
    block, named = (Inline, {}) if inline else (Flash, {"function": "flash_attention", "layout": "BNHD"})
    model, adapter = Stack(block), adapter_of(**named)
    with applied_to(model, adapter, Attend(Arrow(2))) as run:
        given = generate(model)
        assert run.summary().flops.attention < 1
    steps, hand = [], banded(2)

    def by_hand(q, k, v, **more):
        steps.append(1)
        tokens_first = not inline
        q, k, v = (part.transpose(1, 2) if tokens_first else part for part in (q, k, v))
        out = (banded(99) if len(steps) <= 2 else hand)(q, k, v)
        return out.transpose(1, 2) if tokens_first else out

    if inline:
        monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand)
    else:
        monkeypatch.setattr(functions, "flash_attention", by_hand)
    torch.testing.assert_close(given, generate(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"window_size": (2, 2)}, r"flash_attention with window_size=\(2, 2\)"),
        ({"causal": True}, "with causal=True"),
        ({"dropout_p": 0.1}, "with dropout_p=0.1"),
        ({"q_scale": 2.0}, "with q_scale=2.0"),
        ({"q_lens": torch.tensor([3, 3])}, "with q_lens=tensor"),
    ],
)
def test_what_a_function_does_besides_is_refused_where_a_band_is_asked_for(more, said, monkeypatch):
    class Odd(Flash):
        def more(self):
            return more

    plain = functions.flash_attention

    def flash_attention(q, k, v, window_size=(-1, -1), causal=False, dropout_p=0.0, q_scale=None, q_lens=None):
        return plain(q, k, v)

    monkeypatch.setattr(functions, "flash_attention", flash_attention)
    model, adapter = Stack(Odd), adapter_of(function="flash_attention", layout="BNHD")
    with pytest.raises(NotIntercepted, match=said), applied_to(model, adapter, Attend(Arrow(2))):
        generate(model)
    with applied_to(model, adapter, AST):
        generate(model)


def refused(model, adapter, cell, error, match):
    with pytest.raises(error, match=match), applied_to(model, adapter, cell):
        generate(model)


def test_errors_say_what_to_name():
    model, band = Stack(Inline), Attend(Arrow(2))
    refused(
        model, adapter_of(function="attention"), AST, NotIntercepted, "Inline whose code does not call a function 'attention'"
    )
    refused(model, adapter_of(heads="heads"), AST, UnsupportedPipeline, r"Inline without 'heads'.*num_heads=2")
    refused(model, adapter_of(heads=3), AST, UnsupportedPipeline, "for the channels of each of 3 heads")
    refused(model, adapter_of(head_dim=2), band, PlanMismatch, "correct `tokens`")
    refused(Stack(Flash), adapter_of(function="flash_attention"), band, NotIntercepted, "say the layout of arrowhead")
    for wrong in (
        {"function": "ops.attention"},
        {"function": 3},
        {"heads": 0},
        {"over": "x"},
        {"joint": 1},
        {"layout": "NHD"},
        {"head_dim": 0},
    ):
        with pytest.raises(InputsInvalid, match="wanted"):
            adapter_of(**wrong)
    for wrong in ({"function": "f"}, {"layout": "BNHD"}, {"function": "f", "layout": "BNHD", "forward": print}):
        with pytest.raises(InputsInvalid, match="wanted"):
            ah.Attention(**wrong)
    with pytest.raises(InputsInvalid, match="wanted a list of arrowhead"):
        ah.Adapter(functions=[r"blocks\.\d+"], tokens=print)


def test_a_function_that_is_called_twice_is_refused():
    class Two(Inline):
        def forward(self, x):
            q = x.unflatten(-1, (2, -1)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
            return x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    said = r"blocks\.0\.scaled_dot_product_attention\(\): .* in a Two is called.* twice"
    refused(Stack(Two), adapter_of(), AST, NotIntercepted, said)


def test_a_module_whose_forward_was_replaced_is_refused():
    """A hook calls the class's forward that it found, which does not see the plan."""
    own = pixart_model()
    attention = own.model.blocks[0].attn
    attention.forward = lambda *args, **kwargs: images.AttentionKVCompress.forward(attention, *args, **kwargs)
    with pytest.raises(NotIntercepted, match="forward was replaced on the instance"):
        ah.apply(own.model, cell_plan(own, AST), own.adapter)
    own = flux_model()
    plan, block = cell_plan(own, AST), own.model.single_blocks[0]
    block.forward = block.forward
    said = r"single_blocks\.0\.attention\(\).*got no call"
    with pytest.raises(ArrowheadError, match=said), ah.applied(own.model, plan, own.adapter):
        own.sample()


def test_compressed_keys_are_refused():
    own, model = pixart_model(), images.PixArtMS(sr_ratio=2)
    with pytest.raises(InputsInvalid, match=r"blocks \[0, 1\] whose keys and values are compressed"):
        ah.search(model, lambda: images.sample(model), adapter=own.adapter, progress=False)
    with ah.applied(own.model, cell_plan(own, AST), own.adapter):
        own.model.blocks[0].attn.sr_ratio = 2
        with pytest.raises(InputsInvalid, match="keys and values are compressed"):
            own.sample()


def test_names_of_sites():
    assert [site.path for site in sd3_model().found().sites] == [f"joint_blocks.{i}.attention()" for i in range(3)]
    site = flux_model().found().sites[0]
    assert (site.path, site.module_path, site.is_function) == ("double_blocks.0.attention()", "double_blocks.0", True)
    assert wan.WanSelfAttention is type(wan_model().model.get_submodule(wan_model().found().sites[0].module_path))
    own = flux_model()
    again = replace(own, adapter=replace(own.adapter, functions=own.adapter.functions * 2))
    with pytest.raises(UnsupportedPipeline, match="twice"):
        again.found()
