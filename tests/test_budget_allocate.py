"""Tables of random products solved for budgets: against all columns there are, and against what plans count."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from budget import SLOPES, column_error, every_column, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import FULL, Attend
from arrowhead.plans.flops import site_flops
from arrowhead.plans.layout import Site
from arrowhead.plans.lifetimes import Writes, of_head
from arrowhead.searches.budget.solver.allocation import within_cost, within_predicted_error
from arrowhead.searches.budget.solver.problem import problem_of
from arrowhead.searches.budget.solver.states import Choices

MEASURES = st.sampled_from(["attention", "module", "transformer"])
MULTIPLIERS = st.sampled_from([0.0, 1e-3, 0.03, 0.3, 3.0, 30.0])


@st.composite
def tables(draw, **fixed):
    """Small ones, over sites of all kinds."""
    sizes = {"steps": draw(st.integers(2, 6)), "count": draw(st.integers(1, 3)), "heads": draw(st.sampled_from([1, 2, 4]))}
    sizes |= {"ages": draw(st.integers(1, 3)), "radii": draw(st.sampled_from([(6,), (12, 3)]))}
    sizes |= {"guided": draw(st.booleans()), "feed_forward": draw(st.booleans()), "text": draw(st.sampled_from([0, 5]))}
    sizes |= {"precisions": draw(st.sampled_from([(), ("int8",)]))}
    table = synthetic(draw(st.integers(0, 2**32)), **sizes | fixed)
    kinds = st.fixed_dictionaries(
        {
            "joint": st.booleans(),
            "separable_heads": st.booleans(),
            "kv_heads": st.sampled_from([None, 1]),
            "weights": st.sampled_from([0, 64]),
            "projects_out": st.sampled_from(["all", "visual", "none"]),
            "head_dim": st.sampled_from([4, 32]),
        }
    )
    chosen = (Site(**vars(site) | draw(kinds)) if site.kind == "self_attention" else site for site in table.target.sites)
    return replace(table, target=replace(table.target, sites=tuple(chosen)))


WHAT = st.fixed_dictionaries({name: st.booleans() for name in ("share_cfg", "residual", "reuse", "extrapolate", "precision")})


def budget_of(measure, value=1.0, **settings):
    return ah.Budget(**{f"{measure}_flops": value, "granularity": "site"} | settings)


def plan_of(table, columns):
    return ah.Plan(tuple(zip(*columns, strict=True)), table.target, table.tokens, table.branches.guided)


def flops(table, columns, measure):
    """What a table's sites leave of the FLOPs; of the transformer's, with all else."""
    left = plan_of(table, columns).flops()
    if measure != "transformer":
        return getattr(left, measure)
    samples = 2 if table.branches.guided else 1
    sites = sum(site_flops(site, table.tokens, FULL, Writes(), samples).module for site in table.target.sites)
    return (left.module * sites + table.other_flops) / (sites + table.other_flops)


def columns_of(offer):
    return [offer.column(site) for site in range(len(offer.cost))]


def site_error(table, site, column):
    """Of heads that do the same throughout together, of others apart."""
    alike = {}
    for place, head in enumerate(table.heads(site)):
        alike.setdefault(of_head(column, place), []).append(head)
    return sum(column_error(table, group, own) for own, group in alike.items())


def every_column_of(table, site, what):
    """All that may be chosen, over three steps."""
    attends, share = site.kind == "self_attention", what["share_cfg"] and table.branches.guided
    precisions = table.precisions if attends and what["precision"] else ()
    radii = table.radii if attends else ()
    slopes = SLOPES if what["extrapolate"] else ()
    choices = Choices(radii, table.ages, share, what["residual"], what["reuse"], slopes, precisions)
    return list(dict.fromkeys(tuple(cell for cell, _ in past.spent) for past in every_column(choices, 3)))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), table=tables(heads=2), measure=MEASURES, what=WHAT)
def test_a_plan_is_within_its_budget_and_counts_what_it_was_said_to(data, table, measure, what):
    problem = problem_of(budget_of(measure, **what), table)
    table, fixed = problem.table, problem.fixed
    budget = data.draw(st.floats(problem.offer(problem.multiplier_of_least_cost).cost.sum() + fixed + 1e-9, 1.0))
    found = within_cost(problem, budget)
    assert flops(table, found.columns, measure) == pytest.approx(found.cost + fixed)
    assert found.cost + fixed <= budget * (1 + 1e-9)
    assert found.error == pytest.approx(sum(site_error(table, i, column) for i, column in enumerate(found.columns)), rel=1e-4)
    assert found.error == pytest.approx(table.predicted_error(found.columns).sum(), rel=1e-4)
    assert found.bound <= found.error * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), table=tables(steps=3, count=2, feed_forward=False), measure=MEASURES, what=WHAT)
def test_the_best_there_is_lies_between_the_bound_and_what_is_found(data, table, measure, what):
    assert_bounded(data, table, measure, what)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), table=tables(steps=3, count=1, feed_forward=True), what=WHAT)
def test_the_best_there_is_where_there_is_a_feed_forward(data, table, what):
    assert_bounded(data, table, "transformer", what)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32), guided=st.booleans(), heads=st.integers(1, 2), what=WHAT)
def test_a_block_or_what_lies_within_it(data, seed, guided, heads, what):
    """Against all columns of a block that computes its attention in full or not at all, and all of the attention alone."""
    table = synthetic(seed, steps=3, count=1, heads=heads, guided=guided, blocks=True)
    problem, (block, attention) = problem_of(budget_of("transformer", **what), table), table.target.sites
    best_of = {}
    for place, site in enumerate(table.target.sites):
        columns = every_column_of(table, site, what)
        plans = [
            ah.Plan(tuple(zip(column, strict=True)), replace(table.target, sites=(site,)), table.tokens, guided)
            for column in columns
        ]
        own = [site_flops(s, table.tokens, FULL, Writes(), 1 + guided).module for s in (block, attention)]
        whole = own[0] + table.other_flops
        left = np.array([1 - (1 - plan.flops().module) * own[place] / whole for plan in plans])
        error = np.array([column_error(table, table.heads(place), column) for column in columns])
        best_of[place] = columns, left, error
    budget = data.draw(st.floats(min(left.min() for _, left, _ in best_of.values()) + 1e-6, 1.0))
    found = within_cost(problem, budget)
    assert sum(column is None for column in found.columns) == 1
    place = next(i for i, column in enumerate(found.columns) if column is not None)
    columns, left, error = best_of[place]
    chosen = columns.index(found.columns[place])
    assert found.cost + problem.fixed == pytest.approx(left[chosen])
    assert found.error == pytest.approx(error[chosen], rel=1e-4)
    assert left[chosen] <= budget * (1 + 1e-9)
    best = min(error[left <= budget * (1 + 1e-9)].min(initial=np.inf) for _, left, error in best_of.values())
    assert found.bound <= best * (1 + 1e-4) + 1e-12
    assert best <= found.error * (1 + 1e-4) + 1e-12
    for multiplier in (0.0, 1e-3, 0.1, 10.0, problem.multiplier_of_least_cost):
        offer = problem.offer(multiplier)
        reached = offer.error[0] + multiplier * (offer.cost[0] + problem.fixed)
        least = min((error + multiplier * left).min() for _, left, error in best_of.values())
        assert reached == pytest.approx(least, rel=1e-4, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), table=tables(steps=3), measure=MEASURES, what=WHAT, lone=st.booleans())
def test_all_sites_in_step(data, table, measure, what, lone):
    """Against every column that all sites can follow together, whose changes are added before they are squared."""
    budget = budget_of(measure, granularity="step", **what)
    table = table.attention_alone() if lone else table
    problem = problem_of(budget, table)
    table, sites = problem.table, problem.table.target.sites
    narrowest = min(sites, key=lambda site: site.kind == "self_attention")  # arrows are for attention alone
    columns = every_column_of(table, narrowest, what)
    heads = [head for site in range(len(sites)) for head in table.heads(site)]
    error = np.array([column_error(table, heads, column) for column in columns])
    cost = np.array([flops(table, [column] * len(sites), measure) for column in columns])
    left = data.draw(st.floats(min(cost.min() + 1e-6, 1.0), 1.0))
    found = within_cost(problem, left)
    assert len(set(found.columns)) == 1
    place = columns.index(found.columns[0])
    assert (found.error, found.cost + problem.fixed) == (pytest.approx(error[place], rel=1e-4), pytest.approx(cost[place]))
    assert cost[place] <= left * (1 + 1e-9)
    best = error[cost <= left * (1 + 1e-9)].min()
    assert found.bound <= best * (1 + 1e-4) + 1e-12
    assert best <= found.error * (1 + 1e-4) + 1e-12
    for multiplier in (0.0, 1e-3, 0.1, 10.0, problem.multiplier_of_least_cost):
        offer = problem.offer(multiplier)
        reached = offer.error[0] + multiplier * (offer.cost[0] + problem.fixed)
        assert reached == pytest.approx((error + multiplier * cost).min(), rel=1e-4, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32), guided=st.booleans(), own=st.integers(0, 3), what=WHAT)
def test_blocks_in_step(data, seed, guided, own, what):
    """They stand for the sites within them, whose changes they make; what they compute besides is theirs to skip."""
    table = synthetic(seed, steps=3, guided=guided, feed_forward=True)
    within = [tuple(site for site in table.target.sites if site.path.startswith(f"blocks.{i}.")) for i in range(2)]
    block = {"separable_heads": False, "kind": "block", "weights": own * 64}
    blocks = tuple(Site(f"blocks.{i}", 1, 16, 16, **block, within=sites) for i, sites in enumerate(within))
    table = replace(table, blocks=blocks)
    problem = problem_of(budget_of("transformer", granularity="step", **what), table)
    assert problem.sites == blocks
    columns, samples = every_column_of(table, blocks[0], what), 1 + guided
    error = np.array([column_error(table, range(table.outputs.shape[1]), column) for column in columns])
    of_sites, of_blocks = (
        sum(site_flops(site, table.tokens, FULL, Writes(), samples).module for site in sites)
        for sites in (table.target.sites, blocks)
    )
    assert of_blocks == of_sites + 2 * own * 2 * 64 * samples * 64
    target = replace(table.target, sites=blocks)
    cost = np.array(
        [
            1 - (1 - ah.Plan(tuple((cell, cell) for cell in column), target, table.tokens, guided).flops().module)
            * of_blocks / (of_sites + table.other_flops)
            for column in columns
        ]
    )  # fmt: skip
    left = data.draw(st.floats(min(cost.min() + 1e-6, 1.0), 1.0))
    plan, found = ah.solve(table, budget_of("transformer", left, granularity="step", **what)), within_cost(problem, left)
    assert plan.target.sites == blocks
    assert plan.columns == found.columns
    place = columns.index(found.columns[0])
    assert (found.error, found.cost + problem.fixed) == (pytest.approx(error[place], rel=1e-4), pytest.approx(cost[place]))
    assert cost[place] <= left * (1 + 1e-9)
    assert found.bound <= error[cost <= left * (1 + 1e-9)].min() * (1 + 1e-4) + 1e-12
    alone = ah.solve(table, budget_of("module", granularity="step", **what))
    assert {site.kind for site in alone.target.sites} == {"self_attention"}


def assert_bounded(data, table, measure, what):
    """Two sites; what one of them costs is known from the other's full attention."""
    problem = problem_of(budget_of(measure, **what), table)
    table, full = problem.table, (FULL,) * 3
    columns, error, cost = [], [], []
    for place, site in enumerate(table.target.sites):
        columns.append(every_column_of(table, site, what))
        error.append(np.array([column_error(table, table.heads(place), column) for column in columns[-1]]))
        both = [[column if i == place else full for i in range(2)] for column in columns[-1]]
        cost.append(np.array([flops(table, own, measure) for own in both]))
    together = cost[0][:, None] + cost[1][None, :] - 1
    budget = data.draw(st.floats(together.min() + 1e-6, 1.0))
    best = (error[0][:, None] + error[1][None, :])[together <= budget * (1 + 1e-9)].min()
    found = within_cost(problem, budget)
    assert found.bound <= best * (1 + 1e-4) + 1e-12
    assert best <= found.error * (1 + 1e-4) + 1e-12
    for multiplier in (0.0, 1e-3, 0.1, 10.0, problem.multiplier_of_least_cost):
        offer = problem.offer(multiplier)
        for place in range(2):
            objective = error[place] + multiplier * cost[place]
            reached = objective[columns[place].index(offer.column(place))]
            assert reached == pytest.approx(objective.min(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("granularity", ["site", "head"])
@pytest.mark.parametrize("measure", ["attention", "module", "transformer"])
def test_large_problems_come_within_a_hundredth_of_their_budget(granularity, measure):
    """From below; and for whole sites near the bound."""
    table = synthetic(3, steps=20, count=10, heads=2, ages=3, feed_forward=measure == "transformer")
    for value in (0.25, 0.4, 0.85):
        budget = budget_of(measure, value, granularity=granularity)
        spent = flops(problem_of(budget, table).table, ah.solve(table, budget).columns, measure)
        assert 0.99 * value <= spent <= value
        if granularity == "site":
            found = within_cost(problem_of(budget, table), value)
            assert found.bound <= found.error <= 1.1 * found.bound


@settings(max_examples=40, deadline=None)
@given(table=tables(), measure=MEASURES, what=WHAT)
def test_the_nearest_budget_that_is_named_can_be_met(table, measure, what):
    """And what is asked for below it is refused."""
    with pytest.raises(InputsInvalid, match="wanted at least") as refusal:
        ah.solve(table, budget_of(measure, 1e-6, **what))
    nearest = float(re.search(r"wanted at least ([0-9.e-]+)", str(refusal.value))[1])
    budget = budget_of(measure, nearest, **what)
    assert flops(problem_of(budget, table).table, ah.solve(table, budget).columns, measure) <= nearest * (1 + 1e-9)
    with pytest.raises(InputsInvalid, match="wanted at least"):
        ah.solve(table, budget_of(measure, 0.99 * nearest, **what))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularity", ["site", "head"])
def test_more_may_be_spent_less_is_lost(seed, granularity):
    table = synthetic(seed, steps=6, count=4, heads=4, radii=(12, 4), feed_forward=True)
    budgets = [budget_of("transformer", value, granularity=granularity) for value in (0.3, 0.45, 0.6, 0.8, 1.0)]
    plans = ah.sweep(table, budgets)
    assert [plan.cells for plan in plans] == [ah.solve(table, budget).cells for budget in budgets]
    errors = [plan.about["search"]["predicted_error"] for plan in plans]
    assert all(more > less for more, less in pairwise(errors))
    assert errors[-1] == 0
    assert plans[-1].flops().module == 1


@settings(max_examples=40, deadline=None)
@given(table=tables(), measure=MEASURES, what=WHAT, multiplier=MULTIPLIERS)
def test_heads_on_their_own_are_never_worse_than_whole_sites(table, measure, what, multiplier):
    whole = problem_of(budget_of(measure, **what), table).offer(multiplier)
    heads = table.target.sites[0].heads
    for granularity in ["head", *(n for n in (1, 2, 4) if heads % n == 0)]:
        problem = problem_of(budget_of(measure, granularity=granularity, **what), table)
        apart = problem.offer(multiplier)
        assert (apart.error + multiplier * apart.cost <= (whole.error + multiplier * whole.cost) * (1 + 1e-9) + 1e-12).all()
        assert apart.cost.sum() + problem.fixed == pytest.approx(flops(problem.table, columns_of(apart), measure))


def assert_error_is_of_its_columns(problem, offer, size):
    """Groups of `size` heads taken apart, or the whole site where its heads all do the same."""
    table = problem.table
    for site, column in enumerate(columns_of(offer)):
        heads = table.heads(site)
        groups = [heads[start : start + size] for start in range(0, len(heads), size)]
        apart = sum(column_error(table, group, of_head(column, group[0] - heads[0])) for group in groups)
        whole = [column_error(table, heads, column)] if len({of_head(column, h) for h in range(len(heads))}) == 1 else []
        assert any(offer.error[site] == pytest.approx(value, rel=1e-4, abs=1e-12) for value in (apart, *whole))


@settings(max_examples=40, deadline=None)
@given(table=tables(), what=WHAT, multiplier=MULTIPLIERS)
def test_an_offer_s_error_is_what_its_columns_do(table, what, multiplier):
    for granularity, size in (("head", 1), ("site", table.target.sites[0].heads)):
        problem = problem_of(budget_of("transformer", granularity=granularity, **what | {"share_cfg": False}), table)
        assert_error_is_of_its_columns(problem, problem.offer(multiplier), size)


@pytest.mark.parametrize("seed", range(4))
def test_an_offer_s_error_is_what_its_columns_do_where_branches_are_shared(seed):
    """Heads that are cached in a shared step serve both branches with the conditional one's."""
    problem = problem_of(budget_of("module", granularity="head"), synthetic(seed, 8, 3, 4, ages=3, uneven=True))
    for multiplier in (0.1, 0.3, 1.0, 3.0):
        assert_error_is_of_its_columns(problem, problem.offer(multiplier), 1)


def test_what_is_reused_after_a_shared_step_serves_both_branches():
    """A head that is cached in a shared step, and all of the site reused in the next: the module's output was one for both.

    The first head can be repeated for nothing, but not shared in the first or the last step; the second one can be an arrow
    that is shared in the step between, and be repeated after that.
    """
    table = synthetic(0, steps=3, count=1, ages=2)
    outputs, residuals = torch.zeros_like(table.outputs), torch.zeros_like(table.residuals)  # (S, H, [radii,] ages, pairs, M)
    outputs[0, 0, :, 2] = outputs[2, 0, :, 2] = residuals[2, 0, ..., 0, :] = 10
    outputs[1, 1, 1, 0] = outputs[2, 1, 2, 0] = outputs[2, 1, 1, 1] = residuals[1, 1, 0, 0, 1] = 10
    table = replace(table, outputs=outputs, residuals=residuals, sampler_gains=(1.0,) * 3, final=1.0, elements=1)
    problem = problem_of(budget_of("module", granularity="head"), table)
    for multiplier in (0.1, 1.0, 10.0):
        assert_error_is_of_its_columns(problem, problem.offer(multiplier), 1)


@pytest.mark.parametrize("granularity", [0, 3, 8, -1, 1.5, "heads", True], ids=repr)
def test_groups_that_do_not_divide_a_site_s_heads(granularity):
    with pytest.raises(InputsInvalid, match=r"granularity=.*wanted"):
        ah.solve(synthetic(0, heads=4), ah.Budget(module_flops=0.5, granularity=granularity))


def test_groups_do_the_same():
    table = synthetic(1, steps=8, count=3, heads=6, uneven=True)
    plan = ah.solve(table, ah.Budget(module_flops=0.5, granularity=2))
    cells = [cell.methods(6) for row in plan.cells for cell in row if isinstance(cell, Attend)]
    assert all(methods[h] == methods[h + 1] for methods in cells for h in (0, 2, 4))
    assert any(len(set(methods)) > 1 for methods in cells)


@settings(max_examples=25, deadline=None)
@given(table=tables(), share=st.floats(0.01, 1.0))
def test_within_a_predicted_error(table, share):
    """The limit is kept to, and a smaller one costs no less."""
    problem = problem_of(budget_of("transformer"), table)
    worst = problem.offer(problem.multiplier_of_least_cost).error.sum()
    tight, loose = within_predicted_error(problem, 0.5 * share * worst), within_predicted_error(problem, share * worst)
    assert tight.error <= 0.5 * share * worst
    assert loose.error <= share * worst
    assert loose.cost <= tight.cost
    assert loose.cost + problem.fixed == pytest.approx(flops(table, loose.columns, "transformer"))
    nothing = within_predicted_error(problem, 0.0)
    assert nothing.error == 0.0
    assert nothing.cost + problem.fixed == pytest.approx(1.0)
