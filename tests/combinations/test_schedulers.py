"""Samplers that call a model twice a step, or a few times in all, that draw noise, or leave the first steps out."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch
from by_hand import as_it_was, by_hand, loop_of, same
from family_replay import random_cells
from matrix import combines, states
from own import LATENT, Own
from pipelines import dit, vae
from replay import assert_same, random_grid, replay, trace
from replay import plan as uniform_plan
from subjects import subject

import arrowhead as ah
from arrowhead.errors import NothingCompressed, PlanAdapted, PlanMismatch
from arrowhead.models.custom import CustomModel as StandIn
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.searches.headwise import Headwise

SAMPLERS = {
    "HeunDiscreteScheduler": "twice a step",
    "KDPM2DiscreteScheduler": "twice a step",
    "KDPM2AncestralDiscreteScheduler": "twice a step, noise",
    "DPMSolverSinglestepScheduler": "second order, one call a step (DPM++ 2S)",
    "DPMSolverMultistepScheduler": "second order, one call a step (DPM++ 2M)",
    "EulerAncestralDiscreteScheduler": "noise",
    "DDPMScheduler": "noise",
    "SASolverScheduler": "noise",
    "LCMScheduler": "few steps, noise",
    "TCDScheduler": "few steps, noise",
    "EDMEulerScheduler": "no timesteps of training",
    "PNDMScheduler": "more calls than steps at first",
    "UniPCMultistepScheduler": "a corrector",
    "DEISMultistepScheduler": "a memory",
    "IPNDMScheduler": "a memory",
    "LMSDiscreteScheduler": "a memory",
    "DDIMScheduler": "no count of steps",
}
SETTINGS = {
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "SASolverScheduler": {"algorithm_type": "data_prediction"},
}


def calls_of(transformer, generate):
    """How often a transformer is called."""
    calls = []
    hook = transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    generate()
    hook.remove()
    return len(calls)


CASES = [
    (name, steps) for name in SAMPLERS for steps in (1, 2, 4, 6) if steps > 2 or name != "PNDMScheduler"
]  # it takes no fewer


@states("Schedulers", "diffusers' samplers: of second order, with noise, with a memory", mechanism="processor with SDPA")
@pytest.mark.parametrize(("name", "steps"), CASES)
def test_any_sampler(name, steps):
    """One row of the plan for each call of the transformer."""
    bench = dit()
    bench.pipe.scheduler = getattr(diffusers, name)(**SETTINGS.get(name, {}))

    def inputs():
        torch.manual_seed(3)  # not all take a generator
        return bench.inputs(2, steps=steps)

    calls = calls_of(bench.pipe.transformer, lambda: bench.pipe(**inputs()))
    assert calls > steps or "twice" not in SAMPLERS[name] or steps == 1
    grid = random_grid(steps, calls, bench.layers)
    untouched = trace(bench, inputs())
    wanted = replay(bench, grid, inputs())
    with ah.applied(bench.pipe, uniform_plan(bench, grid)) as run:
        for _ in range(2):
            assert_same(trace(bench, inputs()), wanted)
            assert run.summary().steps == calls
            assert run.summary().notes == ()
    again = trace(bench, inputs())
    assert torch.equal(again.result, untouched.result)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHIFTED = {"sd3": {"flow_shift": 3.0}, "flux": {"use_dynamic_shifting": True, "time_shift_type": "exponential"}}


def flows(mechanism):
    """Samplers that SD3's and FLUX's pipelines take: FLUX's gives some of them sigmas, and all of them a shift."""
    yield diffusers.FlowMatchLCMScheduler(shift=3.0)
    for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"):
        yield getattr(diffusers, f"{name}Scheduler")(**FLOW, **SHIFTED[mechanism])
    if mechanism == "sd3":
        yield diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)


class Heun(Own):
    """Second order: the model is called at both ends of every step but the last."""

    def sample(self, seed=0, run=None, by_call=True):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.images, LATENT, *self.shape, generator=generator).to(self.dtype)
        y = torch.randn(self.images, 3, 16, generator=generator).to(self.dtype)
        for i in range(self.steps):
            slope = self.output(self.model, x, torch.full((len(x),), float(self.steps - i)), y)
            ahead = x - slope / self.steps
            if i + 1 < self.steps:
                slope = (slope + self.output(self.model, ahead, torch.full((len(x),), float(self.steps - i - 1)), y)) / 2
            x = x - slope / self.steps
        return x


def plan_of(here, calls, seed):
    """At random, with a row for each call of the transformer, or for both branches'."""
    model = find(here.pipe if here.adapter is None else StandIn(here.pipe, here.adapter))
    cells = random_cells(seed, model.sites, calls, share=True)
    of_call = here.plan().calls
    return ah.Plan(tuple(map(tuple, cells)), target_of(model), here.tokens, guided=True, calls=of_call)


@combines("Schedulers", "solvers of second order, few-step samplers")
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samplers(mechanism, outcome, steps):
    if mechanism == "own":
        here = subject(mechanism)
        plan = plan_of(here, 2 * steps - 1, steps)
        loop = loop_of(here, Heun, steps=steps)
        with by_hand(here, plan):
            wanted = loop.sample(2)
        with as_it_was(here), here.applied(plan) as run:
            same(loop.sample(2), wanted)
            same(loop.sample(2), wanted)
            assert run.summary().steps == 2 * steps - 1
        return
    for scheduler in flows(mechanism):
        here = subject(mechanism)
        here.pipe.scheduler = scheduler

        def generate(here=here):
            torch.manual_seed(1)
            return here.generate(2, steps=steps)

        calls = calls_of(here.transformer, generate) // here.plan().calls
        assert calls == (2 * steps - 1 if "Heun" in type(scheduler).__name__ else steps)
        plan, untouched = plan_of(here, calls, steps), generate()
        with by_hand(here, plan):
            wanted = generate()
        with here.applied(plan) as run:
            same(generate(), wanted)
            same(generate(), wanted)
            assert run.summary().steps == calls
        assert torch.equal(generate(), untouched)


@combines("Schedulers", "plans of 1, 2 and 4 steps: searched, saved, put on")
@pytest.mark.parametrize("strategy", ["greedy", "headwise", "budget"])
def test_few_steps(mechanism, outcome, strategy, tmp_path):
    """The first step is full, so of one nothing is compressed, and that is warned of; a budget may share branches in it."""
    for steps in (1, 2, 4):
        here = subject(mechanism)
        if here.adapter is None:
            inputs, generate = here.inputs(1, steps=steps), partial(here.generate, 1, steps=steps)
        else:
            inputs = generate = partial(loop_of(here, steps=steps).sample, 1)
        settings = {
            "greedy": {"threshold": 0.9},
            "headwise": {"strategy": Headwise(radii=(2,)), "threshold": 2.0},
            "budget": {"budget": ah.Budget(attention_flops=0.7)},
        }[strategy]
        untouched = generate()
        with pytest.warns(NothingCompressed) if steps == 1 and strategy != "budget" else nullcontext():
            found = ah.search(here.pipe, inputs, adapter=here.adapter, progress=False, **settings)
        assert found.steps == steps
        found.save(tmp_path / "plan.json")
        plan = ah.Plan.load(tmp_path / "plan.json")
        with here.applied(plan) as run:
            got = generate()
            assert run.summary().flops.attention == pytest.approx(plan.flops().attention)
        assert torch.equal(got, untouched) == (plan.flops().attention == 1)
        assert plan.flops().attention < 1 or steps == 1
        assert torch.equal(generate(), untouched)


def from_image(mechanism):
    """The subject's parts in the pipeline that starts from an image, and its calls."""
    here, cls = subject(mechanism), {"sd3": diffusers.StableDiffusion3Img2ImgPipeline, "flux": diffusers.FluxImg2ImgPipeline}
    pipe = cls[mechanism](**here.pipe.components | {"vae": vae(1, shift_factor=0.1).double()})
    pipe.set_progress_bar_config(disable=True)

    def inputs(seed=0, **more):
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return here.inputs(seed, image=image, **more)

    return replace(here, pipe=pipe, inputs=inputs, generate=lambda seed, **more: pipe(**inputs(seed, **more))[0].clone())


TAIL = "works: the plan is carried over"


@combines(
    "Schedulers",
    "from an image: a plan for another strength",
    {"sd3": TAIL, "flux": TAIL},
)
def test_another_strength(mechanism, outcome):
    """The plan's tail reads what the steps that are left out would have kept. The transformer is not called."""
    here = from_image(mechanism)
    plan = here.plan(seed=3)  # of 5 steps
    undisturbed = here.compressed(plan, 1, strength=1.0)
    untouched = here.generate(1, strength=0.6)
    with here.applied(plan, changes="refuse") as run:
        for strength, steps in ((0.6, 3), (0.2, 1), (0.8, 4)):
            with pytest.raises(PlanMismatch, match=rf"plan is for 5 steps, pipeline runs {steps}.*or with this strength"):
                here.generate(1, strength=strength)
            assert run.summary().steps == 0
            assert run.cache_bytes == 0
            assert torch.equal(here.generate(1, strength=1.0), undisturbed)
    shorter = plan_of(here, 3, seed=4)
    refused = pytest.raises(PlanMismatch, match="plan is for 3 steps, pipeline runs 5")
    with here.applied(shorter, changes="refuse"), refused:
        here.generate(1, strength=1.0)
    for strength, steps in ((0.6, 3), (0.2, 1), (0.8, 4)):
        with by_hand(here, plan.resample(steps=steps)):
            wanted = here.generate(1, strength=strength)
        with here.applied(plan) as run:
            with pytest.warns(PlanAdapted, match=f"steps {steps}, was 5"):
                same(here.generate(1, strength=strength), wanted)
            assert run.cache_bytes == 0
    assert torch.equal(here.generate(1, strength=0.6), untouched)


@combines(
    "Schedulers",
    "from an image: a plan for this strength",
    {"sd3": "works", "flux": "works"},
)
@pytest.mark.parametrize(("strength", "steps"), [(0.2, 1), (0.6, 3), (1.0, 5)])
def test_this_strength(mechanism, outcome, strength, steps):
    here = from_image(mechanism)
    plan, untouched = plan_of(here, steps, seed=5), here.generate(1, strength=strength)
    with by_hand(here, plan):
        wanted = here.generate(1, strength=strength)
    with here.applied(plan):
        same(here.generate(1, strength=strength), wanted)
    assert torch.equal(here.generate(1, strength=strength), untouched)
    found = ah.search(here.pipe, here.inputs(1, strength=strength), threshold=0.0, progress=False)
    assert found.steps == steps


@states("Schedulers", "from an image, twice a step", mechanism="processor with SDPA")
def test_from_an_image_twice_a_step():
    """Strength counts whole steps, a plan calls."""
    here = from_image("sd3")
    here.pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    calls = calls_of(here.transformer, lambda: here.generate(1, strength=0.6))
    plan = plan_of(here, calls, seed=6)
    with by_hand(here, plan):
        wanted = here.generate(1, strength=0.6)
    with here.applied(plan) as run:
        same(here.generate(1, strength=0.6), wanted)
        assert run.summary().steps == calls
