"""A table solved at the public door: what may be chosen, what is counted, what a plan says of itself."""

from dataclasses import replace

import pytest
import torch
from budget import synthetic

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import AST, FULL, Reuse


def test_what_may_not_be_chosen_is_not():
    table = synthetic(5, steps=8, count=4, heads=2, radii=(12, 4))
    assert {"full", "WA-RS", "cached"} < set(ah.solve(table, ah.Budget(module_flops=0.4, granularity="head")).count_heads())
    in_step = ah.solve(table, ah.Budget(module_flops=0.4))
    assert all(len(set(row)) == 1 for row in in_step.cells)
    assert len(set(in_step.cells)) > 1
    assert not {"AST", "cached"} & set(ah.solve(table, ah.Budget(module_flops=0.6, reuse=False)).count_heads())
    assert "WA-RS" not in ah.solve(table, ah.Budget(module_flops=0.4, residual=False)).count_heads()
    eight = synthetic(5, steps=8, count=4, heads=2, radii=(12, 4), precisions=("int8",))
    used = [set(ah.solve(eight, ah.Budget(attention_flops=0.5, precision=may)).count_heads()) for may in (True, False)]
    assert [any("int8" in name for name in names) for names in used] == [True, False]
    without = replace(eight, precisions=(), quantisation_errors=None)
    half = ah.Budget(attention_flops=0.5)
    assert ah.solve(eight, replace(half, precision=False)).cells == ah.solve(without, half).cells
    bare = synthetic(1, steps=8, count=3, heads=3, radii=(), ages=6)
    even = replace(bare, outputs=bare.outputs * 0.01 + torch.arange(7.0).view(1, 1, -1, 1, 1))
    for slopes in ((0.5, 0.75, 1.0), (0.3,), ()):
        plan = ah.solve(even, ah.Budget(module_flops=0.4, slopes=slopes, granularity="site"))
        taken = {cell.extrapolate for row in plan.cells for cell in row if isinstance(cell, Reuse)} - {0.0}
        assert taken <= set(slopes)
        assert bool(taken) == bool(slopes)
    alone = ah.solve(table, ah.Budget(module_flops=0.4, share_cfg=False))
    assert not any(getattr(cell, "share_cfg", False) for row in alone.cells for cell in row)
    unguided = ah.solve(synthetic(5, guided=False), ah.Budget(module_flops=0.5))
    assert not any(getattr(cell, "share_cfg", False) for row in unguided.cells for cell in row)


def test_a_budget_of_error_is_not_for_a_table_alone():
    with pytest.raises(InputsInvalid, match=r"error=0.1.*wanted FLOPs"):
        ah.solve(synthetic(0), ah.Budget(error=0.1))


def test_a_plan_says_how_it_was_found():
    table = replace(synthetic(0, guided=True, calls=2), about={"pipeline": "Pipe", "search": {"ages": 2}})
    plan = ah.solve(table, ah.Budget(attention_flops=0.5, granularity="site"))
    assert (plan.calls, plan.guided, plan.tokens, plan.target) == (2, True, table.tokens, table.target)
    search = plan.about["search"]
    assert {"strategy": "budget", "asked": "attention_flops = 0.5", "granularity": "site", "ages": 2}.items() <= search.items()
    assert search["attention_flops"] == pytest.approx(plan.flops().attention, rel=5e-3)
    assert search["predicted_error"] == pytest.approx(table.predicted_error(plan.columns).sum() ** 0.5, rel=5e-3)
    assert plan.about["pipeline"] == "Pipe"


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("guided", [True, False])
def test_attention_alone(guided, calls):
    """Feed-forwards are then among all else that the transformer computes."""
    table = synthetic(2, feed_forward=True, guided=guided, calls=calls)
    alone = table.attention_alone()
    assert [site.path for site in alone.target.sites] == ["blocks.0.attn", "blocks.1.attn"]
    assert torch.equal(alone.outputs, table.outputs[:, [0, 1, 3, 4]])
    assert torch.equal(alone.residuals, table.residuals[:, [0, 1, 3, 4]])
    assert alone.other_flops == table.other_flops + 2 * (1 + guided) * 2 * 64 * 16 * 16 * 8
    column = [[FULL, AST, FULL, FULL, AST, FULL], [FULL] * 6]
    beside = [column[0], [FULL] * 6, column[1], [FULL] * 6]
    assert alone.predicted_error(column).tolist() == table.predicted_error(beside).tolist()


def test_a_budget_of_attention_leaves_feed_forwards_alone():
    table = synthetic(2, feed_forward=True)
    paths = [
        [site.path for site in ah.solve(table, ah.Budget(**{f"{m}_flops": 0.6, "granularity": "site"})).target.sites]
        for m in ("module", "transformer")
    ]
    assert [len(of) for of in paths] == [2, 4]


def test_where_nothing_has_an_error():
    table = synthetic(0)
    for gains in ((0.0,) * table.steps, (1e-300,) * table.steps):
        plan = ah.solve(replace(table, sampler_gains=gains), ah.Budget(module_flops=0.6, granularity="site"))
        assert plan.flops().module <= 0.6
