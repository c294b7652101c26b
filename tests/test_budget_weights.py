"""A calibration without gradients: single sites tried in passes of their own, and weights fitted to that."""

import math
import random

import pytest
import torch
from budget import FAMILIES, column_error
from hypothesis import given, settings
from hypothesis import strategies as st
from outside import Seen, site_modules
from pipelines import dit
from test_budget_search import nothing_left
from test_budget_table import FAR, NEAR, STEPS, every_family, squared, with_and_without

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import AST, FULL
from arrowhead.searches.budget.sensitivity.probes import SiteProbes
from arrowhead.searches.budget.sensitivity.recording import record

WITHOUT = {"radii": (NEAR, FAR), "ages": STEPS, "gradients": False}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 20), sites=st.integers(1, 20), level=st.floats(-5, 5))
def test_what_is_a_product_of_step_and_site_is_found_again(seed, steps, sites, level):
    """Half of all pairs tried; steps that differ little from those beside them."""
    draw = random.Random(seed)
    of_step = [level + math.sin(step / 6) for step in range(steps)]
    of_site = [draw.uniform(-0.5, 0.5) for _ in range(sites)]
    weights = SiteProbes(sites)
    for step in range(steps):
        for site in range(sites):
            if (step + site) % 2 or min(steps, sites) < 2:
                weights.note(step, site, math.exp(of_step[step] + of_site[site]))
    for nothing in (0.0, math.inf, math.nan):
        weights.note(0, 0, nothing)
    found = weights.fitted(steps)
    truth = torch.tensor([[math.exp(a + b) for b in of_site] for a in of_step], dtype=torch.float64)
    assert found.shape == truth.shape
    assert (found / truth).log().abs().max() < 0.5
    assert (found / truth).log().square().mean().sqrt() < 0.25


def test_nothing_tried_is_nothing_learnt():
    assert torch.equal(SiteProbes(3).fitted(4), torch.ones(4, 3, dtype=torch.float64))


def test_a_pass_tries_as_many_sites_as_it_can():
    weights = SiteProbes(5)
    for count in (1, 3, 5):
        assert len(set(weights.chosen(count))) == count
    assert sorted(weights.chosen(10)) == sorted([*range(5)] * 2)
    assert len({tuple(weights.chosen(5)) for _ in range(20)}) > 1


@pytest.fixture
def trials(monkeypatch):
    """What was noted: (step, site, weight)."""
    noted, own = [], SiteProbes.note

    def note(self, step, site, weight):
        noted.append((step, site, weight))
        own(self, step, site, weight)

    monkeypatch.setattr(SiteProbes, "note", note)
    return noted


def guided(bench, rows, guidance):
    if guidance <= 1:
        return rows
    first, second = rows.chunk(2)
    c, u = (first, second) if bench.conditional_first else (second, first)
    return u + guidance * (c - u)


@every_family
@with_and_without
@pytest.mark.parametrize("images", [1, 3])
def test_trials_are_what_a_site_s_last_output_makes_of_the_step(family, guidance, images, trials, monkeypatch):
    """Against the same change made by hand in a pass of its own, images one by one."""
    bench, chosen, own = FAMILIES[family](), [], SiteProbes.chosen
    monkeypatch.setattr(SiteProbes, "chosen", lambda self, count: chosen.append(own(self, count)) or chosen[-1])
    inputs = bench.inputs(0, images, guidance, STEPS)
    ah.calibrate(bench.pipe, inputs, extent=ah.Extent(**WITHOUT), progress=False)
    seen, paths = Seen.run(bench, (NEAR, FAR), guidance, seed=0, steps=STEPS, images=images), list(site_modules(bench))
    passes = -(-4 // images)
    assert len(chosen) == passes * (STEPS - 1)
    tried = [
        (step, image, place)
        for step in range(1, STEPS)
        for which in chosen[(step - 1) * passes :][:passes]
        for image, place in enumerate(which)
    ]
    wanted = []
    for step, image, place in tried:
        before, now = (seen.full[at][paths[place]] for at in (step - 1, step))
        change = torch.zeros_like(now)
        change[image::images] = (before - now)[image::images]
        if not change.any():
            continue
        output = seen.guided(step, {})[image]
        response = (seen.guided(step, {paths[place]: change})[image] - output).norm() / output.norm()
        relative = guided(bench, change, guidance)[image].norm() / guided(bench, now, guidance)[image].norm()
        wanted.append((step, place, (response / relative).item()))
    assert [trial[:2] for trial in trials] == [trial[:2] for trial in wanted]
    assert [weight for *_, weight in trials] == pytest.approx([weight for *_, weight in wanted], rel=1e-3)
    assert len(wanted) >= STEPS


@every_family
@pytest.mark.parametrize("guidance", [3.0, pytest.param(1.0, marks=pytest.mark.slow)], ids=["guided", "alone"])
def test_errors_are_weighted_squares_of_the_change(family, guidance, monkeypatch):
    """Of 3 images and 200 vectors to a third: gain · weight · how much of the site's output changes · the output's length."""
    bench, images, weight = FAMILIES[family](), 3, 1.7
    monkeypatch.setattr(SiteProbes, "fitted", lambda self, steps: torch.full((steps, self._sites), weight, dtype=torch.float64))
    inputs = bench.inputs(0, images, guidance, STEPS)
    table = ah.calibrate(bench.pipe, inputs, extent=ah.Extent(**WITHOUT, vectors=200), progress=False)
    seen = Seen.run(bench, (NEAR, FAR), guidance, seed=0, steps=STEPS, images=images)
    for place, path in enumerate(site_modules(bench)):
        if (family, place) == ("pixart_sigma", 0):
            continue  # no text has come in before: its branches are the same, and guidance takes their difference
        for step in range(1, STEPS):
            column = [FULL] * step + [AST] + [FULL] * (STEPS - step - 1)
            length = seen.guided(step, {}).flatten(1).norm(dim=1)
            before, now = (guided(bench, seen.full[at][path], guidance) for at in (step - 1, step))
            relative = (before - now).flatten(1).norm(dim=1) / now.flatten(1).norm(dim=1)
            wanted = (table.sampler_gains[step] * weight * relative * length).square().mean().item() / squared(seen)
            assert column_error(table, table.heads(place), column) == pytest.approx(wanted, rel=0.35, abs=1e-12)


@every_family
@with_and_without
def test_the_run_is_the_untouched_one_and_needs_no_gradients(family, guidance):
    with torch.inference_mode():
        bench = FAMILIES[family]()
        inputs = {"images": 2, "guidance": guidance, "steps": STEPS}
        with nothing_left(bench, **inputs):
            recording = record(driver_of(bench.pipe, bench.inputs(**inputs)), ah.Extent(**WITHOUT))
    assert recording.passes == STEPS + (STEPS - 1) * 2 + (guidance > 1 and family == "flux")
    with_gradients = ah.calibrate(FAMILIES[family]().pipe, bench.inputs(**inputs), extent=ah.Extent(ages=2), progress=False)
    assert recording.table.other_flops == with_gradients.other_flops
    assert recording.table.final == pytest.approx(with_gradients.final)


@every_family
def test_a_search_without_gradients_meets_its_budget(family):
    bench = FAMILIES[family]()
    budget = ah.Budget(transformer_flops=0.6)
    plan = ah.search(bench.pipe, bench.inputs(), budget=budget, extent=ah.Extent(gradients=False), progress=False)
    assert 0.5 < plan.about["search"]["transformer_flops"] <= 0.6
    assert plan.about["search"]["measured_error"] > 0


def test_weights_that_no_gradient_goes_through_need_none():
    with torch.inference_mode():
        bench = FAMILIES["dit"]()
    before = [weight.requires_grad for weight in bench.pipe.transformer.parameters()]
    table = ah.calibrate(bench.pipe, bench.inputs(), extent=ah.Extent(gradients=False), progress=False)
    assert table.outputs.any()
    assert [weight.requires_grad for weight in bench.pipe.transformer.parameters()] == before


def test_nothing_is_kept_for_a_way_back_that_there_is_not():
    with pytest.raises(InputsInvalid, match=r"checkpoint=True without gradients.*wanted"):
        ah.Extent(checkpoint=True, gradients=False)


def test_every_head_counts_where_the_output_has_a_variance():
    """Of the output only the latents' channels are a direction to go; a site's heads are no channels."""
    bench = dit(torch.float32, learned_sigma=True, num_attention_heads=6)
    table = ah.calibrate(bench.pipe, bench.inputs(steps=3), extent=ah.Extent(gradients=False), progress=False)
    changed = table.outputs[1:, :, 1].flatten(2).abs().amax(-1)  # from the second step on, by the output before: (S − 1, H)
    of_attention = [head for site, head in heads_of(table) if site.kind == "self_attention"]
    assert bench.pipe.transformer.config.in_channels < 6
    assert (changed[:, of_attention] > 0).all()


def heads_of(table):
    """Every head of every site, in the order of a table."""
    return [(site, head) for head, site in enumerate(site for site in table.target.sites for _ in range(site.heads))]
