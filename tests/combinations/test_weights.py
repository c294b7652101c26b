"""Weights that are not plain: int8 by torchao, kept in float8 by layerwise casting, projections fused into one."""

import contextlib

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from matrix import combines
from subjects import subject
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import arrowhead as ah
from arrowhead.models.head_separation import can_project_heads_separately
from arrowhead.plans.layout import ALL_KINDS

GROUP = "Weights"
FLOAT8 = torch.float8_e4m3fn
APART = ("pos_embed", "norm", "^x_embedder", "^t_embedder", "^final_layer", "^proj_out$")


def kinds_of(mechanism):
    return frozenset({"self_attention", "feed_forward"}) if mechanism == "own" else ALL_KINDS - {"block"}


def quantised(transformer):
    quantize_(transformer, Int8WeightOnlyConfig(), lambda m, _: isinstance(m, nn.Linear) and m.in_features > 1)


def dequantised(transformer):
    """The same numbers in plain weights."""
    quantised(transformer)
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear) and type(layer.weight.data) is not torch.Tensor:
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)


def cast(transformer):
    apply_layerwise_casting(transformer, FLOAT8, torch.float32, skip_modules_pattern=APART)
    assert sum(weight.dtype == FLOAT8 for weight in transformer.parameters()) > 8


def rounded(transformer):
    """What float8 leaves of the same weights."""
    other = subject_of[type(transformer).__name__]().transformer
    cast(other)
    for weight, theirs in zip(transformer.parameters(), other.parameters(), strict=True):
        weight.data.copy_(theirs.data)


subject_of = {
    "SD3Transformer2DModel": lambda: subject("sd3", torch.float32),
    "FluxTransformer2DModel": lambda: subject("flux", torch.float32),
    "STDiT2": lambda: subject("own", torch.float32),
}
CHANGES = {"torchao int8": (quantised, dequantised), "layerwise casting": (cast, rounded)}


def near(found, wanted, by):
    assert (found - wanted).norm() < by * wanted.norm()


def check(mechanism, change, after):
    alter, plainly = CHANGES[change]
    here, there = (subject(mechanism, torch.float32) for _ in range(2))
    plan = here.plan(3, kinds_of(mechanism))
    base = here.compressed(plan, 1)
    plainly(there.transformer)
    wanted, untouched = there.compressed(plan, 1), there.generate(1)
    assert (base - wanted).norm() > 1e-3 * wanted.norm()
    if not after:
        alter(here.transformer)
    with here.applied(plan) as run:
        if after:
            assert torch.equal(here.generate(1), base)
            alter(here.transformer)
        near(here.generate(1), wanted, 1e-4)
        assert run.summary().notes == ()
        if mechanism != "own":  # what is projected after all is counted
            assert run.summary().flops.module > plan.flops().module or not any(
                map(can_project_heads_separately, attentions(there))
            )
            assert not any(map(can_project_heads_separately, attentions(here)))
    near(here.generate(1), untouched, 1e-4)


def attentions(here):
    return [m for path, m in here.transformer.named_modules() if path.endswith(".attn")]


when = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@combines(GROUP, "torchao int8 weights, before the plan or while it is applied")
@when
def test_int8(mechanism, outcome, after):
    check(mechanism, "torchao int8", after)


@combines(GROUP, "layerwise casting to float8, before the plan or while it is applied")
@when
def test_casting(mechanism, outcome, after):
    check(mechanism, "layerwise casting", after)


@combines(GROUP, "searches on int8 weights or under layerwise casting")
@pytest.mark.parametrize("change", CHANGES)
def test_searches(mechanism, outcome, change):
    """Gradients go through what the weights were when they were multiplied with."""
    alter, plainly = CHANGES[change]
    here, there = (subject(mechanism, torch.float32) for _ in range(2))
    alter(here.transformer)
    plainly(there.transformer)
    extent = ah.Extent(radii=(2, 5), ages=2, kinds=tuple(sorted(kinds_of(mechanism))))

    def table(it):
        inputs = it.inputs(0) if it.adapter is None else lambda: it.generate(0)
        return ah.calibrate(it.pipe, inputs, adapter=it.adapter, extent=extent, progress=False)

    found, wanted = table(here), table(there)
    near(found.outputs, wanted.outputs, 1e-3)
    near(found.residuals, wanted.residuals, 1e-3)
    assert found.sampler_gains == pytest.approx(wanted.sampler_gains, rel=1e-3)
    assert found.target.sites == wanted.target.sites
    for asked in ({"strategy": "greedy"}, {"strategy": ah.Headwise(radii=(2, 5), caching=False)}):
        assert here.search(threshold=0.4, **asked).cells == there.search(threshold=0.4, **asked).cells


@combines(GROUP, "calibration_bytes under layerwise casting, by what is computed in", {"sd3": "works", "flux": "works"})
def test_bytes_are_of_what_is_computed_in(mechanism, outcome):
    here, there = (subject(mechanism, torch.float32) for _ in range(2))
    apply_layerwise_casting(here.transformer, FLOAT8, torch.float32, skip_modules_pattern=("norm",))
    assert next(here.transformer.parameters()).dtype == FLOAT8 or mechanism == "sd3"
    assert ah.calibration_bytes(here.pipe, here.inputs()) == ah.calibration_bytes(there.pipe, there.inputs())


FUSED = "fuse_qkv_projections, before the plan or while it is applied"
SETS = "works: before the plan; while it is applied a processor is set, which the next generation names"


@combines(GROUP, FUSED, {"sd3": SETS, "flux": "works"})
def test_fused(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(3, kinds_of(mechanism))
    wanted, untouched = here.compressed(plan, 1), here.generate(1)
    with here.applied(plan) if mechanism == "flux" else contextlib.nullcontext():
        here.transformer.fuse_qkv_projections()
        same(here.generate(1), wanted if mechanism == "flux" else untouched)
    with here.applied(plan) as run:
        same(here.generate(1), wanted)
        assert run.summary().notes == ()
        if mechanism == "flux":
            here.transformer.unfuse_qkv_projections()
            same(here.generate(1), wanted)
    same(here.generate(1), untouched)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
