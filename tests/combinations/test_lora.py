"""LoRA by peft, loaded, scaled, swapped, fused and unloaded: as if each layer's weight were W + s·B·A, added by hand."""

import pytest
import torch
from matrix import combines
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from subjects import subject

import arrowhead as ah
from arrowhead.models.head_separation import can_project_heads_separately
from arrowhead.plans.layout import ALL_KINDS

GROUP = "LoRA"
LAYERS = {  # by the ends of their paths: in attention, feed-forwards, and of modulation
    "sd3": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "net.0.proj", "net.2", "norm1.linear"),
    "flux": ("to_q", "to_v", "to_out.0", "add_v_proj", "net.2", "proj_mlp", "norm.linear"),
    "own": ("qkv", "mlp.0", "mlp.2"),
}
RANK = 2
PIPELINES = {"sd3": "works", "flux": "works"}


def kinds_of(mechanism):
    return frozenset({"self_attention", "feed_forward"}) if mechanism == "own" else ALL_KINDS - {"block"}


def drawn(here, mechanism, seed):
    """A LoRA at random: path of a layer → A (rank, in), B (out, rank)."""
    generator = torch.Generator().manual_seed(seed)
    linears = {path: m for path, m in here.transformer.named_modules() if path.endswith(LAYERS[mechanism])}
    return {
        path: (
            torch.randn(RANK, layer.in_features, generator=generator).double() / layer.in_features**0.5,
            torch.randn(layer.out_features, RANK, generator=generator).double() * 0.4,
        )
        for path, layer in linears.items()
    }


def load(here, lora, name="one"):
    """Into a pipeline as users do; into a custom model by peft."""
    if here.adapter is None:
        parts = {
            f"transformer.{path}.lora_{w}.weight": m for path, both in lora.items() for w, m in zip("AB", both, strict=True)
        }
        here.pipe.load_lora_weights(parts, adapter_name=name)
        return
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[*lora]), here.transformer, name)
    for path, (a, b) in lora.items():
        layer = here.transformer.get_submodule(path)
        layer.lora_A[name].weight.data.copy_(a)
        layer.lora_B[name].weight.data.copy_(b)


def merged(mechanism, *loras, seed=1, plan=None, **inputs):
    """What a pipeline gives whose weights were changed by hand, (LoRA, scale) each."""
    there = subject(mechanism)
    for lora, scale in loras:
        for path, (a, b) in lora.items():
            there.transformer.get_submodule(path).weight.data += scale * (b @ a)
    return there.generate(seed, **inputs) if plan is None else there.compressed(plan, seed, **inputs)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@combines(GROUP, "loaded before the plan, or while it is applied")
@pytest.mark.parametrize("kinds", ["modules", "blocks"])
def test_loaded(mechanism, outcome, kinds):
    """Plans are bound to no LoRA; heads are projected all together where there is one, and apart where there is none."""
    if kinds == "blocks" and mechanism == "own":
        pytest.skip("its blocks are no sites")
    before, after = subject(mechanism), subject(mechanism)
    lora = drawn(before, mechanism, 5)
    plan = before.plan(3, kinds_of(mechanism) if kinds == "modules" else frozenset({"block"}))
    base, wanted = before.compressed(plan, 1), merged(mechanism, (lora, 1.0), plan=plan)
    assert (base - wanted).norm() > 1e-2 * base.norm()
    load(before, lora)
    same(before.compressed(plan, 1), wanted)
    same(before.generate(1), merged(mechanism, (lora, 1.0)))
    with after.applied(plan) as run:
        assert torch.equal(after.generate(1), base)
        load(after, lora)
        same(after.generate(1), wanted)
        assert run.summary().notes == ()
    same(after.generate(1), merged(mechanism, (lora, 1.0)))


@combines(GROUP, "set_adapters, disable_lora, delete_adapters, unload_lora_weights while applied", PIPELINES)
def test_swapped(mechanism, outcome):
    here = subject(mechanism)
    one, two = (drawn(here, mechanism, seed) for seed in (5, 6))
    plan = here.plan(3, kinds_of(mechanism))
    base = here.compressed(plan, 1)
    with here.applied(plan):
        load(here, one, "one")
        load(here, two, "two")
        here.pipe.set_adapters(["one", "two"], [0.7, -0.4])
        same(here.generate(1), merged(mechanism, (one, 0.7), (two, -0.4), plan=plan))
        here.pipe.set_adapters("two")
        same(here.generate(1), merged(mechanism, (two, 1.0), plan=plan))
        here.pipe.disable_lora()
        same(here.generate(1), base)
        here.pipe.enable_lora()
        here.pipe.delete_adapters("two")
        here.pipe.set_adapters("one")
        same(here.generate(1), merged(mechanism, (one, 1.0), plan=plan))
        here.pipe.unload_lora_weights()
        same(here.generate(1), base)  # not to the bit even without a plan: weights lie elsewhere in memory
        assert all(
            map(can_project_heads_separately, (m for path, m in here.transformer.named_modules() if path.endswith(".attn")))
        )


@combines(GROUP, "fuse_lora, unfuse_lora while applied", PIPELINES)
def test_fused(mechanism, outcome):
    here = subject(mechanism)
    lora, plan = drawn(here, mechanism, 5), here.plan(3, kinds_of(mechanism))
    with here.applied(plan):
        load(here, lora)
        here.pipe.fuse_lora(lora_scale=0.6)
        same(here.generate(1), merged(mechanism, (lora, 0.6), plan=plan))
        here.pipe.unfuse_lora()  # the scale stays, as diffusers has it
        same(here.generate(1), merged(mechanism, (lora, 0.6), plan=plan))
        here.pipe.fuse_lora()
        here.pipe.unload_lora_weights()  # what is fused stays
        same(here.generate(1), merged(mechanism, (lora, 0.6), plan=plan))


@combines(GROUP, "a scale in joint_attention_kwargs", PIPELINES)
def test_scaled_in_the_call(mechanism, outcome):
    here = subject(mechanism)
    lora, plan = drawn(here, mechanism, 5), here.plan(3, kinds_of(mechanism))
    load(here, lora)
    with here.applied(plan):
        scaled = here.generate(1, joint_attention_kwargs={"scale": 0.3})
        same(scaled, merged(mechanism, (lora, 0.3), plan=plan))
        same(here.generate(1), merged(mechanism, (lora, 1.0), plan=plan))


@combines(GROUP, "merged in place by peft, in a custom model", {"own": "works"})
def test_merged_in_place(mechanism, outcome):
    here = subject(mechanism)
    lora, plan = drawn(here, mechanism, 5), here.plan(3, kinds_of(mechanism))
    with here.applied(plan):
        load(here, lora)
        for layer in filter(lambda m: isinstance(m, LoraLayer), here.transformer.modules()):
            layer.merge()
        same(here.generate(1), merged(mechanism, (lora, 1.0), plan=plan))


@pytest.mark.filterwarnings("ignore::arrowhead.errors.OtherWeights")  # merged weights are others
@combines(GROUP, "searches on a model with a LoRA: the plan of the merged one")
@pytest.mark.parametrize("strategy", ["headwise", "budget"])
def test_searched(mechanism, outcome, strategy):
    """Without caching of heads, whose worth is less where all of them are projected."""
    here, there = subject(mechanism), subject(mechanism)
    lora = drawn(here, mechanism, 5)
    for path, (a, b) in lora.items():
        there.transformer.get_submodule(path).weight.data += b @ a
    load(here, lora)
    settings = {"strategy": ah.Headwise(radii=(2, 5), caching=False), "threshold": 0.4}
    if strategy == "budget":
        extent = ah.Extent(radii=(2, 5), ages=2, kinds=tuple(kinds_of(mechanism)))
        settings = {"budget": ah.Budget(transformer_flops=0.75, granularity="step", corrections=0), "extent": extent}
    found, wanted = here.search(**settings), there.search(**settings)
    assert found.target == wanted.target
    assert {*wanted.count()} != {"full"}
    if strategy == "headwise":
        assert found.cells == wanted.cells
    same(here.compressed(found, 1), merged(mechanism, (lora, 1.0), plan=found))
