"""Sites go by their paths, and run in the order of their calls, in whatever order torch lists a model's modules.

cache-dit, switched on and off again, leaves modules in another order. The forward is the same.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import FAMILIES
from own import Own, STDiT2
from pipelines import sd35

import arrowhead as ah

STEPS = 4
STRATEGIES = {
    "greedy": {"threshold": 0.5},
    "headwise": {"strategy": ah.Headwise(radii=(2,), share_cfg=True, residual=True), "threshold": 0.6},
    "budget": {"budget": ah.Budget(transformer_flops=0.6), "extent": ah.Extent(ages=2)},
    "trials": {"budget": ah.Budget(transformer_flops=0.6), "extent": ah.Extent(ages=2, gradients=False)},
}
MODELS = {"flux": FAMILIES["flux"], "dit": FAMILIES["dit"], "sd35": sd35}


def registered_last(module, name):
    """Register a child again, which torch then lists after its siblings."""
    child = getattr(module, name)
    delattr(module, name)
    setattr(module, name, child)


def reorder(transformer):
    """Other stacks of blocks first, and within blocks other children."""
    listed = [path for path, _ in transformer.named_modules()]
    for block in transformer.transformer_blocks:
        for name in ("norm1", "attn", "attn1"):
            if hasattr(block, name):
                registered_last(block, name)
    registered_last(transformer, "transformer_blocks")
    assert [path for path, _ in transformer.named_modules()] != listed


def paths(sites):
    return [site.path for site in sites]


@pytest.fixture(params=MODELS)
def benches(request):
    """Twice the same pipeline, the second one's modules in another order."""
    here, there = MODELS[request.param](), MODELS[request.param]()
    there.pipe.transformer.load_state_dict(here.pipe.transformer.state_dict())
    reorder(there.pipe.transformer)
    return here, there


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_finds_the_same_plan_and_an_old_plan_fits(benches, strategy):
    here, _ = benches
    plan, again = (ah.search(b.pipe, b.inputs(steps=STEPS), progress=False, **STRATEGIES[strategy]) for b in benches)
    assert plan.flops().module < 1
    assert paths(again.target.sites) == paths(plan.target.sites)
    assert again == plan
    pictures = []
    for bench in benches:
        with ah.applied(bench.pipe, plan) as run:
            pictures.append(bench.pipe(**bench.inputs(steps=STEPS))[0])
            assert run.summary().notes == ()
    assert torch.equal(*pictures)
    assert not torch.equal(pictures[0], here.pipe(**here.inputs(steps=STEPS))[0])


def test_a_table_of_either_serves_the_other(benches):
    here, there = benches
    extent, budget = ah.Extent(ages=2), ah.Budget(transformer_flops=0.6, corrections=0)
    tables = [ah.calibrate(b.pipe, b.inputs(steps=STEPS), extent=extent, progress=False) for b in benches]
    assert paths(tables[0].target.sites) == paths(tables[1].target.sites)
    assert torch.equal(tables[0].outputs, tables[1].outputs)
    assert torch.equal(tables[0].residuals, tables[1].residuals)
    plan = ah.search(here.pipe, here.inputs(steps=STEPS), budget=budget, table=tables[0], progress=False)
    other = ah.search(there.pipe, there.inputs(steps=STEPS), budget=budget, table=tables[0], progress=False)
    assert other == plan


def test_an_analysis_is_the_same(benches):
    found = [ah.analyze(b.pipe, b.inputs(steps=STEPS), only=["reuse", "steps"], progress=False) for b in benches]
    assert found[0].sites == found[1].sites
    np.testing.assert_array_equal(found[0].reuse_errors, found[1].reuse_errors)
    np.testing.assert_array_equal(found[0].step_similarity, found[1].step_similarity)


def test_a_custom_model_s_plan():
    loops = [Own(STDiT2(), ah.open_sora(guidance_scale=3.0)) for _ in range(2)]
    loops[1].model.load_state_dict(loops[0].model.state_dict())
    for block in loops[1].model.blocks:
        registered_last(block, "attn")
    budget, extent = ah.Budget(transformer_flops=0.7), ah.Extent(ages=2)
    plan, again = (
        ah.search(
            loop.model, lambda loop=loop: loop.sample(1), adapter=loop.adapter, budget=budget, extent=extent, progress=False
        )
        for loop in loops
    )
    assert {site.kind for site in plan.target.sites} == {"self_attention", "feed_forward"}
    assert paths(again.target.sites) == paths(plan.target.sites)
    assert again == plan


def test_what_differs_is_named_by_path(benches):
    here, _ = benches
    plan = ah.search(here.pipe, here.inputs(steps=STEPS), threshold=0.5, progress=False)
    sites = plan.target.sites
    other = replace(plan.target, sites=(replace(sites[1], heads=99), *sites[2:], sites[0]))
    assert plan.target.differences(other) == [f"heads of site {sites[1].path}: plan {sites[1].heads}, pipeline 99"]
    assert plan.target.differences(replace(plan.target, sites=sites[::-1])) == []
