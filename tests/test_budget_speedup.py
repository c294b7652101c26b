"""Seconds as costs: of any seconds the plan is the best there is; how long things really take is no matter here."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from budget import FAMILIES, SLOPES, column_error, every_column, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import FULL, Attend, Full, Reuse
from arrowhead.plans.layout import outermost
from arrowhead.plans.lifetimes import lifetimes
from arrowhead.searches.budget.sensitivity.recording import record
from arrowhead.searches.budget.solver.allocation import within_cost
from arrowhead.searches.budget.solver.costs import SecondCosts
from arrowhead.searches.budget.solver.dynamic_program import DynamicProgram
from arrowhead.searches.budget.solver.problem import problem_of
from arrowhead.searches.budget.solver.states import Choices
from arrowhead.searches.budget.solver.timing import timed

pytestmark = pytest.mark.slow  # minutes, all of them together


def nameless(site):
    return replace(site, path="", within=tuple(map(nameless, site.within)))


def some_seconds(seed, table, share=True):
    """Full attention takes longest; all else is drawn."""
    rng, cells, residuals = np.random.default_rng(seed), {}, {}
    for site in (*table.target.sites, *table.blocks):
        shape = nameless(site)
        radii = table.radii if site.kind == "self_attention" else ()
        for cell, _ in DynamicProgram(Choices(radii, table.ages, share, slopes=SLOPES)).writings:
            if (shape, cell) not in cells:
                cells[shape, cell] = 1.0 if cell == FULL else 0.01 if isinstance(cell, Reuse) else rng.uniform(0.2, 0.9)
        for radius in radii:
            residuals[shape, radius, False] = rng.uniform(0.0, 0.3)
            residuals[shape, radius, True] = rng.uniform(0.0, residuals[shape, radius, False])
    return SecondCosts(cells, residuals, other=rng.uniform(0.1, 1.0))


def seconds_of(site, column, seconds):
    """Of a site over all steps."""
    total, shape = 0.0, nameless(site)
    for cell, writes in zip(column, lifetimes(column), strict=True):
        total += seconds.cells[shape, cell]
        for residual in writes.residuals:
            total += seconds.residuals[shape, residual.radius, residual.conditional_only or cell.share_cfg]
    return total


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data(), share=st.booleans(), ages=st.integers(1, 3))
def test_the_best_there_is_lies_between_the_bound_and_what_is_found(seed, data, share, ages):
    table = synthetic(seed, steps=3, count=1, feed_forward=True, ages=ages)
    seconds = some_seconds(seed, table)
    problem = problem_of(ah.Budget(speedup=2.0, share_cfg=share, granularity="site"), table, seconds)
    columns, error, cost = [], [], []
    whole = 3 * (2.0 + seconds.other)
    for place, site in enumerate(table.target.sites):
        choices = Choices(table.radii if site.kind == "self_attention" else (), ages, share, slopes=SLOPES)
        columns.append(list(dict.fromkeys(tuple(cell for cell, _ in past.spent) for past in every_column(choices, 3))))
        error.append(np.array([column_error(table, table.heads(place), column) for column in columns[-1]]))
        cost.append(np.array([seconds_of(site, column, seconds) for column in columns[-1]]) / whole)
    assert problem.fixed == pytest.approx(3 * seconds.other / whole)
    together = cost[0][:, None] + cost[1][None, :] + problem.fixed
    limit = data.draw(st.floats(together.min() + 1e-6, 1.0))
    best = (error[0][:, None] + error[1][None, :])[together <= limit * (1 + 1e-9)].min()
    found = within_cost(problem, limit)
    assert found.bound <= best * (1 + 1e-4) + 1e-12
    assert best <= found.error * (1 + 1e-4) + 1e-12
    spent = sum(cost[i][columns[i].index(found.columns[i])] for i in range(2))
    assert spent + problem.fixed <= limit * (1 + 1e-9)
    assert found.cost == pytest.approx(spent)


@pytest.mark.parametrize(("family", "guidance"), [*((family, 3.0) for family in FAMILIES), ("flux", 1.0)])
def test_all_that_may_be_chosen_is_timed_and_no_trace_is_left(family, guidance):
    bench = FAMILIES[family]()
    choices = Choices((4, 2), 3, share_cfg=guidance > 1, slopes=SLOPES, precisions=("int8",))
    table = ah.calibrate(bench.pipe, bench.inputs(guidance=guidance, steps=2), progress=False)
    with left_as_it_was(bench, guidance=guidance):
        seconds = timed(driver_of(bench.pipe, bench.inputs(guidance=guidance)), table.target.sites, choices, table.blocks)
    assert {site.kind for site in table.in_blocks} == {"block"}
    for site in (*table.target.sites, *table.blocks):
        own = choices if site.kind == "self_attention" else replace(choices, radii=(), precisions=())
        for cell, writes in DynamicProgram(own).writings:
            assert seconds.of(site, cell, writes) >= 0
            assert seconds.of(site, Attend(Full()), writes) >= seconds.of(site, FULL, type(writes)())
    assert seconds.other >= 0


@pytest.fixture
def known(monkeypatch):
    """Cells take the time that is said, and so do generations."""
    module = sys.modules["arrowhead.searches.budget.validation"]
    held = {}

    def timing(driver, sites, choices, blocks):
        table = held["table"] = record(driver, ah.Extent()).table
        assert (sites, blocks) == (table.target.sites, table.blocks)
        held["seconds"] = some_seconds(0, table, table.branches.guided)
        return held["seconds"]

    monkeypatch.setattr(module, "timed", timing)
    return held


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_for_a_speedup(family, known):
    bench = FAMILIES[family]()
    with left_as_it_was(bench):
        plan = ah.search(bench.pipe, bench.inputs(), strategy="budget", budget=ah.Budget(speedup=1.3), progress=False)
    seconds, sites = known["seconds"], plan.target.sites
    left = sum(seconds_of(site, column, seconds) for site, column in zip(sites, plan.columns, strict=True))
    whole = plan.steps * sum(seconds.cells[nameless(site), FULL] for site in sites)
    known = sum(seconds.cells[nameless(site), FULL] for site in outermost(known["table"].target.sites))
    other = max(plan.steps * (seconds.other + known) - whole, 0)  # outside of what the plan speaks of
    assert (whole + other) / (left + other) >= 1.3
    search = plan.about["search"]
    assert search["predicted_speedup"] == pytest.approx((whole + other) / (left + other), rel=5e-3)
    assert search["measured_speedup"] > 0
    with ah.applied(bench.pipe, plan):
        bench.pipe(**bench.inputs())


def test_the_most_that_is_named_can_be_met(known):
    bench = FAMILIES["sd3"]()
    with left_as_it_was(bench), pytest.raises(InputsInvalid, match=r"speedup=1000.*wanted at most") as refusal:
        ah.search(bench.pipe, bench.inputs(), strategy="budget", budget=ah.Budget(speedup=1000), progress=False)
    most = float(re.search(r"wanted at most ([0-9.]+)", str(refusal.value))[1])
    plan = ah.search(bench.pipe, bench.inputs(), strategy="budget", budget=ah.Budget(speedup=most), progress=False)
    assert plan.about["search"]["predicted_speedup"] >= most * (1 - 5e-3)
    with pytest.raises(InputsInvalid, match="wanted at most"):
        ah.search(bench.pipe, bench.inputs(), strategy="budget", budget=ah.Budget(speedup=1.02 * most), progress=False)


def test_a_speedup_is_not_for_a_table_alone():
    with pytest.raises(InputsInvalid, match=r"speedup=2.*wanted FLOPs"):
        ah.solve(synthetic(0), ah.Budget(speedup=2))
