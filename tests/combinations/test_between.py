"""Generations side by side, one within another, and one after another: right, or refused, and the next is what it was."""

from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from by_hand import after, as_it_was, by_hand, loop_of, same
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from matrix import combines, states
from own import Own
from pipelines import pixart_sigma
from replay import assert_same, replay, trace
from replay import plan as uniform_plan
from subjects import STEPS, subject
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.errors import (
    AlreadyApplied,
    AlreadyGenerating,
    ArrowheadError,
    GenerationUnfinished,
    PlanAdapted,
    PlanMismatch,
    ShareCfgIgnored,
)
from arrowhead.plans.cells import FULL, Attend
from arrowhead.searches.greedy import greedy_search
from arrowhead.searches.headwise import Headwise, headwise_search

MIXED = ["FFF", "WXV", "RRW", "CwR", "VYR"]
NESTED = {"sd3": "refused: the first goes on", "flux": "refused: the first goes on", "own": "refused: by `run.step`"}


@combines("State", "a generation within another on one pipeline", NESTED)
def test_a_generation_within_one_of_its_own(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=2)
    undisturbed = here.compressed(plan, 1)
    with as_it_was(here), here.applied(plan) as run:
        if mechanism == "own":

            class Nested(Own):
                def output(self, model, x, t, y):
                    if t[0] == 3:
                        loop_of(here).sample(3, run=run)
                    return super().output(model, x, t, y)

            with pytest.warns(GenerationUnfinished), pytest.raises(PlanMismatch, match=r"say step\(0\) first"):
                loop_of(here, Nested).sample(1, run=run)
            assert torch.equal(loop_of(here).sample(1, run=run, by_call=True), undisturbed)
            return
        caught = []

        def again(*_):
            with pytest.raises(AlreadyGenerating, match="while another one is going on") as error:
                here.generate(3)
            caught.append(error)

        assert torch.equal(here.generate(1, callback_on_step_end=after(2, again)), undisturbed)
        assert caught
        assert run.summary().steps == STEPS
        with pytest.raises(AlreadyGenerating):
            here.generate(1, callback_on_step_end=after(0, lambda *_: here.generate(3)))
        assert torch.equal(here.generate(1), undisturbed)


@combines("State", "a generation within that of another pipeline of its class")
def test_a_generation_within_another_one_s(mechanism, outcome):
    outer, inner = subject(mechanism), subject(mechanism)
    for weight in inner.transformer.parameters():
        weight.data.mul_(1.1)
    plans = outer.plan(seed=1), inner.plan(seed=2)
    wanted = outer.compressed(plans[0], 1), inner.compressed(plans[1], 2)
    seen = []
    with as_it_was(outer), as_it_was(inner), outer.applied(plans[0]), inner.applied(plans[1]):
        hook = outer.transformer.register_forward_hook(lambda *_: seen.append(inner.generate(2)))
        got = outer.generate(1)
        hook.remove()
    assert torch.equal(got, wanted[0])
    assert len(seen) == STEPS * plans[0].calls
    assert all(torch.equal(one, wanted[1]) for one in seen)


def found(here, strategy="greedy", between=lambda: None):
    """The cells that a search finds, which something happens between whose trials."""
    driver = driver_of(here.pipe, here.inputs(1) if here.adapter is None else lambda: here.generate(1), here.adapter)
    if strategy == "greedy":
        return greedy_search(driver, threshold=0.6, on_trial=lambda _: between()).cells
    return headwise_search(driver, threshold=0.6, settings=Headwise(radii=(2,)), on_choice=lambda _: between()).cells


@combines("State", "a generation while a search on another pipeline is suspended")
@pytest.mark.parametrize("strategy", ["greedy", "headwise"])
def test_a_generation_while_another_is_searched(mechanism, outcome, strategy):
    searched, other = subject(mechanism), subject(mechanism)
    plan = other.plan(seed=3)
    wanted, untouched = other.compressed(plan, 2), other.generate(2)
    undisturbed = found(searched, strategy)
    turns = []

    def between():
        turns.append(1)
        if len(turns) in (1, 12):
            assert torch.equal(other.generate(2), untouched)
        elif len(turns) in (3, 15):
            assert torch.equal(other.compressed(plan, 2), wanted)

    with as_it_was(searched), as_it_was(other):
        assert found(searched, strategy, between) == undisturbed
    assert len(turns) >= 3


@combines(
    "State",
    "a generation on a pipeline whose search is suspended",
    {"sd3": "refused: the search goes on", "flux": "refused: the search goes on", "own": "refused: the search goes on"},
)
def test_a_generation_on_what_is_searched(mechanism, outcome):
    here = subject(mechanism)
    undisturbed, turns = found(here), []

    def between():
        turns.append(1)
        if len(turns) in (1, 5):
            with pytest.raises(
                AlreadyGenerating if here.adapter is None else ArrowheadError, match="while a search runs on it"
            ):
                here.generate(3)

    with as_it_was(here):
        assert found(here, "greedy", between) == undisturbed
    assert len(turns) > 5


SHARED = {"sd3": "works", "flux": "works"}
WITHIN = {"sd3": "refused", "flux": "refused"}


def beside(here, cls=None):
    """Another pipeline, of the same class or of another, on the same transformer, with a scheduler of its own."""
    pipe = (cls or type(here.pipe))(**here.pipe.components | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)})
    pipe.set_progress_bar_config(disable=True)

    def generate(seed, **more):
        return pipe(**here.inputs(seed, **more))[0].clone()

    return replace(here, pipe=pipe, generate=generate)


@combines("State", "two pipelines that share a transformer, a plan on one", SHARED)
def test_two_pipelines_share_a_transformer(mechanism, outcome):
    here = subject(mechanism)
    other, plan = beside(here), here.plan(seed=1)
    wanted, untouched = here.compressed(plan, 1), other.generate(2)
    with as_it_was(here), as_it_was(other), here.applied(plan) as run:
        for _ in range(2):
            assert torch.equal(here.generate(1), wanted)
            assert torch.equal(other.generate(2), untouched)
            assert run.summary().steps == STEPS
        with pytest.raises(AlreadyApplied, match="remove"):
            ah.apply(other.pipe, other.plan(seed=2))
        with pytest.raises(AlreadyApplied, match="remove"):
            other.search(threshold=0.5)
        assert torch.equal(here.generate(1), wanted)
        assert torch.equal(other.generate(2), untouched)


@combines("State", "two pipelines that share a transformer, one within the other's generation", WITHIN)
@pytest.mark.parametrize("steps", [1, 2, STEPS])
@pytest.mark.parametrize("caught", [False, True])
def test_two_pipelines_share_a_transformer_at_once(mechanism, outcome, steps, caught):
    """Unnoticed, one's calls of the transformer would be taken for the other's steps."""
    here = subject(mechanism)
    other, plan = beside(here), here.plan(seed=1)
    wanted, untouched = here.compressed(plan, 1), other.generate(2)

    def between(*_):
        if not caught:
            other.generate(2, steps=steps)
            return
        with suppress(PlanMismatch):
            other.generate(2, steps=steps)

    with as_it_was(here), as_it_was(other), here.applied(plan) as run:
        for step in (0, 2, STEPS - 2):
            with pytest.raises(PlanMismatch, match="let a generation with this transformer end"):
                here.generate(1, callback_on_step_end=after(step, between))
            assert run.cache_bytes == 0
            assert torch.equal(here.generate(1), wanted)
            assert torch.equal(other.generate(2), untouched)


CARRIED = "works: the plan is carried over"


@combines("State", "the next call at another resolution", f"{CARRIED}: bands reach over the same part of the tokens")
def test_another_resolution(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=1)
    undisturbed = here.compressed(plan, 1)
    larger = {"height": 24, "width": 16} if mechanism == "sd3" else {"height": 32, "width": 16}

    def elsewhere():
        return loop_of(here, shape=(7, 4, 12)).sample(2) if mechanism == "own" else here.generate(2, **larger)

    untouched = elsewhere()
    with as_it_was(here), here.applied(plan, changes="refuse") as run:
        with pytest.raises(PlanMismatch, match=r"plan is for Tokens.*search again at this resolution"):
            elsewhere()
        assert run.cache_bytes == 0
        assert torch.equal(here.generate(1), undisturbed)
    with as_it_was(here), here.applied(plan) as run:
        with pytest.warns(PlanAdapted, match="tokens"):
            carried = elsewhere()
        assert 0.01 < (carried - untouched).norm() / untouched.norm() < 3
        assert run.cache_bytes == 0
        assert torch.equal(here.generate(1), undisturbed)
    full = replace(plan, cells=((FULL,) * len(plan.target.sites),) * plan.steps)
    with as_it_was(here), here.applied(full), pytest.warns(PlanAdapted, match="tokens"):
        assert torch.equal(elsewhere(), untouched)


@combines("State", "the next call with more or fewer images")
def test_another_batch(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=1)

    def generate(images):
        return here.generate(3, images=images) if here.adapter is None else loop_of(here, images=images).sample(3)

    wanted = {}
    for images in (1, 2, 3):
        with by_hand(here, plan):
            wanted[images] = generate(images)
    with as_it_was(here), here.applied(plan):
        for images in (2, 3, 1, 2):
            same(generate(images), wanted[images])


@combines(
    "State",
    "the next call with more or fewer steps",
    {"sd3": CARRIED, "flux": CARRIED, "own": "refused: fewer are warned of"},
)
def test_another_number_of_steps(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=1)
    undisturbed, wanted, others = here.compressed(plan, 1), {}, (3, 4, 6, 1, 12)
    for steps in others if mechanism != "own" else ():
        with by_hand(here, plan.resample(steps=steps)):
            wanted[steps] = here.generate(2, steps=steps)
    with as_it_was(here), here.applied(plan) as run:
        for steps in others:
            if mechanism == "own":
                loop, fewer = loop_of(here, steps=steps), steps < STEPS
                with nullcontext() if fewer else pytest.raises(PlanMismatch, match="got step 5 after"):
                    loop.sample(2, run=run)
                with pytest.warns(GenerationUnfinished, match=f"after {steps} of the plan's 5") if fewer else nullcontext():
                    assert torch.equal(loop_of(here).sample(1, run=run, by_call=True), undisturbed)
                continue
            with pytest.warns(PlanAdapted, match=f"steps {steps}, was 5"):
                same(here.generate(2, steps=steps), wanted[steps])
            assert run.cache_bytes == 0
            assert torch.equal(here.generate(1), undisturbed)


OTHER = {"sd3": CARRIED, "flux": CARRIED}


class Subclass(FlowMatchEulerDiscreteScheduler):
    """Somebody's own, which does the same."""


@combines("State", "the next call with another scheduler", OTHER)
def test_another_scheduler(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=1)
    undisturbed, own = here.compressed(plan, 1), here.pipe.scheduler
    others = [FlowMatchHeunDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=2.0)]
    said, calls, wanted = ["scheduler: plan FlowMatchEuler", "shift: plan 3.0, pipeline 2.0"], [2 * STEPS - 1, STEPS], []
    if mechanism == "flux":  # whose pipeline takes no Heun
        del others[0], said[0], calls[0]
    for other, steps in zip(others, calls, strict=True):
        here.pipe.scheduler = other
        with by_hand(here, plan.resample(steps=steps)):
            wanted.append(here.generate(2))
    here.pipe.scheduler = own
    with as_it_was(here), here.applied(plan) as run:
        for other, what, image in zip(others, said, wanted, strict=True):
            here.pipe.scheduler = other
            with pytest.warns(PlanAdapted, match=what):
                same(here.generate(2), image)
            assert run.cache_bytes == 0
            here.pipe.scheduler = own
            assert torch.equal(here.generate(1), undisturbed)
        here.pipe.scheduler = Subclass.from_config(own.config)
        with pytest.warns(PlanAdapted, match="scheduler: plan FlowMatchEulerDiscreteScheduler, pipeline Subclass"):
            assert torch.equal(here.generate(1), undisturbed)
        here.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config)  # as good
        assert torch.equal(here.generate(1), undisturbed)
        here.pipe.scheduler = own


@states("State", "true_cfg_scale=1 under a guided plan", "works, with a warning", mechanism="dispatch_attention_fn")
def test_true_cfg_that_is_off_under_a_guided_plan():
    here = subject("flux")
    plan = here.plan(seed=1)
    cells = [[replace(cell, share_cfg=False) if isinstance(cell, Attend) else cell for cell in row] for row in plan.cells]
    alone = replace(plan, cells=tuple(map(tuple, cells)), guided=False, calls=1)
    with by_hand(here, alone):
        wanted = here.generate(2, true_cfg_scale=1.0)
    with as_it_was(here), here.applied(plan) as run:
        guided = here.generate(2)
        with pytest.warns(ShareCfgIgnored):
            got = here.generate(2, true_cfg_scale=1.0)
        assert run.cache_bytes == 0
        assert torch.equal(here.generate(2), guided)
    same(got, wanted)


@states("State", "several images for each prompt", mechanism="processor with SDPA")
def test_several_images_for_each_prompt():
    """PixArt alone repeats embeddings that it is given."""
    bench = pixart_sigma()
    inputs = {"images": 2, "num_images_per_prompt": 3}
    wanted = replay(bench, MIXED, bench.inputs(**inputs))
    with left_as_it_was(bench), ah.applied(bench.pipe, uniform_plan(bench, MIXED)):
        got = trace(bench, bench.inputs(**inputs))
    assert len(got.result) == 6
    assert_same(got, wanted)
