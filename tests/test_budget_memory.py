"""Bounds on what caches hold: kept to by the plan's own count, and by what a generation really holds."""

import re
from dataclasses import replace

import pytest
from budget import FAMILIES, column_error, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.plans.lifetimes import of_head

pytestmark = pytest.mark.slow  # minutes, all of them together


def peak(table, plan):
    return max(plan.cache_bytes(table.images, table.itemsize))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    guided=st.booleans(),
    sizes=st.sampled_from([(1, 2), (3, 4)]),
    granularity=st.sampled_from(["site", "head"]),
    part=st.floats(0.05, 1.5),
)
def test_what_is_found_keeps_to_both_limits(seed, guided, sizes, granularity, part):
    table = synthetic(seed, steps=6, count=3, heads=2, radii=(12, 4), guided=guided, feed_forward=True)
    table = replace(table, images=sizes[0], itemsize=sizes[1])
    free = ah.Budget(transformer_flops=0.7, granularity=granularity)
    without = ah.solve(table, free)
    limit = int(part * peak(table, without))
    try:
        plan = ah.solve(table, replace(free, cache_bytes=limit))
    except InputsInvalid as refusal:
        least = int(re.search(r"at most (\d+) bytes.*wanted at least (\d+)", str(refusal))[2])
        assert least > limit
        assert peak(table, ah.solve(table, replace(free, cache_bytes=least))) <= least
        return
    assert peak(table, plan) <= limit
    assert plan.about["search"]["transformer_flops"] <= 0.7
    assert plan.cells == without.cells or part < 1
    if granularity == "site":
        real = sum(
            column_error(table, table.heads(i), of_head(column, 0))
            if site.heads == 1
            else column_error(table, table.heads(i), column)
            for i, (site, column) in enumerate(zip(plan.target.sites, plan.columns, strict=True))
        )
        assert plan.about["search"]["predicted_error"] == pytest.approx(real**0.5, rel=5e-3)  # with no price of memory in it


@pytest.mark.parametrize("seed", range(2))
def test_half_the_memory_is_found_where_there_are_many_sites(seed):
    """At a predicted error that is no less than without."""
    table = synthetic(seed, steps=10, count=8, heads=2, radii=(12, 4), ages=3)
    free = ah.Budget(module_flops=0.6, granularity="site")
    without = ah.solve(table, free)
    plan = ah.solve(table, replace(free, cache_bytes=peak(table, without) // 2))
    assert peak(table, plan) <= peak(table, without) // 2
    assert plan.flops().module <= 0.6
    errors = [of.about["search"]["predicted_error"] for of in (without, plan)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize(("family", "images"), [("sd3", 1), ("flux", 2)])
def test_a_generation_holds_no_more(family, images):
    bench = FAMILIES[family]()
    table = ah.calibrate(bench.pipe, bench.inputs(images=images), progress=False)
    assert (table.images, table.itemsize) == (images, 8)
    free = ah.Budget(module_flops=0.75)
    limit = int(0.9 * peak(table, ah.solve(table, free)))
    plan = ah.solve(table, replace(free, cache_bytes=limit))
    with ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs(images=images))
        assert run.summary().peak_cache_bytes == peak(table, plan) <= limit


@pytest.mark.parametrize("limit", [-1, 1.5, "1", True])
def test_limits_that_mean_nothing(limit):
    with pytest.raises(InputsInvalid, match=r"cache_bytes=.*wanted"):
        ah.Budget(module_flops=0.5, cache_bytes=limit)


def test_an_error_has_no_limit_of_memory_beside_it():
    with pytest.raises(InputsInvalid, match=r"cache_bytes=.*error.*wanted"):
        ah.Budget(error=0.1, cache_bytes=1000)


def test_a_limit_of_nothing():
    """Nothing is remembered: no residuals, no reuse."""
    table = synthetic(1, steps=6, count=2, heads=2)
    plan = ah.solve(table, ah.Budget(module_flops=0.9, granularity="site", cache_bytes=0))
    assert peak(table, plan) == 0
    assert plan.flops().module <= 0.9
