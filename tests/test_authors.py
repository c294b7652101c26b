"""Plans on transformers from their authors' own sources: stand-ins with the same names and calls, beside a replay by hand."""

import re
from functools import partial

import pytest
import torch
from authored import MODELS, replaying
from family_replay import random_cells
from own import left_alone
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import arrowhead as ah
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL
from arrowhead.plans.flops import full_flops
from arrowhead.plans.layout import ALL_KINDS

every_model = pytest.mark.parametrize("name", MODELS)


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


@every_model
def test_a_full_plan_changes_no_bit(name):
    own = MODELS[name]()
    untouched, before, types = own.sample(), left_alone(own.model), classes(own.model)
    plan = own.plan([[FULL] * len(own.found().sites)] * own.steps)
    with ah.applied(own.model, plan, own.adapter) as run:
        assert torch.equal(own.sample(), untouched)
        assert sum(run.summary().cells.values()) == len(plan.target.sites) * own.steps * own.calls
        assert run.summary().notes == ()
    assert left_alone(own.model) == before
    assert classes(own.model) == types
    assert torch.equal(own.sample(), untouched)


@every_model
@pytest.mark.parametrize("seed", [1, 2])
def test_random_plans_are_what_a_replay_gives(name, seed, tmp_path):
    own = MODELS[name]()
    kinds = {"self_attention"} if seed == 1 else {"self_attention", "feed_forward"}
    model = own.found(kinds)
    own.plan(random_cells(seed, model.sites, own.steps, own.guided), kinds).save(tmp_path / "plan.json")
    plan = ah.Plan.load(tmp_path / "plan.json")
    with ah.applied(own.model, plan, own.adapter) as run:
        given, summary = own.sample(seed), run.summary()
    with replaying(own, model, plan.columns) as replayed:
        wanted = own.sample(seed)
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)
    assert (given - own.sample(seed)).norm() > 1e-2 * given.norm()
    assert {site.passed for site in replayed} == {own.steps * own.calls}
    assert summary.flops.module == pytest.approx(plan.flops().module)
    assert summary.peak_cache_bytes == max(plan.cache_bytes(2, 8))
    assert summary.notes == ()


WITH_BLOCKS = pytest.mark.parametrize("name", ["flux", "sd3", "wan", "dit"])


def some_blocks(model, seed):
    """The model with every second block whole, and what the other blocks have."""
    whole = {site for i, site in enumerate(site for site in model.sites if site.kind == "block") if i % 2 == seed % 2}
    return model.filtered(
        lambda site: site in whole if site.kind == "block" else not any(block.contains(site) for block in whole)
    )


@WITH_BLOCKS
@pytest.mark.parametrize("seed", [0, 1])
def test_random_plans_with_blocks_are_what_a_replay_gives(name, seed):
    own = MODELS[name]()
    model = some_blocks(own.found(ALL_KINDS), seed)
    cells = random_cells(seed, model.sites, own.steps, own.guided)
    plan = ah.Plan(tuple(map(tuple, cells)), target_of(model), own.tokens, own.guided, calls=own.calls)
    with ah.applied(own.model, plan, own.adapter) as run:
        given, summary = own.sample(seed), run.summary()
    with replaying(own, model, plan.columns) as replayed:
        wanted = own.sample(seed)
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)
    assert (given - own.sample(seed)).norm() > 1e-2 * given.norm()
    assert {site.passed for site in replayed} == {own.steps * own.calls}
    assert {site.kind for site in model.sites} >= {"block", "self_attention"}
    assert summary.flops.module == pytest.approx(plan.flops().module)
    assert summary.peak_cache_bytes == max(plan.cache_bytes(2, 8))


def uncounted(layer, x):
    """What the layer gives, by sums of products."""
    return (x[..., None, :] * layer.weight).sum(-1) + layer.bias


@WITH_BLOCKS
def test_what_a_block_multiplies_is_what_torch_counts(name):
    """But for what runs once for a sample, such as modulation."""
    own = MODELS[name]()
    model, counted = own.found(ALL_KINDS), {}
    blocks = [site for site in model.sites if site.kind in ("block", "cross_attention")]
    layers = [
        layer
        for path, layer in own.model.named_modules()
        if isinstance(layer, torch.nn.Linear) and re.search(r"_mod\.|modulation", path)
    ]

    def measured(path, forward):
        def counting(*args, **kwargs):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                out = forward(*args, **kwargs)
            counted.setdefault(path, counter.get_total_flops())
            return out

        return counting

    for site in blocks:
        module = own.model.get_submodule(site.path)
        module.forward = measured(site.path, module.forward)
    for layer in layers:
        layer.forward = partial(uncounted, layer)
    own.sample(images=1)
    samples = 2 if own.calls == 1 and own.guided else 1
    tokens = own.tokens
    assert {site.path: full_flops([site], tokens, samples).module for site in blocks} == counted
