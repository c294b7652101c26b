"""The search over two levels: how arrows are judged and chosen, and when they are taken."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from headwise import seen
from pipelines import tiny
from test_stack import STEPS, bench_of, random_column
from torch.utils.flop_counter import FlopCounterMode

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import FULL, Arrow, Attend, Reuse
from arrowhead.searches.stack.levels import carried_on, least_error

EXTENT = ah.Extent(radii=(1, 2, 4))


@pytest.mark.parametrize("seed", range(20))
def test_an_error_counts_where_its_output_is_read(seed):
    column, draw = random_column(f"carried {seed}", guided=False), random.Random(seed)
    gains = [draw.uniform(0.5, 2) for _ in column]

    def final(outputs):
        """The sum of what the stack gives in each step, by the definition of its cells, times the steps' gains."""
        computed, summed = [], 0.0
        for step, cell in enumerate(column):
            if not isinstance(cell, Reuse):
                computed.append(step)
                given = outputs[step]
            else:
                scale, slope = (c[0] if isinstance(c, tuple) else c for c in (cell.scale, cell.extrapolate))
                given = scale * outputs[computed[-1]]
                if slope:
                    i, j = computed[-2:]
                    given += slope * (step - j) * (outputs[j] - outputs[i]) / (j - i)
            summed += gains[step] * given
        return summed

    outputs = [draw.gauss(0, 1) for _ in column]
    for step, grown in carried_on(column, gains).items():
        changed = [value + (i == step) for i, value in enumerate(outputs)]
        assert abs(final(changed) - final(outputs)) / gains[step] == pytest.approx(grown)


@pytest.mark.parametrize("seed", range(20))
def test_arrows_save_what_is_wanted_with_the_least_error(seed):
    draw = np.random.default_rng(seed)
    savings = np.concatenate([np.zeros((2, 1)), draw.uniform(0.1, 1, (2, 2))], 1)
    errors = np.concatenate([np.zeros((3, 2, 1)), draw.uniform(0, 1, (3, 2, 2))], 2)
    wanted = draw.uniform(0, 3 * savings.max(1).sum())
    places = [*product(range(3), range(2))]

    def least(saved):
        sums = (
            (sum(savings[h, c] for (_, h), c in zip(places, chosen, strict=True)), chosen)
            for chosen in product(range(3), repeat=6)
        )
        return min(sum(errors[n, h, c] for (n, h), c in zip(places, chosen, strict=True)) for s, chosen in sums if s >= saved)

    chosen = least_error(errors, savings, wanted)
    error, saved = (
        sum(of(n, h) for n, h in places)
        for of in (lambda n, h: errors[n, h, chosen[n, h]], lambda n, h: savings[h, chosen[n, h]])
    )
    assert saved >= wanted
    beyond = wanted + savings.max()  # heads are taken one after the other
    assert error <= (least(beyond) if beyond <= 3 * savings.max(1).sum() else errors.max(2).sum()) + 1e-9
    assert least_error(errors, savings, 3 * savings.max(1).sum() + 1e-6) is None


def bench_with(values):
    """A pipeline whose attention adds its values times a factor; with 0 an arrow gives what full attention gives."""
    bench = tiny(torch.float32)
    for attention in bench.attentions:
        attention.to_v.weight.data.mul_(values)
    return bench


def counted(pipe, inputs):
    with FlopCounterMode(display=False) as counter:
        pipe(**inputs)
    return counter.get_total_flops()


def searched(bench, steps=8):
    """Two levels, with a little less than five computed steps cost; and these FLOPs."""
    inputs = bench.inputs(steps=steps, images=2)
    skipped = ah.profile(bench.pipe, inputs, progress=False).skipped_flops
    left = (5 + (steps - 5) * skipped) / steps - 0.005
    budget = ah.Budget(transformer_flops=left)
    return ah.search(bench.pipe, inputs, strategy="stack", budget=budget, extent=EXTENT, progress=False), left


def test_arrows_without_an_error_are_bought_and_keep_the_budget():
    bench = bench_with(0.0)
    plan, left = searched(bench)
    about = plan.about["search"]
    assert about["computed"] == 5
    assert [each["arrows"] for each in about["tried"]] == [0, about["arrows"]]
    stack = [i for i, site in enumerate(plan.target.sites) if site.kind == "stack"]
    whole = ah.Plan(
        tuple((row[stack[0]],) for row in plan.cells),
        type(plan.target)(**{**vars(plan.target), "sites": (plan.target.sites[stack[0]],)}),
        plan.tokens.flat,
        plan.guided,
    )
    inputs = bench.inputs(steps=8, images=2)
    raw = counted(bench.pipe, inputs)
    with ah.applied(bench.pipe, whole):
        without = counted(bench.pipe, inputs)
        wanted = bench.pipe(**bench.inputs(steps=8, images=2))[0]
    spared = 0
    for site, column in zip(plan.target.sites, plan.columns, strict=True):
        for cell in column if site.kind == "self_attention" else ():
            for method in cell.methods(site.heads) if isinstance(cell, Attend) else ():
                if isinstance(method, Arrow):
                    hidden = ~seen(bench.visual, bench.visual, method.radius, None)
                    spared += 4 * int(hidden.sum()) * site.head_dim * 4  # two images, two branches
    assert spared > 0
    assert (without - spared) / raw <= left < without / raw
    assert about["transformer_flops"] == pytest.approx((without - spared) / raw, rel=5e-3)
    with ah.applied(bench.pipe, plan):
        torch.testing.assert_close(bench.pipe(**bench.inputs(steps=8, images=2))[0], wanted)


def test_arrows_that_make_the_picture_worse_are_not_taken_and_the_plan_says_so():
    bench = bench_with(1.0)
    plan, left = searched(bench)
    alone = ah.solve(ah.profile(bench.pipe, bench.inputs(steps=8, images=2), progress=False), ah.Budget(transformer_flops=left))
    about = plan.about["search"]
    assert plan.cells == alone.cells
    assert about["arrows"] == 0
    first, *others = about["tried"]
    assert about["generations"] > 1 + len(others)  # arrows were measured
    assert all(each["arrows"] > 0 and each["measured_detail"] > first["measured_detail"] for each in others)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_other_pipelines(name, gradients):
    bench = bench_of(name, torch.float32)
    skipped = ah.profile(bench.pipe, bench.inputs(), progress=False).skipped_flops
    budget = ah.Budget(transformer_flops=(4 + skipped) / STEPS - 0.002, corrections=0)
    extent = ah.Extent(radii=(1,), gradients=gradients)
    plan = ah.search(bench.pipe, bench.inputs(), strategy="stack", budget=budget, extent=extent, progress=False)
    with ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs())
        assert run.summary().flops.module == pytest.approx(plan.flops().module)


@pytest.mark.parametrize(
    ("budget", "extent", "said"),
    [
        (
            ah.Budget(speedup=2.0),
            ah.Extent(),
            "got a budget of speedup=2.0 for a stack with an extent, wanted transformer_flops",
        ),
        (ah.Budget(error=0.1), ah.Extent(), "got a budget of error=0.1"),
        (ah.Budget(transformer_flops=0.5), ah.Extent(kinds=("block",)), "wanted \\('self_attention',\\), or None"),
        (ah.Budget(transformer_flops=0.5), ah.Extent(precisions=("int8",)), "got precisions=.*wanted none"),
        (ah.Budget(transformer_flops=1e-6), ah.Extent(), "at least; allow more"),
    ],
)
def test_what_is_refused(budget, extent, said):
    bench = tiny(torch.float32)
    with pytest.raises(InputsInvalid, match=said):
        ah.search(bench.pipe, bench.inputs(steps=2), strategy="stack", budget=budget, extent=extent, progress=False)


def test_full_budgets_take_nothing():
    bench = tiny(torch.float32)
    inputs, budget = bench.inputs(steps=3), ah.Budget(transformer_flops=1.0)
    plan = ah.search(bench.pipe, inputs, strategy="stack", budget=budget, extent=EXTENT, progress=False)
    assert {cell for row in plan.cells for cell in row} == {FULL}
