"""`describe`: the adapter that a watched run gives beside the one that was written by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from authored import MODELS, Authored, dit_model, flux_model, wan_model
from authors import functions, images, wan
from family_replay import random_cells
from own import Own, STDiT2, left_alone
from torch import nn

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import CustomModel
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.layout import ALL_KINDS


def sites(model, adapter):
    return {*find(CustomModel(model, adapter), ALL_KINDS).sites}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_described_is_what_is_written_by_hand(name):
    """The same sites, and a random plan for the one gives, bit for bit, the same with the other."""
    own = replace(MODELS[name](), steps=3)
    untouched, before = own.sample(), left_alone(own.model)
    random = torch.get_rng_state()
    described = ah.describe(own.model, own.sample)
    assert torch.equal(torch.get_rng_state(), random)
    assert left_alone(own.model) == before
    assert torch.equal(own.sample(), untouched)
    assert sites(own.model, described.adapter) == sites(own.model, own.adapter)
    assert described.adapter.cfg == own.adapter.cfg
    assert described.adapter.latent_channels == own.adapter.latent_channels
    kinds = {"self_attention", "feed_forward"}
    cells = random_cells(1, own.found(kinds).sites, own.steps, own.guided)
    plan = own.plan(cells, kinds)
    with ah.applied(own.model, plan, own.adapter):
        wanted = own.sample(1)
    with ah.applied(own.model, plan, described.adapter) as run:
        assert torch.equal(own.sample(1), wanted)
        assert run.summary().notes == ()
        assert run.summary().flops.module == pytest.approx(plan.flops().module)
    space = {}
    exec(str(described), space)
    assert sites(own.model, space["adapter"]) == sites(own.model, own.adapter)


def test_the_older_open_sora():
    own = Own(STDiT2().double(), replace(ah.open_sora(guidance_scale=3.0, temporal=True)))
    described = ah.describe(own.model, own.sample)
    hand = replace(own.adapter, cross_attention={r"blocks\.\d+\.cross_attn": "kv_linear"})
    got = {site for site in sites(own.model, described.adapter) if site.kind in ("self_attention", "feed_forward")}
    assert got == {site for site in sites(own.model, hand) if site.kind != "cross_attention"}
    target = target_of(find(CustomModel(own.model, own.adapter)))
    cells = tuple(map(tuple, random_cells(2, target.sites, own.steps, True)))
    plan = ah.Plan(cells, target, own.tokens, True)
    with ah.applied(own.model, plan, own.adapter):
        wanted = own.sample(1)
    with ah.applied(own.model, plan, described.adapter):
        assert torch.equal(own.sample(1), wanted)


def test_a_kernel_that_torch_does_not_see(monkeypatch):
    """Flash attention, for one: its function is known by what it is given."""
    own, plain = wan_model(), functions.flash_attention

    def flash_attention(q, k, v, k_lens=None, window_size=(-1, -1)):
        with torch._C.DisableTorchFunction():
            return plain(q, k, v, k_lens=k_lens)

    monkeypatch.setattr(wan, "flash_attention", flash_attention)
    described = ah.describe(own.model, own.sample)
    assert dict(described.adapter.attention) == dict(own.adapter.attention)
    assert sites(own.model, described.adapter) == sites(own.model, own.adapter)


def looped(model, conditions, steps=3, calls=1):
    """DiT with its labels: those of a call for each entry of `conditions`."""

    def run():
        z = torch.randn(2, 4, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for step in range(steps):
            outs = []
            for labels in conditions:
                rows = len(labels) // 2
                t = torch.full((len(labels),), 1000.0 - step, dtype=torch.float64)
                outs.append(model(torch.cat([z] * rows), t, torch.tensor(labels))[:2, :4])
            z = z - sum(outs) / steps
        return z

    return run


@pytest.mark.parametrize(
    ("conditions", "cfg", "said"),
    [
        ([[1, 2, 0, 0]], "cond_first", ""),
        ([[10, 10, 1, 2]], "uncond_first", ""),
        ([[1, 2, 3, 4]], "cond_first", "which of the two branches"),
        ([[1, 2], [10, 10]], "two_calls", ""),
        ([[10, 10], [1, 2]], "two_calls", "the conditional call first"),
        ([[1, 2]], None, ""),
    ],
)
def test_how_branches_come(conditions, cfg, said):
    own = dit_model()
    described = ah.describe(own.model, looped(own.model, conditions))
    assert described.adapter.cfg == cfg
    unknown = " ".join(described.unknown)
    assert (said in unknown) if said else "cfg" not in unknown
    assert ("guidance_scale" in unknown) == (cfg is not None)


class Inline(nn.Module):
    """A block whose code multiplies queries and keys."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out((self.attended(q, k, v)).transpose(1, 2).flatten(2))

    def attended(self, q, k, v):
        return (q @ k.mT).softmax(-1) @ v


class ByTorch(Inline):
    def attended(self, q, k, v):
        return F.scaled_dot_product_attention(query=q, key=k, value=v)


class Twice(ByTorch):
    def attended(self, q, k, v):
        return super().attended(q, super().attended(q, k, v), v)


class Stack(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return x


def described(model, shape=(2, 12, 8)):
    def run():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for step in range(3):
            x = x - model(x, torch.full((2,), float(step))) / 9
        return x

    return ah.describe(model, run)


def test_attention_in_the_code_of_a_block():
    found = described(Stack(ByTorch)).adapter
    assert found.attention == {}
    assert found.functions == (ah.AttentionIn(r"blocks\.\d+"),)
    assert found.blocks == {r"blocks\.\d+": ah.Block(inputs="x")}


def test_what_cannot_be_described_is_said():
    with pytest.raises(InputsInvalid, match=r"blocks.\\d\+ \(Inline\): blocks.0: .*; left out"):
        described(Stack(Inline))
    with pytest.raises(InputsInvalid, match=r"\(Twice\): it attends several times"):
        described(Stack(Twice))
    linear = nn.Linear(8, 8)
    with pytest.raises(InputsInvalid, match="no self-attention in a Linear"):
        ah.describe(linear, lambda: linear(torch.randn(2, 3, 8)))
    with pytest.raises(InputsInvalid, match="no call of the model in the run"):
        ah.describe(Stack(ByTorch), lambda: None)
    model = images.DiT()
    with pytest.raises(InputsInvalid, match="as the first argument"):
        ah.describe(model.y_embedder, lambda: model.y_embedder(torch.arange(3)))
    with pytest.raises(InputsInvalid, match="and a callable that"):
        ah.describe(None, print)


def test_a_model_is_left_as_it_was_where_its_run_fails():
    own = flux_model()
    before = left_alone(own.model)

    def fails():
        own.sample()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ah.describe(own.model, fails)
    assert left_alone(own.model) == before


def test_as_many_frames_as_places_are_not_told_apart():
    own: Authored = MODELS["open-sora 1.2"]()
    found = ah.describe(own.model, lambda: own.sample(frames=10))
    assert any("in space or along time" in text for text in found.unknown)
