"""Plans that are tried: which are, how their errors are measured, and which is kept."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from budget import FAMILIES

import arrowhead as ah
from arrowhead.plans.cells import Reuse
from arrowhead.searches.budget.validation import errors_of

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def generations(monkeypatch):
    """What the plans that were tried really do, in the order in which they were."""
    module, seen = sys.modules["arrowhead.searches.budget.validation"], []
    own = module.measured_errors

    def measured(driver, plan, raw):
        seen.append((own(driver, plan, raw), plan))
        return seen[-1][0]

    monkeypatch.setattr(module, "measured_errors", measured)
    return seen


@pytest.mark.parametrize("slopes", [(), (0.5,)])
def test_no_plan_that_is_tried_takes_other_slopes_than_those_asked_for(slopes, generations):
    bench = FAMILIES["dit"]()
    budget = ah.Budget(transformer_flops=0.4, share_cfg=False, residual=False, slopes=slopes, granularity="site")
    ah.search(bench.pipe, bench.inputs(steps=12), budget=budget, progress=False)
    assert len(generations) > 1
    taken = {cell.extrapolate for _, plan in generations for row in plan.cells for cell in row if isinstance(cell, Reuse)}
    assert taken <= {0.0, *slopes}
    assert all(plan.about["search"]["slopes"] == slopes for _, plan in generations)


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("corrections", [0, 1, 2])
def test_of_corrections_the_one_that_errs_least_in_detail_is_kept(family, corrections, generations):
    bench = FAMILIES[family]()
    budget = ah.Budget(transformer_flops=0.6, corrections=corrections)
    plan = ah.search(bench.pipe, bench.inputs(), strategy="budget", budget=budget, progress=False)
    found = plan.about["search"]
    assert 1 <= found["generations"] == len(generations) <= 1 + corrections
    assert len({tried.cells for _, tried in generations}) == len(generations)
    doubt = {0.75: 1.0, 0.5: 1.05, 1.0: 1.05}  # of what is not the table's own
    errors, kept = min(generations, key=lambda each: each[0].detail * doubt[each[1].about["search"]["feedback"]])
    assert plan.cells == kept.cells
    assert found["measured_error"] == pytest.approx(errors.error, rel=5e-3)
    assert found["measured_detail"] == pytest.approx(errors.detail, rel=5e-3)
    powers = [tried.about["search"]["feedback"] for _, tried in generations]
    slopes = [tried.about["search"]["slopes"] for _, tried in generations]
    assert powers[0] == 0.75
    assert sorted({*powers} - {0.5, 0.75, 1.0}) == []
    assert slopes[0] == (0.5, 0.75, 1.0)
    assert slopes[1:].count((1.0,)) <= 1
    table = ah.calibrate(bench.pipe, bench.inputs(), extent=ah.Extent(feedback=found["feedback"]), progress=False)
    assert ah.solve(table, replace(budget, granularity=found["granularity"], slopes=found["slopes"])).cells == plan.cells
    kinds = [tried.about["search"]["granularity"] for _, tried in generations]
    assert kinds[0] == "step"
    assert corrections > 0 or kinds == ["step"]


@pytest.mark.slow
@every_family
@pytest.mark.parametrize(("granularity", "budget"), [("step", {"error": 0.6}), ("site", {"transformer_flops": 0.6})])
def test_a_granularity_that_is_named_is_kept(family, granularity, budget, generations):
    bench = FAMILIES[family]()
    plan = ah.search(bench.pipe, bench.inputs(), budget=ah.Budget(**budget, granularity=granularity), progress=False)
    assert plan.about["search"]["granularity"] == granularity
    tried = [plan for _, plan in generations]
    alike = [all(len(set(row)) == 1 for row in plan.cells) for plan in tried]
    assert all(alike) if granularity == "step" else not any(alike)


@pytest.mark.slow
def test_single_heads_where_steps_are_too_coarse_for_an_error():
    """It keeps to it, and costs no more than single heads do alone."""
    bench = FAMILIES["dit"]()
    table = ah.calibrate(bench.pipe, bench.inputs(), progress=False)
    for error in (0.01, 0.05):
        found = {}
        for granularity in (None, "head"):
            budget = ah.Budget(error=error, granularity=granularity)
            plan = ah.search(bench.pipe, bench.inputs(), budget=budget, table=table, progress=False)
            found[granularity] = plan.about["search"]["transformer_flops"]
            assert plan.about["search"]["measured_error"] <= error
        assert found[None] <= found["head"] < 1


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 7, 4), (1, 2, 3, 4, 5)])
def test_detail_is_what_neighbours_differ_by(shape):
    """Summed by hand; the same added to all of an image is no error of detail."""
    draw = torch.Generator().manual_seed(0)
    raw, other = (torch.randn(shape, generator=draw) for _ in range(2))
    axes = {3: [1], 4: [2, 3], 5: [2, 3, 4]}[len(shape)]
    ratios = []
    for image in range(shape[0]):
        change = whole = 0.0
        for place in itertools.product(*map(range, shape[1:])):
            for axis in axes:
                if place[axis - 1]:
                    before = tuple(p - (i == axis - 1) for i, p in enumerate(place))
                    change += float((other - raw)[image][place] - (other - raw)[image][before]) ** 2
                    whole += float(raw[image][place] - raw[image][before]) ** 2
        ratios.append((change / whole) ** 0.5)
    found = errors_of(other, raw)
    assert found.detail == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert found.error == pytest.approx(float((other - raw).norm() / raw.norm()))
    assert errors_of(raw + 0.3, raw).detail < 1e-5 < errors_of(raw + 0.3, raw).error
