"""Plans on modules of one's own: OpenSora's STDiT2 by its facts, fused or by torch's attention, over any loop."""

import os
import runpy
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from family_replay import RADII, random_cells
from own import Own, STDiT2, left_alone, replaying
from torch.utils.flop_counter import FlopCounterMode

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.errors import AlreadyApplied, GenerationUnfinished, PlanMismatch
from arrowhead.models.custom import CustomModel as StandIn
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Arrow, Attend
from arrowhead.plans.flops import full_flops
from arrowhead.plans.layout import ATTENTION_KINDS
from arrowhead.searches.greedy import greedy_search
from arrowhead.searches.headwise import Headwise

SEPARATE = ah.Adapter(
    {r"blocks\.\d+\.attn": ah.Attention(over="space"), r"blocks\.\d+\.attn_temp": ah.Attention(over="time")},
    tokens=ah.open_sora().tokens,
    cfg="two_calls",
    feed_forward=r"blocks\.\d+\.mlp",
    guidance_scale=3.0,
    latent_channels=4,
)


def fused(dtype=torch.float64, temporal=False, cfg="cond_first", **more):
    """OpenSora's adapter on a stand-in of it."""
    adapter = replace(ah.open_sora(guidance_scale=3.0, temporal=temporal), cfg=cfg)
    return Own(STDiT2().to(dtype), adapter, **more)


def separate(dtype=torch.float64, **more):
    """Both kinds of attention by torch's function, under a name that a module may have for it; two calls a step."""
    return Own(STDiT2(fused=False).to(dtype), SEPARATE, **more)


MODELS = {
    "opensora": fused,
    "with temporal": lambda dtype=torch.float64: fused(dtype, temporal=True),
    "without guidance": lambda dtype=torch.float64: fused(dtype, cfg=None, temporal=True),
    "two calls": separate,
}
every_model = pytest.mark.parametrize("name", MODELS)


def plan_of(own, cells, kinds=ATTENTION_KINDS):
    model = find(StandIn(own.model, own.adapter), kinds)
    return ah.Plan(tuple(map(tuple, cells)), target_of(model), own.tokens, own.guided, calls=own.calls)


def sites_of(own, kinds=ATTENTION_KINDS):
    return find(StandIn(own.model, own.adapter), kinds).sites


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_call", [False, True], ids=["forward", "call"])
def test_a_full_plan_changes_no_bit(name, dtype, by_call):
    own = MODELS[name](dtype)
    untouched, before = own.sample(by_call=by_call), left_alone(own.model)
    plan = plan_of(own, [[FULL] * len(sites_of(own))] * own.steps)
    with ah.applied(own.model, plan, own.adapter) as run:
        assert torch.equal(own.sample(by_call=by_call), untouched)
        assert sum(run.summary().cells.values()) == len(plan.target.sites) * own.steps * own.calls
        assert run.summary().notes == ()
    assert left_alone(own.model) == before
    assert torch.equal(own.sample(), untouched)


@every_model
@pytest.mark.parametrize("kinds", [ATTENTION_KINDS, {"self_attention", "feed_forward"}], ids=["attention", "modules"])
@pytest.mark.parametrize("seed", range(3))
def test_random_plans_are_what_a_replay_gives(name, kinds, seed, tmp_path):
    own = replace(MODELS[name](), images=1 + seed)
    sites = sites_of(own, kinds)
    cells = random_cells(seed, sites, own.steps, own.guided)
    plan_of(own, cells, kinds).save(tmp_path / "plan.json")
    plan = ah.Plan.load(tmp_path / "plan.json")
    with ah.applied(own.model, plan, own.adapter) as run:
        given = own.sample(seed, run=run if seed % 2 else None)
        summary = run.summary()
        assert run.cache_bytes == 0
    with replaying(own, sites, plan.columns) as replayed:
        wanted = own.sample(seed)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    assert (given - own.sample(seed)).norm() > 1e-2 * given.norm()
    assert {site.passed for site in replayed} == {own.steps * own.calls}
    assert sum(summary.cells.values()) == own.steps * len(sites) * own.calls
    assert summary.notes == ()
    assert summary.flops.module == pytest.approx(plan.flops().module)
    assert summary.flops.attention == pytest.approx(plan.flops().attention)
    assert summary.peak_cache_bytes == max(plan.cache_bytes(own.images, 8))


def test_what_sites_multiply_is_what_torch_counts():
    """Attention over frames and over time, matrix by matrix."""
    own = replace(fused(temporal=True, cfg=None), images=1)
    sites = sites_of(own, {"self_attention", "feed_forward"})
    counted = {}

    def measured(path, forward):
        def counting(*args):
            with FlopCounterMode(display=False) as counter:
                out = forward(*args)
            counted[path] = counter.get_total_flops()
            return out

        return counting

    for site in sites:
        module = own.model.get_submodule(site.path)
        module.forward = measured(site.path, module.forward)
    own.sample()
    assert {site.path: full_flops([site], own.tokens, 1).module for site in sites} == counted


@every_model
@pytest.mark.parametrize(
    "how",
    [
        {"strategy": "greedy", "threshold": 0.7},
        {"strategy": Headwise(radii=RADII, share_cfg=True, residual=True), "threshold": 0.8},
        {"budget": ah.Budget(transformer_flops=0.6)},
        {"budget": ah.Budget(module_flops=0.5), "extent": ah.Extent(gradients=False)},
    ],
    ids=["greedy", "headwise", "budget", "without gradients"],
)
def test_searches_compress_and_their_plans_run(name, how, tmp_path):
    own = MODELS[name](torch.float32)
    untouched, before, random = own.sample(), left_alone(own.model), torch.get_rng_state()
    plan = ah.search(own.model, own.sample, adapter=own.adapter, progress=False, **how)
    assert left_alone(own.model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(own.sample(), untouched)
    assert plan.target.transformer == "STDiT2"
    assert (plan.steps, plan.tokens, plan.calls) == (own.steps, own.tokens.flat, own.calls)
    assert plan.flops().module < 1
    plan.save(tmp_path / "plan.json")
    with ah.applied(own.model, ah.Plan.load(tmp_path / "plan.json"), own.adapter) as run:
        compressed = own.sample()
        assert run.summary().flops.module == pytest.approx(plan.flops().module)
        assert run.summary().notes == ()
    assert not torch.equal(compressed, untouched)
    if "budget" in how:
        error = ((compressed - untouched).norm() / untouched.norm()).item()
        assert plan.about["search"]["measured_error"] == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("residual", [False, True])
def test_a_box_along_time_is_a_band_of_its_frames(residual):
    own = fused(temporal=True)
    paths, outputs = [site.path for site in sites_of(own)], []
    for radius in (ah.Box(frames=1, rows=1, columns=0), 1):
        arrow = Attend(Arrow(radius, residual))
        row = [arrow if path.endswith("attn_temp") else FULL for path in paths]
        plan = plan_of(own, [[FULL] * len(paths), *[row] * (own.steps - 1)])
        with ah.applied(own.model, plan, own.adapter) as run:
            outputs.append(own.sample())
        assert run.summary().flops == plan.flops()
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert (outputs[0] - own.sample()).norm() > 1e-3 * outputs[0].norm()


@pytest.mark.parametrize("how", [ah.Greedy, Headwise])
def test_searches_choose_boxes_in_space_and_time(how):
    own = fused(temporal=True)
    boxes = (ah.Box(frames=1, rows=1, columns=1), ah.Box(frames=2, columns=2))
    plan = ah.search(own.model, own.sample, adapter=own.adapter, strategy=how(radii=boxes), threshold=0.9, progress=False)
    assert plan.about["search"]["radii"] == ["1x1x1", "2xallx2"]
    with ah.applied(own.model, plan, own.adapter) as run:
        own.sample()
    assert run.summary().flops.attention == pytest.approx(plan.flops().attention)


def test_two_hundred_steps():
    own = fused(torch.float32, steps=200, images=1)
    sites = sites_of(own)
    cells = [[FULL] * len(sites) if step % 4 == 0 else [AST] * len(sites) for step in range(200)]
    with ah.applied(own.model, plan_of(own, cells), own.adapter) as run:
        given = own.sample(run=run)
        assert run.summary().steps == 200
        assert run.summary().flops.module == pytest.approx(0.25)
    with replaying(own, sites, list(zip(*cells, strict=True))):
        torch.testing.assert_close(given, own.sample(), rtol=1e-4, atol=1e-4)


class TestLoops:
    """Where generations begin and end, when no pipeline says so."""

    @pytest.fixture
    def own(self):
        return fused(torch.float32)

    @pytest.fixture
    def plan(self, own):
        sites = len(sites_of(own))
        return plan_of(own, [[FULL] * sites] + [[AST] * sites] * (own.steps - 1))

    def test_one_generation_follows_another(self, own, plan):
        with ah.applied(own.model, plan, own.adapter):
            assert torch.equal(own.sample(1), own.sample(1))

    def test_step_0_begins_anew(self, own, plan):
        with ah.applied(own.model, plan, own.adapter) as run:
            wanted = own.sample(1, run=run)

            def until_3(step):
                if step == 3:
                    raise KeyboardInterrupt
                run.step(step)

            with pytest.raises(KeyboardInterrupt):
                own.sample(2, run=SimpleNamespace(step=until_3))
            with pytest.warns(GenerationUnfinished, match="after 3 of the plan's 5 steps"):
                assert torch.equal(own.sample(1, run=run), wanted)
            assert run.cache_bytes == 0

    def test_a_model_that_fails_ends_the_generation(self, own, plan):
        with ah.applied(own.model, plan, own.adapter) as run:
            wanted = own.sample(1)
            own.model.blocks[1].cross_attn.forward = None
            with pytest.raises(TypeError):
                own.sample(2)
            assert run.cache_bytes == 0
            del own.model.blocks[1].cross_attn.forward
            assert torch.equal(own.sample(1), wanted)

    def test_a_loop_of_fewer_steps_is_noticed(self, own, plan):
        with pytest.warns(GenerationUnfinished, match="3 of the plan's 5 steps"), ah.applied(own.model, plan, own.adapter):
            replace(own, steps=3).sample()

    def test_a_loop_of_more_steps_is_refused(self, own, plan):
        with ah.applied(own.model, plan, own.adapter) as run, pytest.raises(PlanMismatch, match="got step 5 after 0"):
            replace(own, steps=7).sample(run=run)

    def test_steps_out_of_turn_are_refused(self, own, plan):
        with ah.applied(own.model, plan, own.adapter) as run:
            with pytest.raises(PlanMismatch, match="got step 2 after 0 whole steps"):
                run.step(2)
            run.step(0)
            with pytest.raises(PlanMismatch, match="more than 1 calls of the model in step 0"):
                replace(own, steps=2).sample()

    def test_other_tokens_are_refused(self, own, plan):
        refused = pytest.raises(PlanMismatch, match="frames=2")
        with ah.applied(own.model, plan, own.adapter, changes="refuse"), refused:
            replace(own, shape=(2, 4, 10)).sample()

    def test_remove(self, own, plan):
        before = left_alone(own.model)
        ah.apply(own.model, plan, own.adapter)
        with pytest.raises(AlreadyApplied):
            ah.apply(own.model, plan, own.adapter)
        with pytest.raises(AlreadyApplied):
            ah.search(own.model, own.sample, adapter=own.adapter, threshold=0.1, progress=False)
        ah.remove(own.model)
        assert left_alone(own.model) == before


def test_the_example_runs(monkeypatch, capsys):
    root = Path(__file__).parents[1]
    enabled = torch.is_grad_enabled()
    try:
        left = runpy.run_path(os.fspath(root / "examples/own_model.py"))
    finally:
        torch.set_grad_enabled(enabled)
    assert capsys.readouterr().out.count("12 of 12") == 3
    assert left["plan"].flops().module <= 0.5


@pytest.mark.parametrize("trials", [1, 5])
def test_a_search_that_fails_in_a_loop_that_goes_on_all_the_same(trials):
    """What it found until then is no plan."""

    class Stubborn(Own):
        def output(self, model, x, t, y):
            with suppress(ZeroDivisionError):
                return super().output(model, x, t, y)
            return x

    loop, seen = Stubborn(STDiT2(), ah.open_sora(guidance_scale=3.0)), []

    def fail(trial):
        seen.append(trial)
        if len(seen) == trials:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        greedy_search(driver_of(loop.model, loop.sample, loop.adapter), threshold=0.5, on_trial=fail)
    assert len(seen) == trials
    assert torch.equal(loop.sample(), Own(loop.model, loop.adapter).sample())
