"""Predicted errors of runs, of extrapolation and of regions, against sums by hand over tables of random products."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import FAMILIES, SLOPES, column_error, column_errors, every_column, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import cell

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import EXTRAPOLATE, FULL
from arrowhead.searches.budget.sensitivity.site_outputs import (
    ComputedOutput,
    ExtrapolatedOutput,
    RepeatedOutput,
    site_outputs_of,
)
from arrowhead.searches.budget.solver.allocation import within_predicted_error
from arrowhead.searches.budget.solver.problem import problem_of
from arrowhead.searches.budget.solver.states import Choices

NEAR, FAR = 3, 6


def table_of(seed=0, **sizes):
    return synthetic(seed, **{"steps": 6, "count": 1, "heads": 2, "radii": (NEAR, FAR), "ages": 5} | sizes)


def column_of(letters):
    return tuple(cell(letter, NEAR, FAR) for letter in letters)


COLUMNS = {
    "one run": "FRRRRR",
    "runs": "FRRFRR",
    "runs of an arrow": "FwRRxR",
    "runs of a residual": "FWRRXR",
    "runs of shared cells": "CRvRVR",
    "runs of shared cells after both": "FVRCRR",
    "a line": "FFEEEE",
    "a line through steps far apart": "FRRFEE",
    "a line of ASC": "CRCEEE",
    "a line from both to ASC": "FCEEER",
    "a line from ASC to both": "CFEEFE",
    "a line over arrows": "FwWEEE",
    "a line over shared arrows": "FXVEEE",
    "repeated, then continued": "FFRRER",
    "continued, then repeated": "FFERRE",
}


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("letters", COLUMNS.values(), ids=COLUMNS)
def test_what_a_column_does_in_each_step(letters, guided, regions):
    table, column = table_of(len(letters), guided=guided, regions=regions), column_of(letters)
    wanted = np.array(column_errors(table, table.heads(0), column))
    assert table.predicted_error([column]) == pytest.approx(wanted, rel=1e-5, abs=1e-5 * wanted.max())
    assert wanted.any() or not set(letters) - {"F", "C"}


def summed(table, letters):
    """Square of the sum over steps of what each changes, with nothing but full attention and its repetition or its line."""
    outputs = table.outputs.double().sum(1)[:, :, :2].sum(2)  # (S, ages, M), both branches
    found = 0
    made = [i for i, letter in enumerate(letters) if letter == "F"]
    for step in range(len(letters)):
        a = max(i for i in made if i <= step)
        change = outputs[step, step - a]
        if letters[step] == "E":
            b = max(i for i in made if i < a)
            change = change + (step - a) / (a - b) * (change - outputs[step, step - b])
        found = found + table.sampler_gains[step] * change
    return (found.view(-1, table.regions) ** 2).sum(1).mean().item() / (table.final * table.elements)


@pytest.mark.parametrize("regions", [1, 4])
@pytest.mark.parametrize("letters", ["FRRRRR", "FFEEEE", "FFFEEE", "FFFRRR"])
def test_a_run_does_the_square_of_its_sum(letters, regions):
    """Where all its steps push one way, so that none takes back what another did."""
    found = 0
    for seed in range(3):
        table = table_of(seed, regions=regions)
        age = torch.arange(6.0).view(1, 1, -1, 1, 1) ** 2  # convex: a line leaves the same sign in all steps
        table = replace(table, outputs=(age * table.outputs[:1, :, 1:2].abs()).expand(6, -1, -1, -1, -1))
        error = table.predicted_error([column_of(letters)])
        assert error.sum() == pytest.approx(summed(table, letters), rel=1e-5)
        assert (error >= 0).all()
        found += error.sum() > 1.2 * max(error)
    assert found, "or else one step was all"


def test_what_takes_back_an_earlier_step_s_change_does_nothing():
    table = table_of(guided=False)
    outputs = torch.zeros_like(table.outputs)
    outputs[1, :, 1], outputs[2, :, 2], outputs[3, :, 3] = 1.0, -0.5, 2.0
    table = replace(table, outputs=outputs, sampler_gains=(1.0,) * 6, final=1.0, elements=1)
    assert table.predicted_error([column_of("FRRRFF")]).tolist() == pytest.approx([0, 4, 0, 25 - 1, 0, 0])
    assert table.predicted_error([column_of("FRFFFF")]).tolist() == pytest.approx([0, 4, 0, 0, 0, 0])


def test_runs_are_apart():
    """Of sites, of heads that do something else, and of what was computed anew."""
    table = table_of(count=2)
    runs = column_of("FRRFFF"), column_of("FFFFRR")
    each = [table.predicted_error(columns) for columns in ((runs[0], [FULL] * 6), ([FULL] * 6, runs[0]))]
    assert table.predicted_error((runs[0], runs[0])) == pytest.approx(sum(each))
    parts = [table.predicted_error((run, [FULL] * 6)).sum() for run in runs]
    assert table.predicted_error((column_of("FRRFRR"), [FULL] * 6)).sum() > parts[0]
    assert table.predicted_error((column_of("FRRFFR"), [FULL] * 6))[:5] == pytest.approx(each[0][:5])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), guided=st.booleans(), regions=st.sampled_from([1, 2]))
def test_whatever_may_be_chosen(data, guided, regions):
    """Any column of the dynamic program, whose outputs are those that it says."""
    table = table_of(data.draw(st.integers(0, 2**32)), steps=4, ages=3, radii=(NEAR,), guided=guided, regions=regions)
    choices = Choices(table.radii, 3, share_cfg=guided, slopes=SLOPES)
    past = data.draw(st.sampled_from(COLUMNS_OF.setdefault(choices, every_column(choices, 4))))
    column = tuple(what for what, _ in past.spent)
    assert tuple(site_outputs_of(column)) == past.gave
    error = table.predicted_errors([table.heads(0)], past.gave)[range(4), range(4), 0]
    wanted = np.array(column_errors(table, table.heads(0), column))
    assert error == pytest.approx(wanted, rel=1e-4, abs=1e-5 * max(wanted.max(), 1e-9))


COLUMNS_OF = {}


def test_what_is_too_old_for_a_line():
    table = table_of(ages=3)
    line = ExtrapolatedOutput(RepeatedOutput(ComputedOutput(), 2), RepeatedOutput(ComputedOutput(), 3), 1.0, since=2, gap=1)
    assert table.predicted_errors([table.heads(0)], [line]).shape == (6, 1, 1)
    with pytest.raises(InputsInvalid, match="ages of up to 4"):
        table.predicted_errors([table.heads(0)], [replace(line, earlier=RepeatedOutput(ComputedOutput(), 4), gap=2)])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), guided=st.booleans(), measure=st.sampled_from(["module", "transformer"]))
def test_an_offer_with_lines_is_the_best_of_all_columns(seed, guided, measure):
    table = synthetic(seed, steps=5, count=1, heads=2, radii=(), ages=3, guided=guided)
    table = replace(table, outputs=table.outputs * 0.1 + torch.arange(4.0).view(1, 1, -1, 1, 1))  # lines are worth something
    problem = problem_of(ah.Budget(**{f"{measure}_flops": 1.0}, granularity="site"), table)
    choices = Choices((), 3, share_cfg=guided, slopes=SLOPES)
    columns = COLUMNS_OF.setdefault(
        (choices, 5), sorted({tuple(c for c, _ in p.spent) for p in every_column(choices, 5)}, key=str)
    )
    error = np.array([column_error(table, table.heads(0), column) for column in columns])
    plans = (ah.Plan(tuple((c,) for c in column), table.target, table.tokens, guided) for column in columns)
    cost = np.array([plan.flops().module for plan in plans])
    for multiplier in (0.0, 0.03, 0.3, 10.0):
        offer = problem.offer(multiplier)
        objective = error + multiplier * cost
        assert objective[columns.index(offer.column(0))] == pytest.approx(objective.min(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("settings", "lines"), [({}, True), ({"extrapolate": False}, False), ({"reuse": False}, False)])
def test_lines_where_they_are_asked_for(settings, lines):
    table = table_of(1, steps=8, count=3, ages=6)
    table = replace(table, outputs=table.outputs * 0.01 + torch.arange(7.0).view(1, 1, -1, 1, 1))
    budget = ah.Budget(module_flops=0.9 if "reuse" in settings else 0.4, granularity="site", **settings)
    plan = ah.solve(table, budget)
    assert any(EXTRAPOLATE in row for row in plan.cells) == lines
    assert plan.about["search"]["predicted_error"] == pytest.approx(table.predicted_error(plan.columns).sum() ** 0.5, rel=5e-3)
    assert "extrapolate" in plan.about["search"]


def test_two_calls_have_the_same_lines_as_one_batch():
    table = table_of(1, steps=8, count=3, ages=6, calls=2)
    table = replace(table, outputs=table.outputs * 0.01 + torch.arange(7.0).view(1, 1, -1, 1, 1))  # they move evenly
    budget = ah.Budget(module_flops=0.4, granularity="site")
    plan = ah.solve(table, budget)
    assert plan.count()["extrapolate"]
    assert plan.cells == ah.solve(replace(table, branches=replace(table.branches, order="cond_first")), budget).cells


def test_heads_with_ways_of_their_own_have_no_lines():
    table = synthetic(0, steps=8, count=3, heads=4, ages=6, uneven=True)
    plan = ah.solve(table, ah.Budget(module_flops=0.4, granularity="head"))
    apart = [column for column in plan.columns if any(isinstance(getattr(c, "method", None), tuple) for c in column)]
    assert apart
    assert all(EXTRAPOLATE not in column for column in apart)


def products(bench, regions, **more):
    extent = ah.Extent((NEAR, FAR), ages=2, regions=regions, vectors=2, **more)
    return ah.calibrate(bench.pipe, bench.inputs(images=2, steps=3), extent=extent, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("regions", [3, 16])
def test_products_of_regions_sum_to_the_whole(family, regions):
    bench = FAMILIES[family]()
    whole, parts = products(bench, 1), products(bench, regions)
    assert (whole.regions, parts.regions) == (1, regions)
    for name in ("outputs", "residuals"):
        one, many = getattr(whole, name), getattr(parts, name)
        torch.testing.assert_close(many.unflatten(-1, (-1, regions)).sum(-1), one, rtol=1e-4, atol=1e-5 * one.abs().max())
    assert parts.outputs[1, :, 1, :2].bool().float().mean() > 0.6, (
        "regions have products of their own, but text that goes nowhere"
    )


def test_by_default_there_are_as_many_regions_as_make_64_products():
    bench = FAMILIES["dit"]()
    for images, vectors, regions in [(1, 1, 64), (2, 1, 32), (3, 2, 10)]:
        table = ah.calibrate(
            bench.pipe, bench.inputs(images=images, steps=2), extent=ah.Extent(vectors=vectors, ages=1), progress=False
        )
        assert (table.regions, table.outputs.shape[-1]) == (regions, images * vectors * regions)


@pytest.mark.parametrize(("regions", "seed"), [(2, 0), (4, 1)])
def test_regions_that_are_independent_tell_what_the_whole_does(regions, seed):
    """Many products of each: the expectation of the square of a sum of independent ones is the sum of those of squares."""
    draw = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, 1, 3, 1, 20000 * regions, generator=draw)
    of_parts = replace(
        synthetic(0, steps=3, count=1, heads=1, radii=(), guided=False), outputs=parts, residuals=parts[:, :, :0, None]
    )
    of_parts = replace(of_parts, regions=regions)
    whole = parts.unflatten(-1, (-1, regions)).sum(-1)
    of_whole = replace(of_parts, outputs=whole, residuals=whole[:, :, :0, None], regions=1)
    for letters in ("FRR", "FRF", "FFR", "FFE"):
        errors = [table.predicted_error([column_of(letters)]).sum() for table in (of_parts, of_whole)]
        assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_within_a_predicted_error_with_lines_and_regions():
    table = synthetic(3, steps=8, count=3, heads=2, ages=4, regions=8)
    problem = problem_of(ah.Budget(transformer_flops=1.0, granularity="site"), table)
    worst = problem.offer(problem.multiplier_of_least_cost).error.sum()
    for part in (0.01, 0.1, 0.5):
        found = within_predicted_error(problem, part * worst)
        assert found.error <= part * worst
        real = sum(column_error(table, table.heads(i), column) for i, column in enumerate(found.columns))
        assert found.error == pytest.approx(real, rel=1e-4)


def test_vectors_are_not_the_noise_that_the_run_begins_with(monkeypatch):
    """With one seed for both."""
    bench, drawn, own = FAMILIES["dit"](), [], torch.randn

    def randn(*args, **kwargs):
        drawn.append(own(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn", randn)
    ah.calibrate(bench.pipe, bench.inputs(steps=2), extent=ah.Extent(ages=1, seed=0), progress=False)
    vectors = [t.flatten() for t in drawn if t.dtype == torch.float32]  # the pipeline draws in double precision
    assert len(vectors) >= 2  # one a step
    for vector in vectors:
        noise = own(vector.shape, generator=torch.Generator().manual_seed(0))
        assert abs(torch.corrcoef(torch.stack([vector, noise]))[0, 1]) < 0.5


@pytest.mark.parametrize(("family", "text_first"), [("sd3", False), ("flux", True)])
def test_regions_of_residuals_are_those_of_outputs(family, text_first):
    """As many regions as tokens: text has no residual, at its own places."""
    bench = FAMILIES[family]()
    tokens = bench.visual + bench.text
    table = products(bench, tokens)
    sites = [i for i, site in enumerate(table.target.sites) if site.kind == "self_attention" and site.joint]
    heads = [head for site in sites for head in table.heads(site)]
    assert heads
    there = table.residuals[:, heads].unflatten(-1, (-1, tokens)).abs().sum((0, 1, 2, 3, 4, 5)) > 0
    text = range(bench.text) if text_first else range(bench.visual, tokens)
    assert [place for place in range(tokens) if not there[place]] == [*text]
