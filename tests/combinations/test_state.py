"""What befalls a generation on its way, or stands between two: right, or refused, and the next one is what it was."""

from dataclasses import replace

import pytest
import torch
from by_hand import after, as_it_was, by_hand, loop_of, same
from diffusers.callbacks import SD3CFGCutoffCallback
from families import MORE
from family_replay import random_cells, replaying
from matrix import combines, states
from own import LATENT, Own
from replay import assert_same, trace
from subjects import STEPS, subject
from test_families import plan_of

import arrowhead as ah
from arrowhead.errors import GenerationUnfinished, InputsInvalid, NotIntercepted, PlanAdapted, PlanMismatch
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL, Arrow, Attend, Full, Reuse
from arrowhead.plans.layout import ATTENTION_KINDS


class Stop(Exception):
    """What interrupts a generation."""


class StoppedLoop(Own):
    """A loop that is interrupted between two steps."""

    stop = 0

    def output(self, model, x, t, y):
        if self.steps - int(t[0]) == self.stop:
            raise Stop
        return super().output(model, x, t, y)


PLACES = {
    "sd3": ["", "transformer_blocks.1.attn.to_q", "transformer_blocks.2.ff"],
    "flux": ["", "transformer_blocks.1.attn.to_q"],
}
PLACES["own"] = ["blocks.1.attn.qkv", "blocks.1.mlp"]


@combines("State", "an exception or Ctrl-C in a module, at any step")
def test_an_interruption_in_a_module(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=5)
    undisturbed = here.compressed(plan, 1)
    with as_it_was(here), here.applied(plan) as run:
        for step in range(STEPS * plan.calls):
            for error in (Stop, KeyboardInterrupt):
                place = PLACES[mechanism][step % len(PLACES[mechanism])]
                calls = []

                def interrupt(*_, calls=calls, error=error, step=step):
                    calls.append(1)
                    if len(calls) == step + 1:
                        raise error

                module = here.transformer.get_submodule(place)
                hook = module.register_forward_hook(interrupt)
                try:
                    here.generate(9)
                    assert len(calls) <= step  # reused, or one branch's, where the plan has it so
                except error:
                    assert len(calls) == step + 1
                hook.remove()
                assert run.cache_bytes == 0
        assert torch.equal(here.generate(1), undisturbed)
        assert run.summary().notes == ()


@combines(
    "State", "an exception or Ctrl-C between steps", {"sd3": "works", "flux": "works", "own": "works: told by `run.step(0)`"}
)
def test_an_interruption_between_steps(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=6)
    undisturbed = here.compressed(plan, 1)
    with as_it_was(here), here.applied(plan) as run:
        for step in range(STEPS):
            if mechanism == "own":
                if not step:
                    continue
                loop = loop_of(here, StoppedLoop)
                object.__setattr__(loop, "stop", step)
                with pytest.raises(Stop):
                    loop.sample(9, run=run)
                with pytest.warns(GenerationUnfinished, match=rf"after {step} of the plan's 5 steps"):
                    run.step(0)
                assert run.cache_bytes == 0
                continue
            error = (Stop, KeyboardInterrupt)[step % 2]

            def interrupt(*_, error=error):
                raise error

            with pytest.raises(error):
                here.generate(9, callback_on_step_end=after(step, interrupt))
            assert run.cache_bytes == 0
            assert run.summary().steps == step + 1
        again = here.generate(1) if here.adapter is None else loop_of(here).sample(1, run=run, by_call=True)
        assert torch.equal(again, undisturbed)


@combines("State", "`pipe.interrupt`", {"sd3": "works: and warns", "flux": "works: and warns"})
def test_interrupting_the_pipeline(mechanism, outcome):
    """The latents are those of the step it got to, which the plan's own generation passes."""
    here = subject(mechanism)
    plan = here.plan(seed=7)
    passed = []
    with by_hand(here, plan):
        here.generate(1, callback_on_step_end=lambda _p, _i, _t, given: passed.append(given["latents"].clone()) or {})
    with as_it_was(here), here.applied(plan) as run:
        for step in range(STEPS - 1):
            with pytest.warns(GenerationUnfinished, match=rf"after {step + 1} of the plan's 5 steps; let it run to its end"):
                got = here.generate(1, callback_on_step_end=after(step, lambda pipe, _: setattr(pipe, "_interrupt", True)))
            same(got, passed[step])
            assert run.summary().steps == step + 1
            assert any("ended after" in note for note in run.summary().notes)
            assert run.cache_bytes == 0
        same(here.generate(1), passed[-1])
        assert run.summary().notes == ()


@combines("State", "a search of an interrupted run", {"sd3": "refused", "flux": "refused"})
def test_a_search_that_is_interrupted(mechanism, outcome):
    here = subject(mechanism)
    stopped = here.inputs(1, callback_on_step_end=after(2, lambda pipe, _: setattr(pipe, "_interrupt", True)))
    with as_it_was(here), pytest.raises(InputsInvalid, match=r"ended after 3 of 5 steps.*leave out"):
        ah.search(here.pipe, stopped, threshold=0.5, progress=False)


@combines(
    "State",
    "a callback that changes the guidance scale",
    {"sd3": "works", "flux": "works: the pipeline reads it once"},
)
def test_another_guidance_scale_on_the_way(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=8)
    change = {"callback_on_step_end": after(1, lambda pipe, _: setattr(pipe, "_guidance_scale", 6.0))}
    with by_hand(here, plan):
        wanted = here.generate(1, **change)
    with by_hand(here, plan):
        constant = here.generate(1)
    assert torch.equal(wanted, constant) == (mechanism == "flux")
    with as_it_was(here), here.applied(plan):
        same(here.generate(1, **change), wanted)
        same(here.generate(1), constant)


def cut(pipe, given):
    """As diffusers' SD3CFGCutoffCallback does it, for any number of images."""
    pipe._guidance_scale = 1.0
    return {name: value.chunk(2)[1] for name, value in given.items()}


class EndsEarly(Own):
    """Guidance in an interval, as many samplers have it."""

    def output(self, model, x, t, y):
        return model(x, t, y)[:, :LATENT] if t[0] < 3 else super().output(model, x, t, y)


ENDS = {"sd3": "refused: the batch changes", "flux": "works: the pipeline reads it once", "own": "refused: the batch changes"}


@combines("State", "guidance that ends early, by a callback or an interval", ENDS)
@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("cells", ["any", "ASC", "AST", "band"])
def test_guidance_that_ends_early(mechanism, outcome, images, cells):
    """Unnoticed, an image would be taken for another one's branch."""
    here = subject(mechanism)
    plan = here.plan(seed=9)
    if cells != "any":
        cell = {"ASC": Attend(Full(), share_cfg=True), "AST": Reuse(), "band": Attend(Arrow(2))}[cells]
        sites = len(plan.target.sites)
        plan = replace(plan, cells=((FULL,) * sites, (FULL,) * sites, *[(cell,) * sites] * 3))
    if mechanism == "own":
        whole, ends = loop_of(here, images=images).sample, loop_of(here, EndsEarly, images=images).sample
    else:
        tensors = ["prompt_embeds", "pooled_prompt_embeds"] if mechanism == "sd3" else ["latents"]
        ending = {"callback_on_step_end_tensor_inputs": tensors}
        ending["callback_on_step_end"] = after(
            2, cut if mechanism == "sd3" else lambda pipe, _: setattr(pipe, "_guidance_scale", 1.0)
        )

        def whole(seed):
            return here.generate(seed, images=images)

        def ends(seed):
            return here.generate(seed, images=images, **ending)

    undisturbed = here.compressed(plan, 1)
    with as_it_was(here), here.applied(plan, changes="refuse") as run:
        wanted = whole(2)
        if mechanism == "flux":
            assert torch.equal(ends(2), wanted)
        else:
            with pytest.raises(PlanMismatch, match=rf"got a batch of {images} in step 3, wanted {2 * images}.*leave out what"):
                ends(2)
        assert run.cache_bytes == 0
        assert torch.equal(here.generate(1), undisturbed)


@states("State", "a search while guidance ends early", "refused", "processor with SDPA")
@pytest.mark.parametrize("strategy", ["greedy", "headwise"])
def test_a_search_while_guidance_ends_early(strategy):
    here = subject("sd3")
    tensors = ["prompt_embeds", "pooled_prompt_embeds"]
    ending = here.inputs(1, callback_on_step_end=after(1, cut), callback_on_step_end_tensor_inputs=tensors)
    with as_it_was(here), pytest.raises(InputsInvalid, match="got a batch of 1 in step 2, wanted 2"):
        ah.search(here.pipe, ending, strategy=strategy, threshold=0.5, progress=False)


@states("State", "diffusers' SD3CFGCutoffCallback", "refused: the batch changes", "processor with SDPA")
def test_the_callback_of_diffusers():
    here = subject("sd3")
    plan = here.plan(seed=9)
    ending = SD3CFGCutoffCallback(cutoff_step_index=2, cutoff_step_ratio=None)
    refused = pytest.raises(PlanMismatch, match="got a batch of 1 in step 3, wanted 2")
    with as_it_was(here), here.applied(plan, changes="refuse"), refused:
        here.generate(1, callback_on_step_end=ending)
    full = replace(plan, cells=((FULL,) * len(plan.target.sites),) * plan.steps)
    wanted = here.generate(1, callback_on_step_end=ending)
    with as_it_was(here), here.applied(full) as run:
        with pytest.warns(PlanAdapted, match="guidance ends before step 3"):
            assert torch.equal(here.generate(1, callback_on_step_end=ending), wanted)
        assert run.summary().flops.module == 1


@states("State", "guidance in two calls that ends early", "refused: a call is missing", "dispatch_attention_fn")
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("name", ["wan", "chroma", "flux2"])
def test_a_second_call_that_is_missing(name, step):
    """Unnoticed, the next step's conditional call would be taken for the unconditional one. Other pipelines read it once."""
    bench = MORE[name]()
    model = find(bench.pipe)
    plan = plan_of(bench, model, random_cells(step, model.sites, STEPS, share=True))
    off = {"callback_on_step_end": after(step, lambda pipe, _: setattr(pipe, "_guidance_scale", 1.0))}
    undisturbed = bench.pipe(**bench.inputs())[0].clone()
    with ah.applied(bench.pipe, plan, changes="refuse") as run:
        wanted = bench.pipe(**bench.inputs())[0].clone()
        if step < 3:
            with pytest.raises(PlanMismatch, match=rf"one call of the transformer in step {step + 1}, wanted two"):
                bench.pipe(**bench.inputs(**off))
        else:  # it is the last call
            with pytest.raises(NotIntercepted, match=f"in 1 of the first {2 * STEPS} calls"):
                bench.pipe(**bench.inputs(**off))
        assert run.cache_bytes == 0
        assert torch.equal(bench.pipe(**bench.inputs())[0], wanted)
    missing = "got one call of the transformer in a step, wanted one for each|with the output of a step.s first call before"
    with pytest.raises((InputsInvalid, NotIntercepted), match=missing):
        ah.search(bench.pipe, bench.inputs(**off), threshold=0.5, progress=False)
    assert torch.equal(bench.pipe(**bench.inputs())[0], undisturbed)


@states("State", "an odd batch where both branches are said to come in one", "refused", "custom model")
def test_an_odd_batch():
    class Unguided(Own):
        def output(self, model, x, t, y):
            return model(x, t, y)[:, :LATENT]

    here = subject("own")
    with as_it_was(here), here.applied(here.plan(seed=1)), pytest.raises(PlanMismatch, match=r"batch of 3 in step 0, wanted 4"):
        loop_of(here, Unguided, images=3).sample(1)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("hunyuan_dit", marks=states("State", "`guidance_rescale`", mechanism="processor with SDPA")),
        pytest.param("ltx", marks=states("State", "`guidance_rescale`", mechanism="dispatch_attention_fn")),
    ],
)
def test_rescaled_guidance(name):
    bench = MORE[name]()
    model = find(bench.pipe, ATTENTION_KINDS)
    cells = random_cells(3, model.sites, STEPS, share=True)
    given = bench.inputs(2, guidance_rescale=0.7), bench.inputs(2, guidance_rescale=0.7), bench.inputs(2)
    with replaying(bench, model.modules, cells, guided=True):
        wanted = trace(bench, given[0])
    untouched = trace(bench, bench.inputs())
    with ah.applied(bench.pipe, plan_of(bench, model, cells)):
        assert_same(trace(bench, given[1]), wanted, 1e-5, 1e-5)
        assert not torch.equal(trace(bench, given[2]).result, wanted.result)
    assert torch.equal(trace(bench, bench.inputs()).result, untouched.result)


@combines(
    "State",
    "taken off in the middle",
    {
        "sd3": "works: the rest is full, and warned of",
        "flux": "works: the rest is full, and warned of",
        "own": "works: the rest is full, and warned of",
    },
)
@pytest.mark.parametrize("step", range(STEPS - 1))
def test_taken_off_in_the_middle(mechanism, outcome, step):
    here = subject(mechanism)
    plan = here.plan(seed=4)
    rest = [plan.cells[i] if i <= step else [FULL] * len(plan.target.sites) for i in range(STEPS)]
    with by_hand(here, plan, rest):
        wanted = here.generate(2)
    with (
        as_it_was(here),
        here.applied(plan),
    ):
        seen = []

        def off(*_):
            seen.append(1)
            if len(seen) == (step + 1) * plan.calls:
                ah.remove(here.pipe)

        hook = here.transformer.register_forward_hook(off)
        with pytest.warns(GenerationUnfinished, match=rf"ended after {step + 1} of the plan's 5"):
            got = here.generate(2)
        hook.remove()
        same(got, wanted)


PUT_ON = "works: from the next generation on"


@combines("State", "put on in the middle", {"sd3": PUT_ON, "flux": PUT_ON, "own": "refused: by `run.step`"})
def test_put_on_in_the_middle(mechanism, outcome):
    """Nothing says when a custom loop begins; `run.step` refuses the rest of it, see the tests of custom models."""
    if mechanism == "own":
        here = subject(mechanism)
        with here.applied(here.plan(seed=4)) as run, pytest.raises(PlanMismatch, match="got step 2 after 0 whole steps"):
            run.step(2)
        return
    here = subject(mechanism)
    plan = here.plan(seed=4)
    wanted, untouched = here.compressed(plan, 1), here.generate(1)
    with as_it_was(here):
        got = here.generate(1, callback_on_step_end=after(1, lambda pipe, _: ah.apply(pipe, plan) and None))
        assert torch.equal(got, untouched)
        assert torch.equal(here.generate(1), wanted)
        ah.remove(here.pipe)
