"""From a pipeline to a plan under a budget: what is met, what is told, and that nothing is left behind."""

import math
from contextlib import contextmanager

import pytest
import torch
from budget import FAMILIES, final_latents
from pipelines import sd35, tiny, tiny_mmdit
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.errors import AlreadyApplied, InputsInvalid, PlanMismatch, UnsupportedPipeline
from arrowhead.plans.cells import AST, FULL
from arrowhead.searches.budget.sensitivity.recording import record
from arrowhead.searches.budget.sensitivity.sampler_gain import SchedulerReplay

pytestmark = pytest.mark.slow  # minutes, all of them together

every_family = pytest.mark.parametrize("family", FAMILIES)
with_and_without = pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "alone"])


def tables_equal(a, b):
    """But for when they were made, and for how LAPACK rounds."""
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("outputs", "residuals"))
    names = ("target", "tokens", "branches", "radii", "ages", "final", "elements", "other_flops", "images", "itemsize")
    return (
        same
        and all(getattr(a, name) == getattr(b, name) for name in names)
        and a.sampler_gains == pytest.approx(b.sampler_gains, rel=1e-5)
    )


def plain(value):
    """What two runs can be compared by."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list) else repr(value)


@contextmanager
def nothing_left(bench, same_run=True, **inputs):
    """Besides what `left_as_it_was` looks at: gradients, random states, and the scheduler, which ends as after an own run.

    `same_run`: whether the last run in the block is the untouched one, so that the scheduler ends with the same values.
    """
    transformer, scheduler = bench.pipe.transformer, bench.pipe.scheduler
    for i, parameter in enumerate(transformer.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    with left_as_it_was(bench, **inputs):
        learnt = [parameter.requires_grad for parameter in transformer.parameters()]
        before = {name: plain(value) for name, value in vars(scheduler).items()}
        noise, grad = torch.random.get_rng_state(), torch.is_grad_enabled()
        yield
        assert [parameter.requires_grad for parameter in transformer.parameters()] == learnt
        assert all(parameter.grad is None for parameter in transformer.parameters())
        after = {name: plain(value) for name, value in vars(scheduler).items()}
        assert set(after) == set(before)
        assert "step" not in after
        assert not same_run or after == before
        assert torch.equal(torch.random.get_rng_state(), noise)
        assert torch.is_grad_enabled() == grad


@every_family
@with_and_without
def test_a_search_meets_its_budget_and_leaves_no_trace(family, guidance):
    bench = FAMILIES[family]()
    inputs = bench.inputs(images=2, guidance=guidance)
    generator = inputs["generator"].get_state()
    with nothing_left(bench, same_run=False, images=2, guidance=guidance):
        plan = ah.search(bench.pipe, inputs, budget=ah.Budget(module_flops=0.5), progress=False)
        assert torch.equal(inputs["generator"].get_state(), generator)
    assert 0 < plan.flops().module <= 0.5
    assert (plan.guided, plan.calls) == (guidance > 1, 2 if guidance > 1 and family == "flux" else 1)
    raw = final_latents(bench, bench.inputs(images=2, guidance=guidance))
    with ah.applied(bench.pipe, plan) as run:
        left = final_latents(bench, bench.inputs(images=2, guidance=guidance))
        summary = run.summary()
    assert summary.flops.module == pytest.approx(plan.flops().module)
    assert summary.notes == ()
    error = ((left - raw).norm() / raw.norm()).item()
    assert plan.about["search"]["measured_error"] == pytest.approx(error, rel=5e-3)
    assert error > 0


@pytest.mark.parametrize("family", [*FAMILIES, "sd35", "tiny", "tiny_mmdit"])
@with_and_without
def test_a_calibration_is_the_untouched_run_and_leaves_no_trace(family, guidance):
    bench = (FAMILIES | {"sd35": sd35, "tiny": tiny, "tiny_mmdit": tiny_mmdit})[family]()
    inputs = bench.inputs(images=2, guidance=guidance)
    generator = inputs["generator"].get_state()
    with nothing_left(bench, images=2, guidance=guidance):
        seen = []
        recording = record(driver_of(bench.pipe, inputs), ah.Extent(ages=2), lambda *step: seen.append(step))
        assert torch.equal(inputs["generator"].get_state(), generator)
    assert seen == [(step, 5) for step in range(5)]
    assert torch.equal(recording.final, final_latents(bench, bench.inputs(images=2, guidance=guidance)).float())
    assert recording.passes == 5 + (guidance > 1 and family == "flux")
    assert tables_equal(
        recording.table,
        ah.calibrate(bench.pipe, bench.inputs(images=2, guidance=guidance), extent=ah.Extent(ages=2), progress=False),
    )


@every_family
@pytest.mark.parametrize(("guidance", "steps"), [(3.0, 1), (3.0, 3), (1.0, 1)])
def test_a_calibration_closed_early_leaves_no_trace(family, guidance, steps):
    class Closed(Exception):
        pass

    def close(step, _):
        if step + 1 == steps:
            raise Closed

    bench = FAMILIES[family]()
    with nothing_left(bench, same_run=False, guidance=guidance), pytest.raises(Closed):
        record(driver_of(bench.pipe, bench.inputs(guidance=guidance)), ah.Extent(), close)


@every_family
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(family):
    bench = FAMILIES[family]()
    module = bench.attentions[1].to_v
    with nothing_left(bench, same_run=False):
        weight = module.weight.data.clone()
        module.weight.data[:] = torch.inf
        with pytest.raises(InputsInvalid, match=r"not finite.*wanted"):
            ah.calibrate(bench.pipe, bench.inputs(), progress=False)
        module.weight.data[:] = weight


@every_family
@pytest.mark.parametrize("steps", [1, 3])
def test_feed_forwards_that_are_not_finite_are_refused(family, steps):
    bench = FAMILIES[family]()
    bench.pipe.transformer.transformer_blocks[-1].ff.net[2].weight.data[:] = torch.inf
    with pytest.raises(InputsInvalid, match=r"not finite.*wanted"):
        ah.calibrate(bench.pipe, bench.inputs(steps=steps), progress=False)


@pytest.mark.parametrize("family", ["dit", "flux"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(family, mode):
    bench = FAMILIES[family]()
    table = ah.calibrate(bench.pipe, bench.inputs(), progress=False)
    with mode():
        assert tables_equal(ah.calibrate(bench.pipe, bench.inputs(), progress=False), table)
        assert not torch.is_grad_enabled()


def test_weights_that_no_gradient_goes_through():
    with torch.inference_mode():
        bench = FAMILIES["dit"]()
    before = [weight.requires_grad for weight in bench.pipe.transformer.parameters()]
    with pytest.raises(InputsInvalid, match=r"torch\.inference_mode\(\).*wanted"):
        ah.calibrate(bench.pipe, bench.inputs(), progress=False)
    assert [weight.requires_grad for weight in bench.pipe.transformer.parameters()] == before


@every_family
def test_low_precision_gives_nearly_the_same(family):
    """Of float32 and bfloat16 tables, the predicted error of reuse everywhere."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        bench = FAMILIES[family](dtype)
        own = {name: value.to(dtype) for name, value in bench.inputs().items() if "embeds" in name}
        table = ah.calibrate(bench.pipe, bench.inputs(images=1, **own), extent=ah.Extent(vectors=8), progress=False)
        assert table.outputs.dtype == table.residuals.dtype == torch.float32
        reused = [[FULL, *[AST] * 4]] * len(table.target.sites)
        found[dtype] = table.predicted_error(reused).sum()
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.3)


def test_a_pipeline_that_carries_a_plan_is_refused():
    bench = FAMILIES["dit"]()
    plan = ah.search(bench.pipe, bench.inputs(), budget=ah.Budget(module_flops=0.9), progress=False)
    with ah.applied(bench.pipe, plan), pytest.raises(AlreadyApplied):
        ah.calibrate(bench.pipe, bench.inputs(), progress=False)


def test_a_table_serves_other_budgets():
    """A search is a calibration, solved."""
    bench = FAMILIES["sd3"]()
    table = ah.calibrate(bench.pipe, bench.inputs(), progress=False)
    for asked in ({"attention_flops": 0.4}, {"transformer_flops": 0.7, "granularity": "site"}):
        budget = ah.Budget(**asked, corrections=0)
        plan = ah.search(bench.pipe, bench.inputs(), budget=budget, progress=False)
        assert plan.cells == ah.solve(table, budget).cells
        assert {"measured_error", "predicted_error", "calibration_passes"} < set(plan.about["search"])
        with ah.applied(bench.pipe, plan):
            bench.pipe(**bench.inputs())


@pytest.mark.parametrize("strategy", ["budget", "stack"])
def test_the_whole_budget_is_full_attention_and_no_cause_for_a_warning(strategy):
    bench = FAMILIES["dit"]()
    plan = ah.search(bench.pipe, bench.inputs(), budget=ah.Budget(transformer_flops=1), strategy=strategy, progress=False)
    assert set(plan.count()) == {"full"}
    assert plan.about["search"]["measured_error"] == 0


@pytest.mark.parametrize("steps", [1, 2])
def test_very_few_steps(steps):
    bench = FAMILIES["sd3"]()
    inputs = bench.inputs(steps=steps)
    plan = ah.search(bench.pipe, inputs, budget=ah.Budget(module_flops=0.9, granularity="site"), progress=False)
    assert plan.steps == steps
    assert plan.flops().module <= 0.9


def test_extents():
    """Fewer ages, no radii, no feed-forwards: nothing of that is in the table, nor in a plan of it."""
    bench = FAMILIES["dit"]()
    table = ah.calibrate(
        bench.pipe, bench.inputs(), extent=ah.Extent(radii=(), ages=1, kinds=("self_attention",)), progress=False
    )
    assert (table.radii, table.ages, table.residuals.shape[2]) == ((), 1, 0)
    assert {site.kind for site in table.target.sites} == {"self_attention"}
    plan = ah.solve(table, ah.Budget(module_flops=0.7))
    assert not {"WA", "WA-RS"} & set(plan.count_heads())
    wide = ah.calibrate(bench.pipe, bench.inputs(), extent=ah.Extent(radii=(3, 15, 200, 3)), progress=False)
    assert wide.radii == (3,)  # 16 tokens: a band of 15 covers all


@every_family
def test_precision_is_chosen_with_sparsity(family):
    """Where it is asked for: the plan counts what its run did, and errs less than without at as many FLOPs."""
    bench = FAMILIES[family]()
    extent = ah.Extent(radii=(3,), ages=2, kinds=("self_attention",), precisions=("int8",))
    table = ah.calibrate(bench.pipe, bench.inputs(images=2), extent=extent, progress=False)
    plans = [ah.solve(table, ah.Budget(attention_flops=0.7, granularity="head", precision=may)) for may in (True, False)]
    names = [{name for name in plan.count_heads() if "int8" in name} for plan in plans]
    assert names[0]
    assert not names[1]
    errors = [plan.about["search"]["predicted_error"] for plan in plans]
    assert errors[0] < errors[1]
    with ah.applied(bench.pipe, plans[0]) as run:
        bench.pipe(**bench.inputs(images=2))
        summary = run.summary()
    assert summary.heads == {name: plans[0].calls * count for name, count in plans[0].count_heads().items()}
    assert summary.flops.attention == pytest.approx(plans[0].flops().attention)
    assert summary.flops.attention <= 0.7


@every_family
def test_a_search_from_a_table_is_the_same(family):
    bench = FAMILIES[family]()
    table = ah.calibrate(bench.pipe, bench.inputs(), progress=False)
    for budget in (ah.Budget(transformer_flops=0.6), ah.Budget(error=0.1)):
        asked = {"strategy": "budget", "budget": budget, "progress": False}
        plans = [ah.search(bench.pipe, bench.inputs(), table=given, **asked) for given in (None, table)]
        assert plans[0] == plans[1]
        assert plans[1].about["search"]["calibration_passes"] == 0


@pytest.mark.parametrize("feedback", [0.0, 0.3, 1.0])
def test_another_power_of_the_model_s_answers_needs_no_other_run(feedback):
    bench = FAMILIES["sd3"]()
    tables = [
        ah.calibrate(bench.pipe, bench.inputs(), extent=ah.Extent(feedback=power), progress=False) for power in (0.6, feedback)
    ]
    assert tables[0].with_feedback(feedback).sampler_gains == pytest.approx(tables[1].sampler_gains, rel=1e-9)
    assert tables[0].with_feedback(feedback).with_feedback(0.6).sampler_gains == pytest.approx(
        tables[0].sampler_gains, rel=1e-9
    )


@pytest.mark.parametrize("kinds", [("feed_forward",), ("cross_attention",), ("feed_forward", "cross_attention"), ("block",)])
@pytest.mark.parametrize("gradients", [True, False])
def test_sites_of_some_kinds_alone(kinds, gradients):
    bench = FAMILIES["pixart_sigma"]()
    extent = ah.Extent(kinds=kinds, gradients=gradients)
    plan = ah.search(bench.pipe, bench.inputs(), budget=ah.Budget(transformer_flops=0.95), extent=extent, progress=False)
    assert {site.kind for site in plan.target.sites} == set(kinds)
    with pytest.raises(InputsInvalid, match=r"module_flops.*wanted self_attention"):
        ah.search(bench.pipe, bench.inputs(), budget=ah.Budget(module_flops=0.9), extent=extent, progress=False)


def test_kinds_that_a_transformer_has_not():
    bench = FAMILIES["dit"]()
    with pytest.raises(
        UnsupportedPipeline, match=r"cross_attention.*wanted some that it has: block, feed_forward, self_attention"
    ):
        ah.calibrate(bench.pipe, bench.inputs(), extent=ah.Extent(kinds=("cross_attention",)), progress=False)


@pytest.mark.parametrize("left", [0.5, 0.9, 0.97])
def test_a_plan_that_lost_the_sites_that_see_the_text(left):
    """Where a block gives way to the attention within it, which does not."""
    bench = FAMILIES["pixart_sigma"]()
    extent, budget = ah.Extent(kinds=("block", "self_attention")), ah.Budget(transformer_flops=left, granularity="site")
    plan = ah.search(bench.pipe, bench.inputs(), budget=budget, extent=extent, progress=False)
    with ah.applied(bench.pipe, plan):
        bench.pipe(**bench.inputs())


def test_a_table_of_something_else_is_refused_before_anything_runs():
    bench, runs = FAMILIES["dit"](), []
    table = ah.calibrate(bench.pipe, bench.inputs(), progress=False)
    for other, guidance, said in ((FAMILIES["sd3"](), 3.0, "transformer: plan DiT"), (bench, 1.0, "branches: table")):
        other.pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
        for budget in (ah.Budget(module_flops=0.5), ah.Budget(speedup=1.2), ah.Budget(error=0.1)):
            with pytest.raises(PlanMismatch, match=said):
                ah.search(other.pipe, other.inputs(guidance=guidance), budget=budget, table=table, progress=False)
    assert not runs


def test_a_step_that_the_sampler_makes_nothing_of(monkeypatch):
    """Its errors count for nothing, to whatever power."""
    own = SchedulerReplay.gains_and_feedback

    def gains_and_feedback(self, steps, images):
        gains, feedback = own(self, steps, images)
        return (0.0, *gains[1:]), feedback

    monkeypatch.setattr(SchedulerReplay, "gains_and_feedback", gains_and_feedback)
    bench = FAMILIES["dit"]()
    table = ah.calibrate(bench.pipe, bench.inputs(), progress=False)
    for power in (0.0, 0.5, 1.0):
        gains = table.with_feedback(power).sampler_gains
        assert gains[0] == 0
        assert all(0 < gain < math.inf for gain in gains[1:])
