"""An error kept to: over problems and measures that are made up, whatever these say."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from budget import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

import arrowhead as ah
from arrowhead.plans.cells import FULL
from arrowhead.searches.budget.solver.problem import problem_of
from arrowhead.searches.budget.validation import cheapest_within

MOST, TRIES = 10, 5


@dataclass
class Measured:
    """What a made-up generation does, with a note of every one. No more than so many are allowed."""

    of: object
    seen: list

    def __call__(self, found):
        self.seen.append((found, self.of(found)))
        assert len(self.seen) <= MOST, "the search does not come to an end"
        return self.seen[-1][1]


def keep_problem(seed=0, **sizes):
    table = synthetic(seed, **{"steps": 5, "count": 3, "heads": 1, "ages": 3, "radii": ()} | sizes)
    return problem_of(ah.Budget(transformer_flops=1.0, granularity="site"), table)


def assert_kept_to(error, problem, of):
    """And what it says is what it saw: the cheapest of what keeps to it, or full attention; then all that was measured."""
    measure = Measured(of, [])
    kept = cheapest_within(error, problem, measure)
    assert kept.generations == len(measure.seen)
    assert kept.best.measured <= error
    met = [(found.cost, seen) for found, seen in measure.seen if seen <= error]
    if met:
        assert kept.best.allocation.cost == min(cost for cost, _ in met)
        assert (kept.best.allocation, kept.best.measured) in measure.seen
        assert kept.best.predicted == pytest.approx(kept.best.allocation.error**0.5)
    else:
        sites, steps = len(problem.table.target.sites), problem.table.steps
        assert kept.best.allocation.columns == ((FULL,) * steps,) * sites
        assert kept.best.allocation.cost == pytest.approx(problem.offer(0.0).cost.sum())
        assert (kept.best.measured, kept.best.predicted, kept.best.allocation.error) == (0.0, 0.0, 0.0)
    columns = [found.columns for found, _ in measure.seen]
    assert all(a != b for a, b in pairwise(columns)), "one plan is not measured twice in a row"
    return kept, measure.seen


errors = st.sampled_from([1e-6, 1e-3, 0.03, 0.1, 0.5, 2.0, 100.0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 50), error=errors, factor=st.sampled_from([0.01, 0.3, 1.0, 3.0, 100.0]), power=st.floats(0.2, 2.0))
def test_where_errors_follow_the_prediction_as_a_power(seed, error, factor, power):
    problem = keep_problem(seed)
    _, seen = assert_kept_to(error, problem, lambda found: factor * found.error ** (power / 2))
    assert len(seen) <= TRIES or seen[TRIES - 1][1] > error


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 50), error=errors, noise=st.lists(st.just(0.0) | st.floats(1e-9, 1e6), min_size=MOST, max_size=MOST))
def test_whatever_is_measured(seed, error, noise):
    """Of plans that change something; the same plan does the same."""
    said, left = {}, iter(noise)

    def of(found):
        return said.setdefault(found.columns, 0.0 if found.error == 0 else next(left))

    assert_kept_to(error, keep_problem(seed), of)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 50), error=errors, exponents=st.lists(st.floats(-12, 6), min_size=MOST, max_size=MOST))
def test_whatever_is_measured_times_the_error(seed, error, exponents):
    left = iter(exponents)
    assert_kept_to(error, keep_problem(seed), lambda found: error * 10 ** next(left))


@pytest.mark.parametrize("error", [1e-3, 0.1, 3.0])
def test_where_nothing_keeps_to_it_there_is_full_attention(error):
    kept, seen = assert_kept_to(error, keep_problem(), lambda found: 2 * error)
    assert len(seen) >= 1
    assert not kept.best.allocation.error


def test_where_nothing_but_full_attention_keeps_to_it():
    """A jump: whatever is left out does ten times what was asked."""
    kept, _ = assert_kept_to(0.1, keep_problem(), lambda found: 0.0 if found.error == 0 else 1.0)
    assert {cell for column in kept.best.allocation.columns for cell in column} == {FULL}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_goes_wrong_entirely_is_not_kept(bad):
    """A generation that overflows."""
    kept, _ = assert_kept_to(0.1, keep_problem(), lambda found: bad if found.error > 1e-4 else found.error**0.5)
    assert math.isfinite(kept.best.measured)


def test_where_everything_keeps_to_it_the_cheapest_is_found():
    problem = keep_problem()
    kept, _ = assert_kept_to(1e6, problem, lambda found: found.error**0.5)
    assert kept.best.allocation.cost == pytest.approx(problem.offer(problem.multiplier_of_least_cost).cost.sum())


def test_where_nothing_changes_anything_more_and_more_is_left_out():
    problem = keep_problem()
    worst = problem.offer(problem.multiplier_of_least_cost).error.sum()
    kept, seen = assert_kept_to(0.2 * worst**0.5, problem, lambda found: 0.0)
    costs = [found.cost for found, _ in seen]
    assert costs == sorted(costs, reverse=True)
    assert kept.best.allocation.cost == costs[-1] < costs[0]


def test_where_the_table_knows_of_no_error():
    problem = keep_problem()
    nothing = replace(problem.table, sampler_gains=(0.0,) * problem.table.steps)
    blind = problem_of(ah.Budget(transformer_flops=1.0, granularity="site"), nothing)
    kept, seen = assert_kept_to(0.05, blind, lambda found: 1.0)
    assert len(seen) == 1
    assert kept.best.measured == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("power", [0.5, 0.8, 1.0])
def test_what_was_asked_is_nearly_used_up(seed, power):
    """Where there is much to choose from, and errors grow as a power of the prediction, three times as large."""
    problem, error = keep_problem(seed, steps=12, count=12, ages=5), 0.2
    worst = problem.offer(problem.multiplier_of_least_cost).error.sum()
    kept, seen = assert_kept_to(error, problem, lambda found: 2.5 * error * (found.error / worst) ** (power / 2))
    assert kept.best.measured >= 0.85 * error
    assert len(seen) <= TRIES


def test_seconds_tries_lie_between_what_was_met_and_what_was_missed():
    problem = keep_problem(1, steps=12, count=12, ages=5)
    _, seen = assert_kept_to(0.1, problem, lambda found: 0.3 * found.error**0.2)
    for i in range(1, len(seen)):
        missed = [found.error for found, error in seen[:i] if error > 0.1]
        assert seen[i][0].error < min(missed, default=np.inf)
        met = [found.cost for found, error in seen[:i] if error <= 0.1]
        assert seen[i][0].cost <= min(met, default=np.inf)


def test_full_attention_costs_what_is_not_fixed():
    """With what lies outside of all sites."""
    table = synthetic(0, steps=4, count=2, feed_forward=True)
    problem = problem_of(ah.Budget(transformer_flops=1.0, granularity="site"), table)
    kept, _ = assert_kept_to(1e-9, problem, lambda found: 1.0)
    assert 0 < problem.fixed < 1
    assert kept.best.allocation.cost == pytest.approx(1 - problem.fixed)
    assert torch.equal(table.outputs, problem.table.outputs)
