"""A second transformer that takes over in the middle, as in Wan 2.2: what is kept of one is never read by the other."""

import pytest
from budget import every_column
from families import wan, wan22, wan_transformer
from family_replay import random_cells, replaying
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import assert_identical, distance, trace
from test_budget_dynamic_program import problems, values
from test_families import STEPS, plan_of
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import NotIntercepted, PlanAdapted, PlanInvalid, PlanMismatch, UnsupportedPipeline
from arrowhead.models.find import find
from arrowhead.plans.cells import ASC, AST, EXTRAPOLATE, FULL, Arrow, Attend, Cached, Full, wa_rs
from arrowhead.plans.layout import ALL_KINDS, ATTENTION_KINDS
from arrowhead.searches.budget.solver.dynamic_program import DynamicProgram
from arrowhead.searches.headwise import Headwise

SWITCH = 2


def called(bench, **inputs):
    """Which transformer each call goes to, 0 or 1."""
    both, seen = (bench.pipe.transformer, bench.pipe.transformer_2), []
    hooks = [t.register_forward_pre_hook(lambda module, _: seen.append(both.index(module))) for t in both if t is not None]
    bench.pipe(**bench.inputs(**inputs))
    for hook in hooks:
        hook.remove()
    return seen


def test_the_bench_changes_at_the_third_step():
    assert called(wan22()) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("reads", [AST, wa_rs(2), wa_rs(2, share_cfg=True), Attend((Full(), Cached()))], ids=str)
def test_a_plan_that_reads_across_is_refused(reads):
    bench = wan22()
    model = find(bench.pipe)
    rows = [[FULL] * 2, [FULL] * 2, [FULL, reads], [FULL] * 2, [FULL] * 2]
    with pytest.raises(PlanInvalid, match=r"blocks\.1\.attn1: .*step 2 .*no earlier step.*again at step 2"):
        plan_of(bench, model, rows)
    bench.switch = 3  # elsewhere nothing is wrong with it
    plan_of(bench, model, rows)


def test_a_line_needs_two_outputs_of_its_own_transformer():
    bench = wan22()
    rows = [[FULL] * 2, [FULL] * 2, [FULL] * 2, [EXTRAPOLATE] * 2, [FULL] * 2]
    bench.two_calls = False
    with pytest.raises(PlanInvalid, match="step 3 extrapolates from two outputs"):
        plan_of(bench, find(bench.pipe), rows)
    bench.switch = None
    plan_of(bench, find(bench.pipe), rows)


@pytest.mark.parametrize("switch", [-1, 5])
def test_a_switch_is_one_of_the_steps(switch):
    bench = wan22()
    bench.switch = switch
    with pytest.raises(PlanInvalid, match=f"switch={switch} with 5 steps"):
        plan_of(bench, find(bench.pipe), [[FULL] * 2] * STEPS)


@pytest.mark.parametrize("other", [None, 0.6, 1.0])
def test_another_boundary_is_refused_where_changes_are(other):
    bench = wan22()
    plan = plan_of(bench, find(bench.pipe), [[FULL] * 2] * STEPS)
    bench.pipe.register_to_config(boundary_ratio=other)
    there = {None: "no second transformer", 0.6: "its second transformer from step 3 on"}.get(other, "from step 1 on")
    refused = pytest.raises(PlanMismatch, match=f"from step 2 on, pipeline.*{there}.*search")
    with ah.applied(bench.pipe, plan, changes="refuse"), refused:
        bench.pipe(**bench.inputs(guidance_scale_2=None))


@pytest.mark.parametrize(("boundary", "switch"), [(0.6, 3), (1.0, 1)])
def test_each_transformer_keeps_its_own_rows_where_the_boundary_moves(boundary, switch):
    bench = wan22()
    model = find(bench.pipe)
    plan = plan_of(bench, model, random_cells(switch, model.sites, STEPS, share=True, switch=2))
    bench.pipe.register_to_config(boundary_ratio=boundary)
    with ah.applied(bench.pipe, plan), pytest.warns(PlanAdapted, match=f"switch {switch}, was 2"):
        given = trace(bench, bench.inputs())
    bench.switch = switch
    with replaying(bench, model.modules, plan.resample(steps=STEPS, switch=switch).cells, True):
        wanted = trace(bench, bench.inputs())
    assert distance(given, wanted) < 1e-5


def test_a_call_that_leaves_the_second_transformer_out():
    bench = wan22()
    model = find(bench.pipe)
    plan = plan_of(bench, model, [[FULL] * 2, [AST] * 2] + [[FULL] * 2] * 3)
    bench.pipe.register_to_config(boundary_ratio=None)
    with ah.applied(bench.pipe, plan), pytest.warns(PlanAdapted, match="switch None, was 2"):
        given = trace(bench, bench.inputs(guidance_scale_2=None))
    bench.switch = None
    with replaying(
        bench, model.modules, [[FULL] * 2, [AST] * 2, [FULL] * 2, [AST] * 2, [FULL] * 2], True
    ):  # F, R in five steps
        wanted = trace(bench, bench.inputs(guidance_scale_2=None))
    assert distance(given, wanted) < 1e-5


def test_a_loop_of_its_own_is_refused():
    """The boundary is said to be another one once the loop has begun."""

    def moved(pipe, *_):
        pipe.register_to_config(boundary_ratio=0.6)
        return {}

    bench = wan22()
    plan = plan_of(bench, find(bench.pipe), [[FULL] * 2] * STEPS)
    inputs = {"callback_on_step_end": moved, "callback_on_step_end_tensor_inputs": []}
    with ah.applied(bench.pipe, plan), pytest.raises(PlanMismatch, match="got step 2 with another transformer"):
        bench.pipe(**bench.inputs(**inputs))
    bench.pipe.register_to_config(boundary_ratio=0.875)
    with pytest.raises(NotIntercepted, match="got step 2 with another transformer"):
        ah.search(bench.pipe, bench.inputs(**inputs), threshold=0.7, progress=False)


@pytest.mark.parametrize("which", ["transformer", "transformer_2"])
def test_an_exchanged_transformer_is_refused(which):
    bench = wan22()
    with ah.applied(bench.pipe, plan_of(bench, find(bench.pipe), [[FULL] * 2] * STEPS)):
        setattr(bench.pipe, which, wan_transformer(5))
        with pytest.raises(PlanMismatch, match="exchanged"):
            bench.pipe(**bench.inputs())


def test_transformers_that_differ_are_refused():
    bench = wan(transformer_2=wan_transformer(1, ffn_dim=48, num_layers=1), boundary_ratio=0.875)
    with pytest.raises(UnsupportedPipeline, match="two transformers that differ in ffn_dim, num_layers; wanted them alike"):
        find(bench.pipe)


def test_attention_to_an_image_is_no_site():
    pipe = wan(transformer=wan_transformer(0, image_dim=8, added_kv_proj_dim=16)).pipe
    assert {site.kind for site in find(pipe, ALL_KINDS).sites} == {"self_attention", "feed_forward"}
    assert {site.kind for site in find(wan().pipe, ALL_KINDS).sites} == ALL_KINDS


@pytest.mark.parametrize("of", ["second alone", "second by its boundary", "first by its boundary", "first without", "5B"])
@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "alone"])
def test_pipelines_that_call_one_transformer(of, guidance):
    """Of two, or of one; Wan 2.2's 5B says each token's timestep."""
    second = wan_transformer(1)
    parts, switch = {
        "second alone": ({"transformer": None, "transformer_2": second, "boundary_ratio": 1.1}, None),
        "second by its boundary": ({"transformer_2": second, "boundary_ratio": 1.1}, 0),
        "first by its boundary": ({"transformer_2": second, "boundary_ratio": 0.0}, None),
        "first without": ({"transformer_2": second}, None),
        "5B": ({"expand_timesteps": True}, None),
    }[of]
    bench = wan(**parts)
    model, inputs = find(bench.pipe, ALL_KINDS - {"block"}), {"images": 2, "guidance": guidance}
    bench.switch = switch
    cells = random_cells(1, model.sites, STEPS, guidance > 1)
    untouched = trace(bench, bench.inputs(**inputs))
    with ah.applied(bench.pipe, plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guidance > 1)):
        assert_identical(trace(bench, bench.inputs(**inputs)), untouched)
    plan = plan_of(bench, model, cells, guidance > 1)
    with ah.applied(bench.pipe, plan) as run:
        found = trace(bench, bench.inputs(**inputs))
        assert run.summary().notes == ()
    with replaying(bench, model.modules, cells, guidance > 1) as sites:
        assert distance(found, trace(bench, bench.inputs(**inputs))) < 1e-5
    assert all(site.passed == len(site.column) * plan.calls for site in sites)
    assert distance(found, untouched) > 1e-2
    budget = ah.Budget(module_flops=0.6, granularity="step", corrections=0)
    searched = ah.search(bench.pipe, bench.inputs(**inputs), budget=budget, progress=False)
    assert searched.switch == switch
    with ah.applied(bench.pipe, searched) as run:
        bench.pipe(**bench.inputs(**inputs))
        assert run.summary().flops.module == pytest.approx(searched.flops().module)


SEARCHES = {
    "greedy": {"threshold": 1.0},
    "headwise": {"strategy": Headwise(radii=(2, 5), residual=True), "threshold": 3.0},
    "in step": {"budget": ah.Budget(module_flops=0.5, granularity="step")},
    "by heads": {"budget": ah.Budget(module_flops=0.5, granularity="head")},
    "no gradients": {"budget": ah.Budget(module_flops=0.5, granularity="site"), "extent": ah.Extent(gradients=False)},
    "checkpointed": {"budget": ah.Budget(module_flops=0.5, granularity="site"), "extent": ah.Extent(checkpoint=True)},
    "speedup": {"strategy": "budget", "budget": ah.Budget(speedup=1.01)},
}


@pytest.mark.parametrize("how", SEARCHES)
def test_searches_read_nothing_across(how):
    """Whatever may be reused is, and yet the second transformer begins anew."""
    bench = wan22()
    inputs = {"guidance": 1.0} if how == "checkpointed" else {}
    with left_as_it_was(bench, **inputs):
        plan = ah.search(bench.pipe, bench.inputs(**inputs), progress=False, **SEARCHES[how])
    assert plan.switch == SWITCH
    for first in (0, SWITCH):
        assert all(not isinstance(cell, type(AST)) and not reads(cell) for cell in plan.cells[first])
    if how != "speedup":  # which so little of may meet
        assert any(isinstance(cell, type(AST)) or reads(cell) for row in plan.cells[SWITCH + 1 :] for cell in row)
    with ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs(**inputs))
        assert run.summary().notes == ()


def reads(cell):
    return any(isinstance(m, Cached) or (isinstance(m, Arrow) and m.residual) for m in cell.methods(2))


@settings(max_examples=40, deadline=None)
@given(problem=problems(), data=st.data())
def test_the_dynamic_program_is_the_best_of_both_parts(problem, data):
    """Every column of the steps before the switch beside every one of those after it."""
    choices, steps, program, error, cost, _, multiplier = problem
    switch = data.draw(st.integers(0, steps - 1))
    solution = DynamicProgram(choices, switch).solve(error, cost, multiplier)
    for place in range(2):
        least = 0.0
        for part in (slice(0, switch), slice(switch, steps)):
            if part.stop > part.start:
                columns = every_column(choices, part.stop - part.start)
                errors, spent = values(columns, program, error[part], cost, place)
                least += (errors + multiplier * spent).min()
        assert solution.error[place] + multiplier * solution.cost[place] == pytest.approx(least)
        outputs = program.outputs_of(solution.transitions[:, place])
        assert all(given.oldest <= step - (switch if step >= switch else 0) for step, given in enumerate(outputs))


def test_gradients_go_by_the_scale_of_the_transformer_that_runs():
    """At a scale of 1 nothing of the other branch matters, though it is computed; and nothing is known across the switch."""
    table = ah.calibrate(wan22().pipe, wan22().inputs(guidance=3.0, guidance_scale_2=1.0), progress=False)
    assert table.switch == SWITCH
    of_conditional, of_other = table.outputs[:, :, :, 0], table.outputs[:, :, :, 1]  # (S, H, ages + 1, M)
    assert of_other[1, :, 1].any()
    assert not of_other[SWITCH:].any()
    assert of_conditional[SWITCH + 1, :, 1].any()
    assert not of_conditional[SWITCH].any()
    assert not of_conditional[SWITCH + 1, :, 2:].any()


def test_the_first_scale_serves_both_where_no_second_is_named():
    bench = wan22()
    model, call = find(bench.pipe), {"guidance_scale": 3.0, "guidance_scale_2": None}
    bench.pipe.scheduler.set_timesteps(STEPS)
    assert [model.guidance_scale(call, step) for step in range(STEPS)] == [3.0] * STEPS
    assert [model.guidance_scale(call | {"guidance_scale_2": 2.0}, step) for step in range(STEPS)] == [3.0] * 2 + [2.0] * 3


def test_files_know_the_switch(tmp_path):
    bench = wan22()
    table = ah.calibrate(bench.pipe, bench.inputs(), progress=False)
    table.save(tmp_path / "table")
    loaded = ah.Table.load(tmp_path / "table")
    assert loaded.switch == SWITCH
    plan = ah.search(bench.pipe, bench.inputs(), budget=ah.Budget(module_flops=0.5), table=loaded, progress=False)
    plan.save(tmp_path / "plan.json")
    assert ah.Plan.load(tmp_path / "plan.json") == plan
    assert plan.switch == SWITCH


def test_nothing_of_the_first_is_held_when_the_second_has_begun():
    bench, held = wan22(), []
    model = find(bench.pipe, ATTENTION_KINDS)
    rows = [[FULL] * 2, [AST] * 2, [FULL] * 2, [ASC] * 2, [wa_rs(2)] * 2]
    with ah.applied(bench.pipe, plan_of(bench, model, rows)) as run:

        def note(*_):
            held.append(run.cache_bytes)

        hook = bench.pipe.transformer_2.register_forward_pre_hook(note)
        bench.pipe(**bench.inputs())
        hook.remove()
    assert held[0] == 0
    assert max(held) > 0
