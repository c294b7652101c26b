"""Arguments that mean nothing together, or alone: refused in words before any pipeline is looked at."""

import math

import pytest
from budget import FAMILIES, synthetic
from families import MORE
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.sharding import Share
from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.plans.cells import AST, FULL, Arrow, Attend, Full
from arrowhead.searches.stack.api import why_sites

HALF = ah.Budget(module_flops=0.5)
WHOLE = ah.Budget(transformer_flops=0.6)
NO_PIPELINE = object()  # whoever looks at it says that it is unsupported

REFUSED = {
    "no such strategy": {"strategy": "best"},
    "a threshold for a budget": {"strategy": "budget", "threshold": 0.1},
    "a threshold's name for a budget": {"strategy": "budget", "threshold": "D4"},
    "a budget and a threshold": {"budget": HALF, "threshold": 0.1},
    "a budget's name and a threshold": {"budget": "light", "threshold": 0.1},
    "a budget for greedy": {"strategy": "greedy", "budget": HALF},
    "a budget's name for greedy": {"strategy": "greedy", "budget": "light"},
    "a budget for headwise": {"strategy": "headwise", "budget": HALF},
    "a budget for a Headwise": {"strategy": ah.Headwise(), "budget": HALF},
    "a budget and a threshold for greedy": {"strategy": "greedy", "budget": HALF, "threshold": 0.1},
    "a loss for a budget": {"budget": HALF, "loss": "signed"},
    "a loss for the budget that is meant": {"loss": "signed"},
    "no such loss": {"threshold": 0.1, "loss": "squared"},
    "no such budget": {"budget": "bold"},
    "a number for a budget": {"budget": 0.5},
    "no budget at all": {"strategy": "budget", "budget": {"error": 0.1}},
    "a threshold's name for headwise": {"strategy": "headwise", "threshold": "D4"},
    "a loss for headwise": {"strategy": "headwise", "loss": "signed"},
    "no such threshold": {"threshold": "D7"},
    "a threshold below nothing": {"threshold": -0.1},
    "an extent for greedy": {"threshold": 0.1, "extent": ah.Extent()},
    "an extent for headwise": {"strategy": "headwise", "extent": ah.Extent()},
    "an extent that is none": {"extent": {"ages": 3}},
    "a table for greedy": {"threshold": 0.1, "table": synthetic(0)},
    "a table and an extent": {"extent": ah.Extent(), "table": synthetic(0)},
    "a table that is none": {"table": "table.safetensors"},
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_searches_that_mean_nothing(arguments):
    with pytest.raises(InputsInvalid, match="got "):
        ah.search(NO_PIPELINE, {}, **arguments)


MEANT = {
    "nothing said": {},
    "a budget": {"budget": HALF},
    "a name": {"budget": "strong"},
    "a budget by name": {"strategy": "budget", "budget": HALF},
    "an extent": {"extent": ah.Extent(ages=2)},
    "a threshold": {"threshold": "D4"},
    "greedy": {"strategy": "greedy"},
    "greedy with a loss": {"strategy": "greedy", "loss": "signed"},
    "headwise": {"strategy": "headwise", "threshold": 0.5},
    "a Headwise": {"strategy": ah.Headwise()},
}


@pytest.mark.parametrize("arguments", MEANT.values(), ids=MEANT)
def test_searches_that_mean_something_look_at_the_pipeline(arguments):
    with pytest.raises(UnsupportedPipeline):
        ah.search(NO_PIPELINE, {}, **arguments)


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        ({"budget": WHOLE}, "stack"),
        ({"budget": ah.Budget(error=0.5)}, "stack"),
        ({"budget": HALF}, "budget"),
        ({"strategy": "budget", "budget": WHOLE}, "budget"),
        ({"threshold": 0.5}, "greedy"),
        ({"strategy": "headwise"}, "headwise"),
    ],
    ids=str,
)
def test_the_strategy_follows_the_arguments(arguments, strategy):
    bench = FAMILIES["sd3"]()
    plan = ah.search(bench.pipe, bench.inputs(), progress=False, **arguments)
    assert plan.about["search"]["strategy"] == strategy
    assert {site.kind for site in plan.target.sites} == {"stack"} or strategy != "stack"
    why = "module_flops=0.5 is about single sites" if arguments == {"budget": HALF} else None
    assert plan.about["search"].get("why_sites") == why


ABOUT_SITES = {
    "an Extent is": {"extent": ah.Extent(ages=2)},
    "a Table is": {"table": synthetic(0)},
    "granularity='site' is": {"budget": ah.Budget(transformer_flops=0.6, granularity="site")},
    "granularity='step' and reuse=False are": {"budget": ah.Budget(error=0.1, granularity="step", reuse=False)},
    "cache_bytes=1000 is": {"budget": ah.Budget(speedup=1.2, cache_bytes=1000)},
    "attention_flops=0.5 is": {"budget": ah.Budget(attention_flops=0.5)},
    "prompts are split": {},
    "is no plain chain of blocks": {},
}


@pytest.mark.parametrize("said", ABOUT_SITES)
def test_what_a_stack_does_not_know_is_searched_for_among_sites(said):
    bench = MORE["cogvideox"]() if "plain" in said else FAMILIES["dit"]()
    driver = driver_of(bench.pipe, bench.inputs())
    assert "plain" in said or why_sites(driver, WHOLE, None, None) is None
    if "split" in said:
        driver.share = Share(sizes=(1, 1))
    how = {"budget": WHOLE, "extent": None, "table": None} | ABOUT_SITES[said]
    assert said in why_sites(driver, **how)


@pytest.mark.parametrize("settings", [{"cache_bytes": 1000}, {"granularity": "step"}, {"residual": False}], ids=str)
def test_a_stack_refuses_what_is_about_sites(settings):
    bench, runs = FAMILIES["dit"](), []
    bench.pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(InputsInvalid, match=r"got (cache_bytes|granularity|residual)=.* for a stack.*wanted.*leave"):
        ah.search(bench.pipe, bench.inputs(), strategy="stack", budget=ah.Budget(transformer_flops=0.6, **settings))
    assert not runs


def test_what_the_pipeline_does_not_take():
    bench = FAMILIES["dit"]()
    with left_as_it_was(bench):
        for unknown in ({"prompt": "a fish"}, {}):
            with pytest.raises(InputsInvalid, match="cannot be called so"):
                ah.calibrate(bench.pipe, unknown, progress=False)


def test_granularities_that_no_site_has_are_refused_before_the_run():
    """A calibration takes minutes."""
    bench, runs = FAMILIES["dit"](), []
    bench.pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(InputsInvalid, match=r"granularity=2.*wanted"):  # sites have 3 heads
        ah.search(bench.pipe, bench.inputs(), budget=ah.Budget(module_flops=0.5, granularity=2), progress=False)
    assert not runs


BUDGETS = {
    "nothing asked": {},
    "two things asked": {"module_flops": 0.5, "error": 0.1},
    "two kinds of FLOPs": {"module_flops": 0.5, "attention_flops": 0.5},
    "whole and part": {"transformer_flops": 0.5, "module_flops": 0.5},
    "speed and FLOPs": {"speedup": 1.5, "module_flops": 0.5},
    "a speedup head by head": {"speedup": 1.5, "granularity": "head"},
    "a speedup by twos": {"speedup": 1.5, "granularity": 2},
    **{
        f"{name}={value!r}": {name: value}
        for name in ("module_flops", "attention_flops", "transformer_flops", "speedup", "error")
        for value in (0, -0.5, math.nan, math.inf, True, "0.5", [0.5])
    },
    **{f"{name}=1.01": {name: 1.01} for name in ("module_flops", "attention_flops", "transformer_flops")},
    **{f"speedup={value}": {"speedup": value} for value in (0.5, 1, 1.0)},
    **{f"slopes={value!r}": {"module_flops": 0.5, "slopes": value} for value in ((0.0,), (1.5,), [1.0], 1.0, (float("nan"),))},
    **{f"corrections={value!r}": {"module_flops": 0.5, "corrections": value} for value in (-1, 3, 1.0, True, None)},
    **{f"granularity={value!r}": {"module_flops": 0.5, "granularity": value} for value in ("heads", 0, -1, 1.5, True)},
}


@pytest.mark.parametrize("settings", BUDGETS.values(), ids=BUDGETS)
def test_budgets_that_mean_nothing(settings):
    with pytest.raises(InputsInvalid, match=r"got .*wanted"):
        ah.Budget(**settings)


@pytest.mark.parametrize(
    "settings", [{"error": 3}, {"error": 1e-9}, {"module_flops": 1}, {"attention_flops": 1e-3}, {"speedup": 1.01}], ids=str
)
def test_budgets_at_the_edge(settings):
    assert ah.Budget(**settings).asked == next(iter(settings.items()))


EXTENTS = {
    f"{name}={value!r}": {name: value}
    for name, values in {
        "radii": [(-1,), (4, -1), (2.5,), ("4",), (True,), (None,), 4, "44"],
        "ages": [0, -1, 1.5, True, None, "6"],
        "vectors": [0, -1, 1.5, True, None],
        "seed": [-1, 0.5, None, "0"],
        "kinds": [(), ("attention",), "block", ("block", "attention"), 3],
        "precisions": [("int7",), ("native",), "int8", ("int8", "int4"), ("int8", "int8"), 8],
    }.items()
    for value in values
}


@pytest.mark.parametrize("settings", EXTENTS.values(), ids=EXTENTS)
def test_extents_that_mean_nothing(settings):
    with pytest.raises(InputsInvalid, match=r"got (radii|ages|vectors|seed|kinds|precisions)=.*wanted"):
        ah.Extent(**settings)


@pytest.mark.parametrize(
    "settings", [{}, {"radii": ()}, {"radii": (0,)}, {"radii": [4, 2]}, {"ages": 1}, {"vectors": 3}], ids=str
)
def test_extents_at_the_edge(settings):
    bench = FAMILIES["dit"]()
    table = ah.calibrate(bench.pipe, bench.inputs(steps=2), extent=ah.Extent(**settings), progress=False)
    assert table.radii == tuple(settings.get("radii", (2, 0)))
    assert table.ages == settings.get("ages", 8)
    assert table.about["search"].items() >= {"ages": table.ages, "vectors": settings.get("vectors", 1)}.items()


@pytest.mark.parametrize("granularity", [3, 8])
def test_groups_of_heads_that_a_table_s_sites_do_not_have(granularity):
    with pytest.raises(InputsInvalid, match=rf"granularity={granularity}.*wanted.*4 heads"):
        ah.solve(synthetic(0, heads=4), ah.Budget(module_flops=0.5, granularity=granularity))


@pytest.mark.parametrize(
    "column", ["too old", "another radius", "another precision", "another number of steps", "another number of sites"]
)
def test_a_table_asked_for_what_it_does_not_know(column):
    """Rather than an index out of range."""
    table = synthetic(0, steps=5, count=2, ages=2)
    columns = {
        "too old": [[FULL, AST, AST, AST, FULL], [FULL] * 5],
        "another radius": [[FULL, Attend(Arrow(3)), FULL, FULL, FULL], [FULL] * 5],
        "another precision": [[FULL, Attend(Full("int8")), FULL, FULL, FULL], [FULL] * 5],
        "another number of steps": [[FULL, AST], [FULL, AST]],
        "another number of sites": [[FULL, AST, FULL, FULL, FULL]],
    }
    with pytest.raises(InputsInvalid, match="wanted"):
        table.predicted_error(columns[column])
