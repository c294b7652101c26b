"""Plans on transformers from their authors' own sources: stand-ins with the same names and calls, beside a replay by hand."""

import pytest
import torch
from authored import MODELS, replaying
from family_replay import random_cells
from own import left_alone

import arrowhead as ah
from arrowhead.plans.cells import FULL

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
