"""A scheduler observed in its run, and what becomes of an error made in one step: against the scheduler run by hand."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from budget import FAMILIES, final_latents
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from pipelines import tiny
from untouched import parts

import arrowhead as ah
from arrowhead.calibration.scheduler_calls import observed
from arrowhead.errors import NotIntercepted
from arrowhead.searches.budget.sensitivity.sampler_gain import SchedulerReplay
from arrowhead.tiny.pipeline import TinyDiTPipeline

pytestmark = pytest.mark.slow  # minutes, all of them together

STEPS = 7
SCHEDULERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm++ 2M": DPMSolverMultistepScheduler,
    "dpm++ 3M": lambda: DPMSolverMultistepScheduler(solver_order=3),
    "dpm singlestep": DPMSolverSinglestepScheduler,
    "dpm flow": lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "ancestral": EulerAncestralDiscreteScheduler,
}
every_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def state(scheduler):
    """Its attributes, tensors as lists."""
    return {name: repr(value.tolist() if isinstance(value, torch.Tensor) else value) for name, value in vars(scheduler).items()}


def begun(make, steps=STEPS):
    scheduler = make()
    scheduler.set_timesteps(steps)
    return scheduler


def run(scheduler, model, sample, seed=0, moved=(None, 0.0)):
    """The sampling loop, the sample changed by `moved[1]` before step `moved[0]`: all samples, the first and the last too."""
    generator = torch.Generator().manual_seed(seed)
    noisy = "generator" in type(scheduler).step.__code__.co_varnames
    samples = [sample]
    for step, t in enumerate(scheduler.timesteps):
        if step == moved[0]:
            sample = sample + moved[1]
        more = {"generator": generator} if noisy else {}
        sample = scheduler.step(model(step, sample), t, sample, **more).prev_sample
        samples.append(sample)
    return samples


def watched(make, model, sample, steps=STEPS):
    scheduler = begun(make, steps)
    with observed(scheduler) as sampling:
        run(scheduler, model, sample)
    return sampling


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(sampling, steps, images):
    """What becomes of an error: the sampler gain by the model feedback."""
    found = SchedulerReplay(sampling).gains_and_feedback(steps, images)
    return tuple(gain * feedback for gain, feedback in zip(*found, strict=True))


def some_model(seed, shape=(2, 4, 8, 8)):
    """Outputs that depend on nothing, one for each step."""
    outputs = draw(seed, STEPS, *shape)
    return lambda step, _: outputs[step]


@every_scheduler
def test_an_observed_run_is_the_same_to_the_last_bit(make):
    sample, model = draw(0, 2, 4, 8, 8), some_model(1)
    plain, other = begun(make), begun(make)
    wanted = run(plain, model, sample)
    attributes = set(vars(other))
    with observed(other) as sampling:
        given = run(other, model, sample)
        assert "step" in vars(other)
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert state(other) == state(plain)
    assert set(vars(other)) <= attributes | set(vars(plain))
    assert "step" not in vars(other)
    assert torch.equal(sampling.latents(), wanted[-1].float())
    assert len(sampling.outputs) == STEPS
    assert all(torch.equal(a, model(step, None)) for step, a in enumerate(sampling.outputs))


@every_scheduler
def test_gains_leave_everything_alone(make):
    sampling = watched(make, some_model(1), draw(0, 2, 4, 8, 8))
    before, noise = state(sampling.scheduler), torch.random.get_rng_state()
    outputs = [output.clone() for output in sampling.outputs]
    assert whole(sampling, STEPS, 2) == pytest.approx(whole(sampling, STEPS, 2), rel=1e-5)  # LAPACK rounds as memory lies
    assert state(sampling.scheduler) == before
    assert torch.equal(torch.random.get_rng_state(), noise)
    assert all(torch.equal(a, b) for a, b in zip(outputs, sampling.outputs, strict=True))


def test_an_exception_within_leaves_the_scheduler_as_it_was():
    scheduler = begun(SCHEDULERS["ddim"])
    before = state(scheduler)

    def model(step, _):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), observed(scheduler):
        run(scheduler, model, draw(0, 1, 4))
    assert state(scheduler) == before


def test_a_step_that_raises_leaves_the_scheduler_as_it_was():
    scheduler = begun(SCHEDULERS["dpm++ 2M"])
    before = state(scheduler)
    with pytest.raises(AttributeError), observed(scheduler):
        scheduler.step(draw(0, 1, 4), scheduler.timesteps[0], None)
    assert "step" not in vars(scheduler)
    assert set(state(scheduler)) == set(before)


def test_somebody_s_own_step_on_the_scheduler_stays():
    scheduler = begun(SCHEDULERS["flow"])
    own, called = type(scheduler).step, []

    def step(*args, **kwargs):
        called.append(args)
        return own(scheduler, *args, **kwargs)

    scheduler.step = step
    with observed(scheduler) as sampling:
        run(scheduler, some_model(1), draw(0, 2, 4, 8, 8))
    assert scheduler.step is step
    assert len(called) == len(sampling.outputs) == STEPS


@every_scheduler
@pytest.mark.parametrize("return_dict", [True, False])
def test_either_form_of_answer_is_understood(make, return_dict):
    scheduler = begun(make)
    with observed(scheduler) as sampling:
        out = scheduler.step(draw(0, 1, 4), scheduler.timesteps[0], draw(1, 1, 4), return_dict=return_dict)
    assert torch.equal(sampling.latents(), out.prev_sample if return_dict else out[0])


def frozen(make, model, sample, seed):
    """With the model's outputs as they were: what an output's error makes of the end, by what one in the next sample makes."""
    error, of_output, of_sample = draw(seed, *sample.shape), [], []
    reference = run(begun(make), model, sample)[-1]
    for bad in range(STEPS):

        def wrong(step, x, bad=bad):
            return model(step, x) + 1e-2 * error * (step == bad)

        of_output.append((run(begun(make), wrong, sample)[-1] - reference).norm().item())
        of_sample.append((run(begun(make), model, sample, moved=(bad, 1e-2 * error))[-1] - reference).norm().item())
    return [a / b for a, b in zip(of_output, [*of_sample[1:], 1e-2 * error.norm().item()], strict=True)]


@every_scheduler
@pytest.mark.parametrize("seed", range(2))
def test_the_sampler_s_own_part_is_what_it_makes_of_an_error(make, seed, monkeypatch):
    """The model feedback left out: as if the model kept each error as it is from the next step on."""
    monkeypatch.setattr(SchedulerReplay, "_flow_gain", lambda *_: 1.0)
    model, sample = some_model(seed), draw(seed + 10, 2, 4, 8, 8)
    given = whole(watched(make, model, sample), STEPS, 2)
    assert given == pytest.approx(frozen(make, model, sample, seed + 20), rel=0.02)


def test_of_a_flow_s_euler_step_it_is_the_step_s_length(monkeypatch):
    monkeypatch.setattr(SchedulerReplay, "_flow_gain", lambda *_: 1.0)
    scheduler = begun(SCHEDULERS["flow"])
    lengths = (scheduler.sigmas[1:] - scheduler.sigmas[:-1]).abs().tolist()
    sampling = watched(SCHEDULERS["flow"], some_model(3), draw(0, 2, 4, 8, 8))
    assert whole(sampling, STEPS, 2) == pytest.approx(lengths, rel=1e-2)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_the_model_s_answer_is_that_of_gaussian_data(spread):
    """x_t = (1 − σ)·final + σ·noise: an error then grows by s / √((1 − σ)²s² + σ²) to the end, for data of deviation s."""
    images, size = 24, 400
    final, noise = spread * draw(0, images, 1, size), draw(1, images, 1, size)
    wobble = draw(2, STEPS, images, 1, size)  # outputs change from step to step in any direction, a little
    scheduler = begun(SCHEDULERS["flow"])
    sampling = watched(SCHEDULERS["flow"], lambda step, _: noise - final + 1e-3 * wobble[step], noise)
    sigmas = scheduler.sigmas.tolist()
    lengths = [abs(b - a) for a, b in pairwise(sigmas)]
    answers = [spread / math.hypot((1 - sigma) * spread, sigma) for sigma in sigmas[1:-1]]
    wanted = [length * answer for length, answer in zip(lengths, [*answers, 1.0], strict=True)]
    given = whole(sampling, STEPS, images)
    assert given == pytest.approx(wanted, rel=0.15)  # s is met to 1 / √(2 · 24 · 23) or so
    assert given[-1] == pytest.approx(wanted[-1], rel=1e-3)


@every_scheduler
@pytest.mark.parametrize("images", [1, 2])
def test_gains_are_finite_and_positive(make, images):
    """With a model that goes by its input, as models do."""
    offset = draw(5, images, 4, 8, 8)
    sampling = watched(make, lambda step, x: 0.3 * x + (1 + 0.1 * step) * offset, draw(0, images, 4, 8, 8))
    gains = whole(sampling, STEPS, images)
    assert len(gains) == STEPS
    assert all(0 < gain < math.inf for gain in gains)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gains_of_pipelines_are_finite_and_positive(family, images, guidance):
    bench = FAMILIES[family]()
    with observed(bench.pipe.scheduler) as sampling:
        bench.pipe(**bench.inputs(images=images, guidance=guidance))
    gains = whole(sampling, 5, images)
    assert all(0 < gain < math.inf for gain in gains)
    assert torch.equal(sampling.latents(), final_latents(bench, bench.inputs(images=images, guidance=guidance)).float())


@pytest.mark.parametrize("images", [1, 2, 6])
def test_a_pipeline_that_brings_both_branches_rows_has_the_gains_of_one_that_does_not(images):
    """DiT's steps each image twice, with the same guided output: that says nothing more about the images."""
    bench = FAMILIES["dit"]()
    with observed(bench.pipe.scheduler) as sampling:
        bench.pipe(**bench.inputs(images=images))
    assert torch.equal(*sampling.final.chunk(2))
    once = copy.deepcopy(sampling)
    once.outputs = [output[:images] for output in once.outputs]
    once.arguments = [(t, sample[:images], args, kwargs) for t, sample, args, kwargs in once.arguments]
    once.final = once.final[:images]
    assert whole(sampling, 5, images) == pytest.approx(whole(once, 5, images), rel=0.1)  # the errors that are tried differ


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1, 0])
def test_another_number_of_calls_is_refused(steps):
    sampling = watched(SCHEDULERS["flow"], some_model(1), draw(0, 2, 4, 8, 8))
    with pytest.raises(NotIntercepted, match=f"{STEPS} times in {steps} steps.*wanted"):
        whole(sampling, steps, 2)


def test_a_scheduler_that_was_never_called_is_refused():
    with observed(begun(SCHEDULERS["flow"])) as sampling:
        pass
    with pytest.raises(NotIntercepted, match="never called"):
        sampling.latents()


def test_a_sampler_that_calls_the_model_twice_a_step_is_observed_as_it_runs():
    """Heun's second-order steps are calls of their own, of the model and of the scheduler."""
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    count, offset = len(scheduler.timesteps), draw(5, 1, 4, 8, 8)
    with observed(scheduler) as sampling:
        run(scheduler, lambda step, x: 0.3 * x + offset, draw(0, 1, 4, 8, 8))
    assert all(0 < gain < math.inf for gain in whole(sampling, count, 1))


class OwnLoop(TinyDiTPipeline):
    """Leaves the scheduler out in some steps."""

    skipped: tuple[int, ...] = ()

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=1.0, generator=None, num_inference_steps=5, output_type="pt"):
        latents = torch.randn(len(class_labels), 3, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            velocity = self.transformer(
                latents, timestep=t.expand(len(latents)), class_labels=torch.tensor(class_labels)
            ).sample
            if step in self.skipped:
                latents = latents - 0.1 * velocity
            else:
                latents = self.scheduler.step(velocity, t, latents).prev_sample
        return (latents,)


@pytest.mark.parametrize(("skipped", "said"), [((2,), "4 times in 5 steps"), (range(5), "never called"), ((), None)], ids=str)
def test_a_pipeline_that_leaves_its_scheduler_out_is_refused(skipped, said):
    bench = tiny(torch.float32)
    bench.pipe.__class__ = type("OwnLoop", (OwnLoop,), {"skipped": tuple(skipped)})
    inputs = bench.inputs(guidance=1.0)
    if said is None:
        assert ah.calibrate(bench.pipe, inputs, progress=False).steps == 5
        return
    before = parts(bench.pipe)
    with pytest.raises(NotIntercepted, match=said):
        ah.calibrate(bench.pipe, inputs, progress=False)
    assert parts(bench.pipe) == before
    assert "step" not in vars(bench.pipe.scheduler)
