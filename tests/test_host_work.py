"""What a step costs the host, in calls rather than seconds: what a plan asks for is worked out when a generation begins."""

import dataclasses
import inspect
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
from pipelines import dit, pixart_sigma, sd3

import arrowhead as ah
from arrowhead.engine import prepared as engine_prepared
from arrowhead.engine import run as engine_run
from arrowhead.engine import site_plan
from arrowhead.models import head_separation
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans import flops
from arrowhead.plans.cells import ASC, AST, EXTRAPOLATE, FULL, Arrow, Attend, Cached, Full, method_name, paper_name, wa_rs
from arrowhead.plans.layout import Tokens
from arrowhead.plans.lifetimes import HeadOutput, Residual, Writes

STEPS = 5
CLOSED_FORMS = (
    "head_flops",
    "pair_flops",
    "projection_flops",
    "head_projection_flops",
    "site_flops",
    "full_flops",
    "computed_heads",
    "pairs",
)
PREPARING = "prepare", "_head_group", "_pass_count", "_attention_work", "_head_flops", "_projection_flops", "_whole_flops"
MIXED = Attend((Full(), Arrow(3, residual=True), Cached()))
TURNED = Attend((Cached(), Full(), Arrow(3)), share_cfg=True)
PLANS = {
    "full": [FULL] * 5,
    "repeated": [FULL, AST, AST, AST, AST],
    "extrapolated": [FULL, FULL, EXTRAPOLATE, EXTRAPOLATE, AST],
    "shared": [FULL, ASC, wa_rs(2, share_cfg=True), ASC, AST],
    "head by head": [FULL, MIXED, TURNED, MIXED, TURNED],
}


def planned(bench, cells, kinds=frozenset({"self_attention"})):
    target = target_of(find(bench.pipe, kinds))
    rows = tuple((cell,) * len(target.sites) for cell in cells)
    return ah.Plan(rows, target, Tokens(bench.visual, bench.text), guided=True)


@contextmanager
def counted(monkeypatch, run):
    """Which of the calls that a step must not make arrowhead made, and in which steps."""
    calls = Counter()

    def watch(owner, name, whose=None):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            step = run._generation.step if run._generation is not None else None
            if caller.startswith("arrowhead.") and step is not None:
                calls[whose or name, step] += 1
            return original(*args, **kwargs)

        context.setattr(owner, name, watched)

    modules = [module for name, module in sys.modules.items() if name.startswith("arrowhead.")]
    functions = [(dataclasses, "replace"), (inspect, "signature"), *((flops, name) for name in CLOSED_FORMS)]
    functions += [(head_separation, "can_project_heads_separately"), *((site_plan, name) for name in PREPARING)]
    with monkeypatch.context() as context:
        for owner, name in functions:
            original = getattr(owner, name)
            watch(owner, name)
            for module in modules:
                if vars(module).get(name) is original:  # it was imported by name
                    context.setattr(module, name, getattr(owner, name))
        watch(inspect.Signature, "bind")
        for kind in (Full, Arrow, Cached, Attend, Writes, Residual, HeadOutput):
            watch(kind, "__init__", kind.__name__)
        yield calls


def independent_summary(plan, bench):
    """Names of cells and heads, and attention FLOPs left, for a plan whose sites are alike and have all their heads apart."""
    cells, heads = Counter(), Counter()
    for row in plan.cells:
        for site, cell in zip(plan.target.sites, row, strict=True):
            cells[paper_name(cell)] += 1
            names = (
                [method_name(m) for m in cell.methods(site.heads)]
                if isinstance(cell, Attend)
                else [paper_name(cell)] * site.heads
            )
            heads.update(names if site.kind == "self_attention" else ())
    return cells, heads, plan.flops()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("make", [dit, sd3, pixart_sigma])
def test_a_step_works_nothing_out_of_the_plan(name, make, monkeypatch):
    bench = make(**({"num_attention_heads": 3, "attention_head_dim": 8} if make is pixart_sigma else {}))
    the_plan = planned(bench, PLANS[name])
    with ah.applied(bench.pipe, the_plan) as run, counted(monkeypatch, run) as calls:
        for _ in range(2):
            bench.pipe(**bench.inputs(images=2))
    assert {call: n for call, n in calls.items() if call[1] > 0} == {}
    summary = run.summary()
    cells, heads, left = independent_summary(the_plan, bench)
    assert (summary.cells, summary.heads) == (cells, heads)
    assert summary.flops.attention == pytest.approx(left.attention)
    assert summary.flops.module == pytest.approx(left.module)


@pytest.mark.parametrize("make", [dit, sd3])
def test_blocks_and_modules_that_are_repeated_work_nothing_out(make, monkeypatch):
    for kinds in ({"block"}, {"feed_forward", "self_attention"}):
        bench = make()
        the_plan = planned(bench, [FULL, AST, FULL, AST, AST], frozenset(kinds))
        with ah.applied(bench.pipe, the_plan) as run, counted(monkeypatch, run) as calls:
            bench.pipe(**bench.inputs())
        assert {call: n for call, n in calls.items() if call[1] > 0} == {}
        assert run.summary().flops.module == pytest.approx(the_plan.flops().module)


def test_the_count_sees_what_it_looks_for(monkeypatch):
    """A step that prepares its sites once more is caught."""
    bench = dit()
    around = engine_run.Run._around

    def prepares(run, call):
        if run._generation is not None:
            run._prepared._kept.clear()
            run._site_plans = run._prepared.of(run.plan, run._generation.tokens, run._branches, frozenset())
        return around(run, call)

    monkeypatch.setattr(engine_run.Run, "_around", prepares)
    with ah.applied(bench.pipe, planned(bench, PLANS["head by head"])) as run, counted(monkeypatch, run) as calls:
        bench.pipe(**bench.inputs())
    assert {name for name, step in calls if step > 0} >= {"prepare", "_head_group", "_whole_flops"}


def test_generations_alike_share_what_was_prepared(monkeypatch):
    bench = dit()
    prepared = []
    prepare = site_plan.prepare
    monkeypatch.setattr(engine_prepared, "prepare", lambda *args, **kwargs: prepared.append(args) or prepare(*args, **kwargs))
    with ah.applied(bench.pipe, planned(bench, PLANS["shared"])) as run:
        for images, guidance in ((1, 3.0), (2, 3.0), (1, 3.0)):
            bench.pipe(**bench.inputs(images=images, guidance=guidance))
        assert len(prepared) == STEPS * bench.layers
        with pytest.warns(ah.errors.ShareCfgIgnored):
            bench.pipe(**bench.inputs(guidance=1.0))
        assert len(prepared) == 2 * STEPS * bench.layers
        assert run.summary().cells["full"] == 3 * bench.layers


def test_closed_forms_are_those_of_the_plan():
    """What is counted above is all that there is of them."""
    assert set(CLOSED_FORMS) >= {name for name in vars(flops) if name.endswith("_flops") and name != "remaining_flops"}
