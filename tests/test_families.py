"""The essential contracts of every family other than DiT, PixArt, SD3 and FLUX, on diffusers' classes."""

import pytest
import torch
from budget import final_latents
from families import MORE
from family_replay import RADII, random_cells, replaying
from image_benches import IMAGES
from replay import assert_identical, distance, trace
from seeds import seeds
from torch.utils.flop_counter import FlopCounterMode
from untouched import left_as_it_was
from video_benches import VIDEO

import arrowhead as ah
from arrowhead.models.families import FAMILIES
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL
from arrowhead.plans.flops import projection_flops
from arrowhead.plans.layout import ALL_KINDS, ATTENTION_KINDS, Tokens
from arrowhead.searches.headwise import Headwise

STEPS = 5
INNER = ALL_KINDS - {"block"}
every_family = pytest.mark.parametrize("name", MORE)
SOONER = "wan22", "lumina2", "mochi", "z_image", "aura_flow"  # two transformers, grouped heads, by sample, lists, one batch
budgeted_families = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOONER else pytest.mark.slow) for name in MORE]
)
NEWER = {*VIDEO, *IMAGES}


def fewer(name, now):
    """The marks of a case: for families that others resemble, some cases are slow tests."""
    return [pytest.mark.slow] if name in NEWER and not now else []


with_and_without = pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])


every_family_with_and_without = pytest.mark.parametrize(
    ("name", "guidance"),
    [
        pytest.param(name, guidance, id=f"{'guided' if guidance > 1 else 'unguided'}-{name}", marks=fewer(name, guidance > 1))
        for guidance in (3.0, 1.0)
        for name in MORE
    ],
)


def plan_of(bench, model, cells, guided=True):
    text = bench.text if all(site.kind == "self_attention" for site in model.sites) else bench.text_seen
    tokens = Tokens(bench.visual, text, bench.text_first, bench.frames)
    calls = 2 if guided and bench.two_calls else 1
    return ah.Plan(tuple(map(tuple, cells)), target_of(model), tokens, guided, calls=calls, switch=bench.switch)


def test_every_family_has_a_bench():
    tested = {type(make().pipe.transformer).__name__ for make in MORE.values()}
    assert tested == {family.transformer for family in FAMILIES if family.tested == "essentials"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{dtype}-{name}", marks=fewer(name, dtype == torch.bfloat16))
        for dtype in (torch.float32, torch.bfloat16)
        for name in MORE
    ],
)
@with_and_without
def test_a_full_plan_changes_no_bit(name, guidance, dtype):
    bench = MORE[name](dtype)
    model = find(bench.pipe, INNER)
    inputs = {"images": 2, "guidance": guidance}
    untouched = trace(bench, bench.inputs(**inputs))
    with (
        left_as_it_was(bench, **inputs),
        ah.applied(bench.pipe, plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guidance > 1)) as run,
    ):
        assert_identical(trace(bench, bench.inputs(**inputs)), untouched)
        assert run.summary().notes == ()


@every_family_with_and_without
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(ATTENTION_KINDS, id="attention", marks=pytest.mark.slow),
        pytest.param(INNER, id="modules"),
        pytest.param({"block"}, id="blocks"),
    ],
)
@pytest.mark.parametrize("seed", seeds(3))
def test_random_plans_are_what_a_replay_gives(name, guidance, kinds, seed):
    bench = MORE[name]()
    if kinds == {"block"} and not next(f for f in FAMILIES if f.transformer == type(bench.pipe.transformer).__name__).has(
        "block"
    ):
        pytest.skip("has no blocks that are sites")
    model = find(bench.pipe, kinds)
    cells, inputs = (
        random_cells(seed, model.sites, STEPS, guidance > 1, bench.switch),
        {"seed": seed, "images": 1 + seed, "guidance": guidance},
    )
    plan = plan_of(bench, model, cells, guidance > 1)
    with ah.applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(**inputs))
        summary = run.summary()
    with replaying(bench, model.modules, cells, guidance > 1) as sites:
        wanted = trace(bench, bench.inputs(**inputs))
    assert distance(given, wanted) < 1e-5
    assert distance(given, trace(bench, bench.inputs(**inputs))) > 1e-2
    # every site is reached, in every call
    assert all(site.passed == bench.loops * len(site.column) * plan.calls for site in sites)
    assert sum(summary.cells.values()) == bench.loops * STEPS * len(model.sites) * plan.calls
    assert summary.notes == ()
    assert summary.flops.module == pytest.approx(plan.flops().module)
    assert summary.peak_cache_bytes == max(plan.cache_bytes(1 if bench.single else 1 + seed, 8))


@every_family
def test_what_sites_multiply_is_what_torch_counts(name, monkeypatch):
    """Linear layers alone: attention itself gives zeros here, so that its products are not counted."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.zeros_like(query))
    bench = MORE[name]()
    model, counted = find(bench.pipe, ALL_KINDS), {}
    tokens = Tokens(bench.visual, bench.text_seen, bench.text_first, bench.frames)
    rows = 1 if bench.two_calls else 2

    def measured(site, own):
        def forward(*args, **kwargs):
            with FlopCounterMode(display=False) as counter:
                out = own(*args, **kwargs)
            counted.setdefault(site, counter.get_total_flops() / rows)
            return out

        return forward

    for site, module in model.modules.items():
        module.forward = measured(site, module.forward)
    bench.pipe(**bench.inputs(steps=2))  # Mochi's schedule needs two
    for site, module in model.modules.items():
        del module.forward
        attended = sum(
            4 * s.head_dim * tokens.visual * tokens.text for s in (site, *site.within) if s.kind == "cross_attention"
        )
        layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]
        of_samples = [layer for name, layer in layers if site.kind == "block" and ("norm" in name or "_mod" in name)]
        once = sum(2 * layer.in_features * layer.out_features for layer in of_samples)
        assert counted[site] == pytest.approx(projection_flops(site, tokens, site.heads) - attended + once), site.path


@every_family_with_and_without
@pytest.mark.parametrize(
    "strategy", ["greedy", Headwise(radii=RADII, share_cfg=True, residual=True)], ids=["greedy", "headwise"]
)
def test_searches_compress_and_their_plans_run(name, strategy, guidance):
    bench, inputs = MORE[name](), {"images": 2, "guidance": guidance}
    with left_as_it_was(bench, **inputs):
        plan = ah.search(bench.pipe, bench.inputs(**inputs), strategy=strategy, threshold=0.7, progress=False)
    assert plan.tokens == bench.tokens
    assert plan.flops().module < 1  # residuals may cost more of attention than bands save
    with ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs(**inputs))
        assert run.summary().flops.attention == pytest.approx(plan.flops().attention)
        assert run.summary().notes == ()


@budgeted_families
@with_and_without
def test_a_budget_is_met(name, guidance):
    bench, inputs = MORE[name](), {"images": 2, "guidance": guidance}
    asked = "transformer_flops" if find(bench.pipe).family.has("feed_forward") else "module_flops"
    with left_as_it_was(bench, **inputs):
        how = {"strategy": "budget", "budget": ah.Budget(**{asked: 0.6})}
        plan = ah.search(bench.pipe, bench.inputs(**inputs), **how, progress=False)
    assert 0 < plan.about["search"][asked] <= 0.6
    raw = final_latents(bench, bench.inputs(**inputs))
    with ah.applied(bench.pipe, plan) as run:
        left = final_latents(bench, bench.inputs(**inputs))
        assert run.summary().flops.module == pytest.approx(plan.flops().module)
        assert run.summary().notes == ()
    error = ((left - raw).norm() / raw.norm()).item()
    assert plan.about["search"]["measured_error"] == pytest.approx(error, rel=1e-2)
    assert error > 0


def test_predicted_errors_do_not_depend_on_the_variance():
    """Latte's sampler uses the first 4 of 8 output channels: the weights of the others may be anything."""
    tables = []
    for size in (1.0, 100.0):
        bench = MORE["latte"]()
        weights = bench.pipe.transformer.proj_out.weight.data.unflatten(0, (-1, 8))  # patches, channels
        weights[:, 4:] *= size
        tables.append(ah.calibrate(bench.pipe, bench.inputs(), progress=False))
    torch.testing.assert_close(tables[0].outputs, tables[1].outputs)
    assert tables[0].outputs.any()


def test_each_frame_is_a_sequence():
    """Latte's frames attend to one another in temporal blocks alone, which are no sites."""
    bench = MORE["latte"]()
    seen = []
    for site, module in find(bench.pipe).modules.items():
        own = module.forward
        module.forward = lambda x, *args, own=own, site=site, **kwargs: seen.append((site, *x.shape)) or own(x, *args, **kwargs)
    bench.pipe(**bench.inputs(images=2, steps=1))
    assert seen == [
        (site, 2 * 2 * bench.frames, bench.visual // bench.frames, site.channels) for site in find(bench.pipe).sites
    ]
    assert {site.path for site in find(bench.pipe).sites} == {f"transformer_blocks.{i}.attn1" for i in range(2)}
