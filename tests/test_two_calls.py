"""CFG in two calls of the transformer gives what both branches in one batch give."""

import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from headwise import plan as grid_plan
from headwise import random_grid
from pipelines import Bench, sd3, sd35
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.paired_calls import run_paired, wait_for_pair
from arrowhead.engine.site_calls import AttentionSiteCall
from arrowhead.errors import NotIntercepted, PlanInvalid, PlanMismatch
from arrowhead.models import families
from arrowhead.plans.layout import Site
from arrowhead.searches.headwise import Headwise

STEPS = 6


class OneBatch(DiffusionPipeline):
    """[cond, uncond] in one call; latents in, latents out."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents, text, pooled, guidance=3.0, steps=STEPS, generator=None):
        self.scheduler.set_timesteps(steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            both = self.velocities(latents, t, text, pooled) if guidance > 1 else self.call(latents, t, text[0], pooled[0])
            velocity = both[1] + guidance * (both[0] - both[1]) if guidance > 1 else both
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        return (latents,)

    def call(self, latents, t, text, pooled):
        return self.transformer(latents, text, pooled, t.expand(len(latents)), return_dict=False)[0]

    def velocities(self, latents, t, text, pooled):
        return self.call(torch.cat([latents] * 2), t, torch.cat(text), torch.cat(pooled)).chunk(2)


class TwoCalls(OneBatch):
    """The same, the conditional call first."""

    def velocities(self, latents, t, text, pooled):
        return [self.call(latents, t, text[i], pooled[i]) for i in range(2)]


@pytest.fixture(params=[sd3, sd35], ids=["sd3", "sd35"])
def benches(request, monkeypatch):
    """A transformer in both pipelines, and the arguments of a call of either."""
    known = next(family for family in families.FAMILIES if family.transformer == "SD3Transformer2DModel")
    orders = {"TwoCalls": "two_calls", "OneBatch": "cond_first"}
    own = replace(known, branch_order=orders, guided=lambda call: call["guidance"] > 1)
    monkeypatch.setattr(sys.modules["arrowhead.models.find"], "FAMILIES", (own,))  # arrowhead.models.find is a module
    bench = request.param()
    draw = torch.Generator().manual_seed(torch.seed() % 2**32)

    def inputs(images=2, **more):
        given = bench.inputs(images=images)
        text = [given[f"{name}prompt_embeds"] for name in ("", "negative_")]
        pooled = [given[f"{name}pooled_prompt_embeds"] for name in ("", "negative_")]
        return {"latents": start[:images], "text": text, "pooled": pooled, **more}

    start = torch.randn(2, 4, 8, 8, generator=draw, dtype=torch.float64)
    made = []
    for cls in (OneBatch, TwoCalls):
        pipe = cls(bench.pipe.transformer, bench.pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
        made.append(Bench(pipe, True, bench.visual, inputs, bench.text))
    return made


def two_call_plan(bench, grid):
    one = grid_plan(bench, grid)
    return replace(one, calls=2)


@pytest.mark.parametrize("seed", range(6))
def test_any_plan_gives_the_same_as_in_one_batch(benches, seed):
    batched, twice = benches
    grid = random_grid(seed, STEPS, batched, lines=True)
    with ah.applied(batched.pipe, grid_plan(batched, grid)) as run:
        wanted = batched.pipe(**batched.inputs())[0]
        counted = run.summary()
    with ah.applied(twice.pipe, two_call_plan(twice, grid)) as run:
        given = twice.pipe(**twice.inputs())[0]
        summary = run.summary()
        assert run.cache_bytes == 0
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    assert summary.steps == STEPS
    assert summary.flops.attention == pytest.approx(counted.flops.attention)
    assert summary.flops.module == pytest.approx(counted.flops.module)
    assert summary.peak_cache_bytes == max(two_call_plan(twice, grid).cache_bytes(images=2, itemsize=8))


@pytest.mark.parametrize(
    "strategy", ["greedy", Headwise(radii=(1, 3), share_cfg=True, residual=True)], ids=["greedy", "headwise"]
)
def test_a_search_finds_the_same_plan_as_in_one_batch(benches, strategy):
    batched, twice = benches
    one = ah.search(batched.pipe, batched.inputs(), strategy=strategy, threshold=0.6, progress=False)
    with left_as_it_was(twice):
        two = ah.search(twice.pipe, twice.inputs(), strategy=strategy, threshold=0.6, progress=False)
    assert two.cells == one.cells
    assert (one.calls, two.calls) == (1, 2)
    assert two.flops().module < 1
    assert (
        two.about["search"]["transformer_passes"] == one.about["search"]["transformer_passes"] + 1
    )  # the placeholder output of the first call


def test_a_full_plan_is_the_untouched_pipeline_bit_for_bit(benches):
    _, twice = benches
    grid = [" ".join("F" * len(twice.attentions))] * STEPS
    untouched = twice.pipe(**twice.inputs())[0]
    with ah.applied(twice.pipe, two_call_plan(twice, grid)):
        assert torch.equal(twice.pipe(**twice.inputs())[0], untouched)
    assert torch.equal(twice.pipe(**twice.inputs())[0], untouched)


def test_without_guidance_there_is_one_call(benches):
    batched, twice = benches
    plans = [
        ah.search(b.pipe, b.inputs(guidance=1.0), strategy="headwise", threshold=1.0, progress=False) for b in (batched, twice)
    ]
    assert plans[0] == plans[1]
    assert plans[1].calls == 1


def test_plans_for_one_call_and_for_two_are_not_exchanged(benches):
    batched, twice = benches
    grid = random_grid(0, STEPS, batched)
    with (
        ah.applied(twice.pipe, grid_plan(twice, grid), changes="refuse"),
        pytest.raises(PlanMismatch, match="plan is for 1 calls"),
    ):
        twice.pipe(**twice.inputs())
    with (
        ah.applied(batched.pipe, two_call_plan(twice, grid), changes="refuse"),
        pytest.raises(PlanMismatch, match="plan is for 2 calls"),
    ):
        batched.pipe(**batched.inputs())
    with pytest.raises(PlanInvalid, match="2 calls"):
        replace(grid_plan(twice, grid), calls=2, guided=False)


def test_prompts_of_different_lengths_share_no_text(benches):
    _, twice = benches
    inputs = twice.inputs()
    inputs["text"][1] = inputs["text"][1][:, :-2]
    with left_as_it_was(twice):
        how = Headwise(radii=(1, 3), share_cfg=True)
        found = ah.search(twice.pipe, inputs, strategy=how, threshold=0.6, progress=False)
        assert found.flops().module < 1
        for site, column in zip(found.target.sites, found.columns, strict=True):
            assert not (site.joint and any(cell.share_cfg for cell in column))
        with ah.applied(twice.pipe, found, changes="refuse"):
            twice.pipe(**inputs)
        with ah.applied(twice.pipe, two_call_plan(twice, random_grid(1, STEPS, twice)), changes="refuse") as run:
            with pytest.raises(PlanMismatch, match="one length"):
                twice.pipe(**inputs)
            assert run.cache_bytes == 0


@pytest.mark.parametrize("second", [["a", "c"], ["a"], ["a", "b", "c"]], ids=str)
def test_calls_that_do_not_pass_the_same_sites(second):
    def passing(paths):
        def run():
            for path in paths:
                wait_for_pair(AttentionSiteCall(Site(path, 1, 1, 1), None, None, (None, torch.zeros(1, 2, 3)), {}))

        return run

    with pytest.raises(NotIntercepted, match="two calls of a step"):
        run_paired([passing(["a", "b"]), passing(second)], lambda call: call.args[1])
