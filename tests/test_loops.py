"""Pipelines that run several denoising loops in one call: each loop is a run of the plan, as in a call of its own."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import count

import diffusers
import pytest
import torch
from budget import latents_of
from family_replay import random_cells
from image_variants import of_cloze
from PIL import Image
from replay import trace
from test_families import plan_of
from untouched import left_as_it_was
from video_benches import helios

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.run import CalibrationRun
from arrowhead.errors import GenerationUnfinished, PlanAdapted, PlanMismatch
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL
from arrowhead.searches.budget import validation
from arrowhead.searches.stack import api as stack_api

STEPS = 5
OTHER = {"upsampling_width": 16, "upsampling_strength": 0.8}  # a second loop over half the tokens, in 4 steps


def random_plan(bench, guided, seed=3):
    model = find(bench.pipe, {"self_attention", "feed_forward"})
    return plan_of(bench, model, random_cells(seed, model.sites, STEPS, guided), guided)


def cloze():
    """A pipeline that draws a picture, and then another one from it, with one transformer and one scheduler."""
    return of_cloze(diffusers.VisualClozePipeline)


@pytest.mark.parametrize("other", [{}, OTHER], ids=["alike", "smaller and shorter"])
def test_two_loops_are_what_two_calls_give(other):
    bench = cloze()
    plan, inputs = random_plan(bench, False), bench.inputs(images=2, **other)
    shared = {name: inputs[name] for name in ("num_inference_steps", "guidance_scale", "generator")}
    first = {name: inputs[name] for name in ("image", "task_prompt", "content_prompt")}
    said = pytest.warns(PlanAdapted, match="steps 4, was 5; tokens") if other else nullcontext()
    with ah.applied(bench.pipe.generation_pipe, plan):
        drawn = [images[0] for images in bench.pipe.generation_pipe(**first, **shared)[0]]
    second = {"prompt": inputs["content_prompt"], "image": drawn, "strength": inputs.get("upsampling_strength", 1.0)}
    second |= {"mask_image": [Image.new("RGB", image.size, (255, 255, 255)) for image in drawn], "output_type": "pt"}
    second |= {"height": inputs["upsampling_height"], "width": inputs["upsampling_width"]}
    with ah.applied(bench.pipe.upsampling_pipe, plan), said:
        wanted = bench.pipe.upsampling_pipe(**second, **shared)[0]
    with ah.applied(bench.pipe, plan) as run, said:
        given = bench.pipe(**bench.inputs(images=2, **other))[0]
    assert torch.equal(given, wanted)
    summary = run.summary()
    assert summary.steps == summary.planned_steps == STEPS + (4 if other else STEPS)
    assert len(summary.notes) == bool(other)


def test_a_loop_that_differs_is_refused_where_changes_are():
    bench = cloze()
    with (
        ah.applied(bench.pipe, random_plan(bench, False), changes="refuse"),
        pytest.raises(PlanMismatch, match="plan is for 5 steps, pipeline runs 4"),
    ):
        bench.pipe(**bench.inputs(**OTHER))


def test_caches_are_empty_where_a_loop_begins():
    bench, held = helios(), []
    with ah.applied(bench.pipe, random_plan(bench, True)) as run:
        hook = bench.pipe.transformer.register_forward_pre_hook(lambda *_: held.append(run.cache_bytes))
        bench.pipe(**bench.inputs())
        hook.remove()
        assert run.cache_bytes == 0
    empty = [call for call, held_bytes in enumerate(held) if not held_bytes]
    assert empty == [0, 2 * STEPS]
    assert len(held) == 2 * 2 * STEPS


def test_a_loop_that_begins_before_the_last_has_ended_is_refused():
    bench = cloze()

    def interrupt(pipe, step, _, values):
        pipe._interrupt = step == 2
        return values

    with (
        ah.applied(bench.pipe, random_plan(bench, False)),
        pytest.raises(PlanMismatch, match="not the scheduler's for step 3"),
    ):
        bench.pipe(**bench.inputs(callback_on_step_end=interrupt))


def test_a_call_that_ends_within_its_second_loop_is_unfinished():
    bench, done = helios(), []

    def interrupt(pipe, step, _, values):
        done.append(step)
        pipe._interrupt = len(done) == STEPS + 2
        return values

    with (
        ah.applied(bench.pipe, random_plan(bench, True)) as run,
        pytest.warns(GenerationUnfinished, match="ended after 7 of the plan's 10 steps"),
    ):
        bench.pipe(**bench.inputs(callback_on_step_end=interrupt))
    assert (run.summary().steps, run.summary().planned_steps) == (7, 10)


def test_a_search_sees_the_first_loop_and_ends_there():
    bench, seen = helios(), []
    decode = bench.pipe.vae.decode
    bench.pipe.vae.decode = lambda *args, **kwargs: seen.append("decoded") or decode(*args, **kwargs)
    calibration = CalibrationRun(driver_of(bench.pipe, bench.inputs()), find(bench.pipe))

    def full(step):
        seen.append(step.index)
        step.finish([FULL] * len(step.sites), dict.fromkeys(step.sites, ()))

    with left_as_it_was(bench):
        seen.clear()
        calibration.run(full)
        assert seen == [*range(STEPS), "decoded"]
    assert calibration.step_count == len(calibration.target.levels) == STEPS


def test_the_first_call_under_a_speedup_runs_all_loops():
    bench = cloze()
    untouched = trace(bench, bench.inputs()).result
    with ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6), cache=False) as sped:
        assert torch.equal(bench.pipe(**bench.inputs())[0], untouched)
        assert sped.plan is not None
        assert not torch.equal(bench.pipe(**bench.inputs())[0], untouched)


def test_checks_of_a_search_are_of_the_first_loop():
    bench = cloze()
    found = ah.search(bench.pipe, bench.inputs(**OTHER), budget=ah.Budget(transformer_flops=0.7, corrections=1), progress=False)
    with latents_of(bench) as raw:
        bench.pipe(**bench.inputs(**OTHER))
    with ah.applied(bench.pipe, found), latents_of(bench) as changed, pytest.warns(PlanAdapted):
        bench.pipe(**bench.inputs(**OTHER))
    raw, changed = raw[STEPS - 1].double(), changed[STEPS - 1].double()
    error = float((changed - raw).norm() / raw.norm())
    assert error > 1e-6
    assert found.about["search"]["measured_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("other", [{}, OTHER], ids=["alike", "smaller and shorter"])
def test_the_first_loop_alone_is_timed(other, monkeypatch):
    """By a clock that gives each call of the transformer a second."""
    bench = cloze()
    driver = driver_of(bench.pipe, bench.inputs(**other))
    plan = random_plan(bench, False)
    plan = replace(plan, cells=((FULL,) * len(plan.target.sites),) * STEPS)
    monkeypatch.setattr(validation, "clock", count().__next__)
    raw = driver.final_latents()
    assert validation.measured_seconds(driver, plan) == (STEPS, STEPS)
    assert stack_api._checked(driver, plan, raw)[1] == (1, 1)
    assert not {"step", "set_timesteps"} & {*vars(bench.pipe.scheduler)}
