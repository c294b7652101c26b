"""Modules that an adapter describes wrongly: blocks, attention without projections, forwards that never run, attributes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import flux
from families import MORE
from own_wan import ADAPTER, HEADS, WIDTH, Wan, WanModel
from pipelines import dit, pixart_sigma, sd3
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import arrowhead as ah
from arrowhead.engine.adapter_checks import require_described
from arrowhead.engine.attention_hook import under_mode
from arrowhead.engine.site_calls import ForwardSiteCall
from arrowhead.errors import InputsInvalid, NotIntercepted, UnsupportedPipeline
from arrowhead.models.custom import CustomModel
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL
from arrowhead.plans.flops import full_flops
from arrowhead.plans.layout import ALL_KINDS

BENCHES = {"dit": dit, "pixart": pixart_sigma, "sd3": sd3, "flux": flux, **MORE}
QUICK = ("dit", "sd3", "flux", "wan")


def by_family(test):
    names = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in BENCHES]
    return pytest.mark.parametrize("name", names)(test)


def wan_with(attention, pattern=r"blocks\.\d+\.self_attn", layers=2):
    return Wan(WanModel(layers), steps=3), replace(ADAPTER, attention={pattern: attention}, feed_forward=r"(?!)")


def plan_of(wan, adapter, cell):
    model = find(CustomModel(wan.model, adapter))
    rows = ((FULL,) * len(model.sites),) + ((cell,) * len(model.sites),) * (wan.steps - 1)
    return ah.Plan(rows, target_of(model), ah.Tokens(18), True, calls=2)


@by_family
def test_blocks_are_told_from_attention_in_every_family(name):
    """Each module of the family's as if an adapter had named it: attention is attention, and a block is none."""
    bench, calls = BENCHES[name](), {}
    model = find(bench.pipe, ALL_KINDS)
    sites = [site for site in model.sites if site.kind in ("self_attention", "block")]
    for site in sites:
        model.modules[site].register_forward_pre_hook(partial(noted, calls, site.path), with_kwargs=True)
    bench.pipe(**bench.inputs(images=2))
    blocks = attentions = 0
    for site in sites:
        module, (args, kwargs) = model.modules[site], calls[site.path]
        call = ForwardSiteCall(site, module, module.forward, args, kwargs, under_mode(module.forward))
        if site.kind == "self_attention":
            require_described(call, replaced=False)
            attentions += 1
            continue
        if getattr(module, "skip_linear", None) is not None:
            continue  # HunyuanDiT's second half projects its input together with another block's output
        with pytest.raises(NotIntercepted, match="output contains its input"):
            require_described(call, replaced=False)
        blocks += 1
    assert attentions > 0
    assert blocks > 0 or not any(site.kind == "block" for site in sites)


def noted(calls, path, _, args, kwargs):
    calls.setdefault(path, (args, kwargs))


@pytest.mark.parametrize("how", ["greedy", "headwise", "budget", "apply"])
def test_a_block_named_as_attention_is_refused(how):
    wan, adapter = wan_with(ah.Attention(HEADS, WIDTH // HEADS, projections=False), r"blocks\.\d+")
    said = r"blocks\.0: .* WanAttentionBlock whose output contains its input.*name blocks\.0\.self_attn, where it calls"
    plan = plan_of(wan, adapter, AST)

    def run():
        if how != "apply":
            settings = {"budget": ah.Budget(module_flops=0.5)} if how == "budget" else {"strategy": how, "threshold": 0.5}
            return ah.search(wan.model, wan.sample, adapter=adapter, progress=False, **settings)
        with ah.applied(wan.model, plan, adapter):
            return wan.sample()

    with pytest.raises(NotIntercepted, match=said):
        run()
    wan.sample()


def test_a_block_by_its_layers_is_refused():
    """Its feed-forward would be counted as projections."""
    wan, adapter = wan_with(ah.Attention(HEADS, WIDTH // HEADS, WIDTH), r"blocks\.\d+")
    with pytest.raises(UnsupportedPipeline, match=r"blocks\.0: got a WanAttentionBlock with 3072 weights .* wanted 1024"):
        ah.search(wan.model, wan.sample, adapter=adapter, progress=False)


class Bare(nn.Module):
    """Attention of queries, keys and values (B, N, H, D) that the block projects; or the output's projection with it."""

    def __init__(self, out=None):
        super().__init__()
        self.num_heads = HEADS
        self.out = out

    def forward(self, q, k, v):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out.transpose(1, 2).flatten(2)
        return out if self.out is None else self.out(out)


class Projecting(nn.Module):
    """Wan's attention in parts."""

    def __init__(self, own, inside):
        super().__init__()
        self.norm_q, self.norm_k, self.q, self.k, self.v = own.norm_q, own.norm_k, own.q, own.k, own.v
        self.o, self.inner = nn.Identity() if inside else own.o, Bare(own.o if inside else None)

    def forward(self, x, seq_lens, grid_sizes, freqs):
        parts = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        return self.o(self.inner(*(part.unflatten(2, (HEADS, -1)) for part in parts)))


@pytest.mark.parametrize("inside", [False, True], ids=["none", "of the output"])
def test_attention_without_projections_counts_what_there_is(inside, tmp_path):
    """By torch's counter of FLOPs; and a plan of it is what its file says."""
    attention = ah.Attention(head_dim=WIDTH // HEADS, projections=False)
    wan, adapter = wan_with(attention, r"blocks\.\d+\.self_attn\.inner")
    for block in wan.model.blocks:
        block.self_attn = Projecting(block.self_attn, inside)
    plan = plan_of(wan, adapter, AST)
    counted, inner = [], wan.model.blocks[0].self_attn.inner
    forward = inner.forward

    def counting(*args):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # of others it counts none on a CPU
            out = forward(*args)
        counted.append(counter.get_total_flops())
        return out

    inner.forward = counting
    wan.sample()
    del inner.forward
    site = plan.target.sites[0]
    assert {full_flops([site], plan.tokens, 1).module} == {*counted}
    plan.save(tmp_path / "plan.json")
    assert ah.Plan.load(tmp_path / "plan.json") == plan
    with ah.applied(wan.model, ah.Plan.load(tmp_path / "plan.json"), adapter) as run:
        wan.sample()
        summary = run.summary()
        held = plan.cache_bytes(1, 4)
    assert summary.flops.module == pytest.approx(1 / 3)
    assert summary.peak_cache_bytes == max(held)
    assert (summary.flops, plan.flops().attention) == (plan.flops(), pytest.approx(1 / 3))
    found = ah.search(wan.model, wan.sample, adapter=adapter, strategy="headwise", threshold=0.9, progress=False)
    assert found.flops().attention < 1


def test_projections_that_do_not_exist_are_not_counted():
    wan, adapter = wan_with(ah.Attention(head_dim=8, channels=16), r"blocks\.\d+\.self_attn\.inner")
    for block in wan.model.blocks:
        block.self_attn = Projecting(block.self_attn, inside=False)
    with pytest.raises(UnsupportedPipeline, match=r"inner: got a Bare with 0 weights .* wanted 1024.*projections=False"):
        plan_of(wan, adapter, AST)
    with pytest.raises(InputsInvalid, match="projections=False without head_dim"):
        ah.Attention(projections=False)


def test_files_of_attention_with_projections_say_what_they_said():
    wan, adapter = wan_with(ah.Attention())
    assert "projections" not in str(plan_of(wan, adapter, AST).target.as_json())


class Stream(nn.Module):
    """As in flux's own source: the block uses the parts of its attention, whose forward never runs."""

    def __init__(self, own):
        super().__init__()
        self.img_attn = own

    def forward(self, x, seq_lens, grid_sizes, freqs):
        own = self.img_attn
        q, k, v = (layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (own.q, own.k, own.v))
        return own.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("strategy", ["greedy", "headwise", "budget"])
def test_a_forward_that_is_never_called_is_named(strategy):
    wan, adapter = wan_with(ah.Attention(), r"blocks\.\d+\.self_attn\.img_attn", layers=5)
    for block in wan.model.blocks:
        block.self_attn = Stream(block.self_attn)
    how = {"budget": ah.Budget(module_flops=0.5)} if strategy == "budget" else {"strategy": strategy, "threshold": 0.5}
    with pytest.raises(NotIntercepted) as caught:
        ah.search(wan.model, wan.sample, adapter=adapter, progress=False, **how)
    said = str(caught.value)
    assert "the forward of blocks.0.self_attn.img_attn, blocks.1.self_attn.img_attn, " in said
    assert "and 2 more was never called" in said
    assert "torch's attention was called in blocks.0.self_attn (Stream), blocks.1.self_attn (Stream), " in said


def test_a_wrong_attribute_names_the_whole_numbers_there_are():
    for attention in (ah.Attention(heads="heads"), ah.Attention(heads="norm_q")):
        wan, adapter = wan_with(attention)
        with pytest.raises(UnsupportedPipeline, match="its whole numbers are dim=16, num_heads=2, head_dim=8") as caught:
            plan_of(wan, adapter, AST)
        assert "WanSelfAttention" in str(caught.value)


def test_errors_of_adapters_are_short():
    """Also where what is wrong is large."""
    large = torch.zeros(100, 100).tolist()
    wrong = [
        lambda: ah.Attention(heads=large),
        lambda: ah.Attention(head_dim=large),
        lambda: ah.Attention(over=large),
        lambda: ah.Attention(joint=large),
        lambda: ah.Attention(forward=large),
        lambda: ah.Attention(projections=large),
        lambda: ah.FusedQKV(qkv=large),
        lambda: ah.FusedQKV(rotary_first=large),
        lambda: replace(ADAPTER, cfg=large),
        lambda: replace(ADAPTER, guidance_scale=large),
        lambda: replace(ADAPTER, latent_channels=large),
        lambda: replace(ADAPTER, attention=large),
        lambda: replace(ADAPTER, feed_forward="x" * 100_000 + "("),
    ]
    for make in wrong:
        with pytest.raises(InputsInvalid) as caught:
            make()
        assert len(str(caught.value)) < 800

    def tokens(*_):
        raise ValueError(large)

    wan = Wan(WanModel(1), steps=2)
    for adapter in (replace(ADAPTER, tokens=tokens), replace(ADAPTER, feed_forward="x" * 100_000)):
        with pytest.raises((InputsInvalid, UnsupportedPipeline)) as caught:
            ah.search(wan.model, wan.sample, adapter=adapter, progress=False)
        assert len(str(caught.value)) < 800
