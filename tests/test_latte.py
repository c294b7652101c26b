"""Latte's transformer with its adapter, so that attention along time is compressed, too."""

import pytest
import torch
from families import latte
from family_replay import RADII, random_cells, replaying
from replay import assert_identical, distance, trace
from test_families import STEPS, plan_of
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.models.custom import CustomModel
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL
from arrowhead.searches.headwise import Headwise

FRAMES = 7  # more than the radii cover
with_and_without = pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])


def described(guidance):
    bench, adapter = latte(frames=FRAMES), ah.latte(guidance_scale=guidance)
    return bench, adapter, find(CustomModel(bench.pipe.transformer, adapter))


def test_every_self_attention_is_a_site():
    bench, _, model = described(3.0)
    seen = []
    for site, module in model.modules.items():
        own = module.forward
        module.forward = lambda x, *args, own=own, site=site, **kwargs: seen.append((site, *x.shape)) or own(x, *args, **kwargs)
    bench.pipe(**bench.inputs(images=2, steps=1))
    places = bench.visual // FRAMES
    rows = {"space": (2 * 2 * FRAMES, places), "time": (2 * 2 * places, FRAMES)}
    assert {entry[0].path: entry[1:3] for entry in seen} == {site.path: rows[site.over] for site in model.sites}
    named = [path for path, _ in bench.pipe.transformer.named_modules() if path.endswith(".attn1")]
    assert [site.path for site in model.sites] == named
    assert [site.over for site in model.sites] == ["space"] * 2 + ["time"] * 2


@with_and_without
@pytest.mark.parametrize("seed", range(3))
def test_random_plans_are_what_a_replay_gives(guidance, seed):
    bench, adapter, model = described(guidance)
    transformer, guided, inputs = bench.pipe.transformer, guidance > 1, {"images": 2, "guidance": guidance, "seed": seed}
    untouched = trace(bench, bench.inputs(**inputs))
    full = plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guided)
    with left_as_it_was(bench, **inputs), ah.applied(transformer, full, adapter):
        assert_identical(trace(bench, bench.inputs(**inputs)), untouched)
    cells = random_cells(seed, model.sites, STEPS, guided)
    plan = plan_of(bench, model, cells, guided)
    with ah.applied(transformer, plan, adapter) as run:
        given = trace(bench, bench.inputs(**inputs))
        assert run.summary().notes == ()
        assert run.summary().flops.module == pytest.approx(plan.flops().module)
    with replaying(bench, model.modules, cells, guided) as sites:
        assert distance(given, trace(bench, bench.inputs(**inputs))) < 1e-5
    assert all(site.passed == STEPS for site in sites)
    assert distance(given, untouched) > 1e-2


@pytest.mark.parametrize(
    "how",
    [
        {"threshold": 0.7},
        {"strategy": Headwise(radii=RADII, share_cfg=True, residual=True), "threshold": 0.7},
        {"budget": ah.Budget(module_flops=0.6)},
    ],
    ids=["greedy", "headwise", "budget"],
)
@with_and_without
def test_searches_compress_both(how, guidance):
    bench, adapter, model = described(guidance)
    transformer, inputs = bench.pipe.transformer, {"images": 2, "guidance": guidance}

    def generate():
        return bench.pipe(**bench.inputs(**inputs)).frames

    with left_as_it_was(bench, **inputs):
        plan = ah.search(transformer, generate, adapter=adapter, progress=False, **how)
    assert {*plan.target.sites} == {*model.sites}
    assert [site.over for site in plan.target.sites] == ["space", "time"] * (len(model.sites) // 2)  # as the blocks run
    over = zip(plan.target.sites, plan.columns, strict=True)
    assert {site.over for site, column in over if set(column) != {FULL}} == {"space", "time"}
    with ah.applied(transformer, plan, adapter) as run:
        video = generate()
        assert run.summary().flops.attention == pytest.approx(plan.flops().attention)
        assert run.summary().notes == ()
    assert not torch.equal(video, generate())
