"""Plans of two levels: a stack skips steps, and in the others attention within it is chosen head by head."""

import random
from itertools import product

import headwise
import pytest
import torch
from pipelines import JOINT, tiny
from replay import assert_identical, distance, trace
from seeds import seeds
from test_stack import STEPS, bench_of, random_column, replayed
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import PlanAdapted, PlanInvalid
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Arrow, Attend, Cached, Full, Reuse
from arrowhead.plans.layout import Tokens, relevant_tokens

BENCHES = {"tiny": tiny, **JOINT}


def two_levels(bench, column, grid, guided=True):
    """The plan of a stack's column and of a grid of `headwise` for the sites within it."""
    inner, target = headwise.plan(bench, grid, guided), target_of(find(bench.pipe, {"stack", "self_attention"}))
    stack = next(site for site in target.sites if site.kind == "stack")
    place = {site: i for i, site in enumerate(inner.target.sites)}
    rows = (
        tuple(cell if site == stack else row[place[site]] for site in target.sites)
        for cell, row in zip(column, inner.cells, strict=True)
    )
    return ah.Plan(tuple(rows), target, inner.tokens, guided)


def random_grid(seed, column, bench, guided=True):
    """Words for the steps that the column computes, R for the others."""
    computed = sum(isinstance(cell, Attend) for cell in column)
    rows = [row.replace("R", "F") for row in headwise.random_grid(seed, computed, bench, kinds="FFKwxWX")]
    words = iter(rows if guided else headwise.unshared(rows))
    return [next(words) if isinstance(cell, Attend) else " ".join(["R"] * bench.layers) for cell in column]


@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", BENCHES)
@pytest.mark.parametrize("seed", seeds(2))
def test_random_plans_are_what_a_replay_gives(name, guidance, seed):
    bench, guided = BENCHES[name](torch.float64), guidance > 1
    column = random_column(f"levels {name} {seed} {guided}", guided)
    grid = random_grid(seed, column, bench, guided)
    plan = two_levels(bench, column, grid, guided)
    inputs = {"seed": seed, "images": 1 + seed % 2, "guidance": guidance}
    with ah.applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(**inputs))
        summary = run.summary()
    with headwise.remembering(headwise.Memory(bench, guided, headwise.RADII, None), grid), replayed(bench, column, guided):
        wanted = trace(bench, bench.inputs(**inputs))
    assert distance(given, wanted) < 1e-9
    assert summary.notes == ()
    assert summary.cells.total() == STEPS * (bench.layers + 1)
    assert summary.flops.module == pytest.approx(plan.flops().module)
    assert summary.flops.attention == pytest.approx(plan.flops().attention)
    assert summary.peak_cache_bytes == max(plan.cache_bytes(1 + seed % 2, 8))


@pytest.mark.parametrize("name", ["flux", "wan22", "z_image"])
def test_two_levels_of_other_families(name):
    """Compared with a plan of attention alone, under which every block runs and the last one's output is replaced."""
    bench = bench_of(name)
    alone, both = (find(bench.pipe, kinds) for kinds in ({"self_attention"}, {"stack", "self_attention"}))
    draw, switch = random.Random(name), getattr(bench, "switch", None)
    column, cells = random_column(f"levels {name}", switch=switch), {}
    for step, site in product(range(STEPS), alone.sites):
        kinds = [Full(), Arrow(1), *([] if step in (0, switch) else [Arrow(1, residual=True), Cached()])]
        methods = tuple(Full() if step in (0, switch) else draw.choice(kinds) for _ in range(site.heads))
        cells[step, site] = AST if isinstance(column[step], Reuse) else Attend(methods)
    plans, text = [], getattr(bench, "text_seen", bench.text or 7)
    first = getattr(bench, "text_first", alone.family.name == "FLUX.1")
    for model in (alone, both):
        tokens = relevant_tokens(Tokens(bench.visual, text, first, getattr(bench, "frames", 1)), model.sites)
        rows = tuple(tuple(cells.get((step, site), column[step]) for site in model.sites) for step in range(STEPS))
        calls = 2 if model.branch_order == "two_calls" else 1
        plans.append(ah.Plan(rows, target_of(model), tokens, guided=True, calls=calls, switch=switch))
    with ah.applied(bench.pipe, plans[1]) as run:
        given, summary = trace(bench, bench.inputs()), run.summary()
    with ah.applied(bench.pipe, plans[0]), replayed(bench, column, guided=True):
        wanted = trace(bench, bench.inputs())
    assert distance(given, wanted) < 1e-9
    assert summary.flops.module == pytest.approx(plans[1].flops().module)
    assert summary.flops.attention == pytest.approx(plans[1].flops().attention)
    assert plans[1].flops().attention == pytest.approx(plans[0].flops().attention)
    assert summary.peak_cache_bytes == max(plans[1].cache_bytes(1, 8))


def test_full_cells_within_a_stack_change_no_bit():
    bench = tiny(torch.float32)
    untouched = trace(bench, bench.inputs())
    column, grid = [FULL] * STEPS, [" ".join(["F"] * bench.layers)] * STEPS
    with left_as_it_was(bench), ah.applied(bench.pipe, two_levels(bench, column, grid)) as run:
        assert_identical(trace(bench, bench.inputs()), untouched)
        assert run.summary().flops.module == 1


def test_two_levels_are_read_as_they_were_written(tmp_path):
    bench = tiny()
    column = random_column("levels file")
    plan = two_levels(bench, column, random_grid("levels file", column, bench))
    plan.save(tmp_path / "plan.json")
    assert ah.Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("steps", [3, 7, 11])
def test_two_levels_are_carried_over_to_other_steps(steps):
    bench = tiny(torch.float64)
    column = [FULL, FULL, Reuse(0.5), FULL, Reuse(0.7)]
    plan = two_levels(bench, column, random_grid("levels steps", column, bench))
    new = plan.resample(steps)
    stack = next(i for i, site in enumerate(new.target.sites) if site.kind == "stack")
    for row in new.cells:
        others = [cell for i, cell in enumerate(row) if i != stack]
        assert all((cell == AST) == isinstance(row[stack], Reuse) for cell in others)
    with ah.applied(bench.pipe, plan) as run:
        with pytest.warns(PlanAdapted):
            bench.pipe(**bench.inputs(steps=steps))
        assert run.summary().flops.module == pytest.approx(new.flops().module)


@pytest.mark.parametrize(
    ("stack", "inner", "said"),
    [(AST, FULL, "got full for"), (FULL, AST, "got AST for"), (AST, Reuse(1.0), "got extrapolate for")],
)
def test_attention_runs_where_the_stack_does(stack, inner, said):
    bench = tiny()
    column, grid = [FULL, FULL, FULL, FULL, FULL], [" ".join(["F"] * bench.layers)] * STEPS
    plan = two_levels(bench, column, grid)
    place = next(i for i, site in enumerate(plan.target.sites) if site.kind == "stack")
    row = tuple(stack if i == place else inner for i in range(len(plan.target.sites)))
    with pytest.raises(PlanInvalid, match=f"{said}.*wanted AST for it in the steps that the stack skips"):
        ah.Plan((*plan.cells[:4], row), plan.target, plan.tokens, plan.guided)
