"""What the arguments of a model's calls say of its loop: a wrong cfg, and generations that follow one another."""

from dataclasses import replace

import pytest
import torch
from own import Own
from own_wan import ADAPTER, Wan, WanModel
from test_own import fused, plan_of, sites_of

import arrowhead as ah
from arrowhead.engine.loop_checks import LoopTimes, numbers_of
from arrowhead.errors import InputsInvalid, PlanMismatch
from arrowhead.plans.cells import AST, FULL

SAID = {
    ("cond_first", "two_calls"): "two calls of a step with different latents",
    ("cond_first", None): "halves have the same latents in two steps",
    ("two_calls", "cond_first"): "halves have different latents",
    ("two_calls", "uncond_first"): "halves have different latents",
    ("two_calls", None): "two calls with the same latents and numbers",
    (None, "cond_first"): "halves have different latents",
    (None, "two_calls"): "two calls of a step with different latents",
}


def alternating(own, **more):
    cells = [[(FULL, AST)[step % 2]] * len(sites_of(own)) for step in range(own.steps)]
    return replace(plan_of(own, cells), **more)


@pytest.mark.parametrize("how", ["greedy", "headwise", "budget", "apply"])
@pytest.mark.parametrize(("truth", "claim"), SAID, ids=str)
def test_a_wrong_cfg_is_refused(truth, claim, how):
    own = fused(torch.float32, cfg=truth)
    adapter = replace(own.adapter, cfg=claim)
    said = rf"{SAID[truth, claim]}, where the adapter says cfg={claim!r}; wanted .*; correct cfg of the adapter"

    def run():
        if how != "apply":
            settings = {"budget": ah.Budget(module_flops=0.5)} if how == "budget" else {"strategy": how, "threshold": 0.5}
            return ah.search(own.model, own.sample, adapter=adapter, progress=False, **settings)
        with ah.applied(own.model, alternating(replace(own, adapter=adapter)), adapter):
            return own.sample()

    with pytest.raises(InputsInvalid, match=said):
        run()


@pytest.mark.parametrize("claim", ["cond_first", None])
def test_a_wrong_cfg_over_lists_is_refused(claim):
    wan = Wan(WanModel(1), images=2, steps=3)
    with pytest.raises(InputsInvalid, match=f"where the adapter says cfg={claim!r}"):
        ah.search(wan.model, wan.sample, adapter=replace(ADAPTER, cfg=claim), progress=False)


class Conditioned(Own):
    """Half of the latents' channels are an image's, which the unconditional branch does without."""

    def output(self, model, x, t, y):
        given = x.clone()
        given[:, 2:] = 0.5
        without = given.clone()
        without[:, 2:] = 0
        both = model(torch.cat([given, without]), torch.cat([t, t]), torch.cat([y, torch.zeros_like(y)]))[:, :4]
        cond, uncond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)


class OnePictureInTwoWays(Own):
    """Two prompts from the same noise, without guidance: only the first step's latents are alike."""

    def output(self, model, x, t, y):
        if t[0] == self.steps:
            x.copy_(x[:1].expand_as(x).clone())
        return super().output(model, x, t, y)


@pytest.mark.parametrize("loop", [Conditioned, OnePictureInTwoWays])
def test_what_only_looks_like_another_cfg_is_taken(loop):
    own = fused(torch.float32, cfg=None if loop is OnePictureInTwoWays else "cond_first")
    own = loop(own.model, own.adapter)
    plan = ah.search(own.model, own.sample, adapter=own.adapter, threshold=0.5, progress=False)
    with ah.applied(own.model, plan, own.adapter) as run:
        own.sample()
    assert run.summary().notes == ()


class TestTimesteps:
    """Loops that do not announce their steps."""

    @pytest.fixture(params=["cond_first", "two_calls"])
    def own(self, request):
        return fused(torch.float32, cfg=request.param)

    def test_a_loop_of_more_steps_is_refused(self, own):
        longer = replace(own, steps=2 * own.steps)
        with (
            ah.applied(own.model, alternating(own), own.adapter),
            pytest.raises(PlanMismatch, match="timestep=5 after the plan's 5 steps ended at 6: the loop has more steps"),
        ):
            longer.sample()

    def test_loops_of_fewer_steps_are_refused(self, own):
        shorter = replace(own, steps=3)
        with ah.applied(own.model, alternating(own), own.adapter):
            shorter.sample()
            with pytest.raises(PlanMismatch, match="timestep=3, where the generation began at 3, after 3 of the plan's 5"):
                shorter.sample()
            wanted = own.sample()
            assert torch.equal(own.sample(), wanted)

    def test_a_loop_that_announces_its_steps_may_go_anywhere(self, own):
        class Turned(Own):
            def output(self, model, x, t, y):
                return super().output(model, x, t % 2, y)

        turned = Turned(own.model, own.adapter)
        with ah.applied(own.model, alternating(own), own.adapter) as run:
            with pytest.raises(PlanMismatch, match="timestep=1, where the generation began at 1, after 2 of"):
                turned.sample()
            assert torch.equal(turned.sample(run=run), turned.sample(run=run))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1000, 900, 900, 800], [1000]),  # a corrector, or a second-order step
        ([0.0, 0.3, 0.6], [0.0]),  # a flow from 0 to 1
        ([10, 4, 5, 1, 2], [10]),  # noise that is added in every step
        ([600, 400, 200], [1000]),  # from an image, and then from noise
        ([1000, 500, 0], [600]),  # and the other way round
        ([500, 500, 500], [500]),  # no timestep
        ([500], [400]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [float, torch.tensor], ids=["read", "on a device"])
def test_timesteps_that_are_taken(before, after, kept):
    times = LoopTimes()
    for values in (before, after):
        times.require_start({"t": kept(values[0]), "width": kept(3)}, len(before))
        for value in values:
            times.note({"t": kept(value), "width": kept(3)}, len(before))
        times.end()


@pytest.mark.parametrize(("before", "after"), [([1000, 900, 800], 700), ([0.0, 0.3, 0.6], 0.9), ([3, 2, 1], 1)], ids=str)
@pytest.mark.parametrize("kept", [float, torch.tensor], ids=["read", "on a device"])
def test_timesteps_that_go_on_are_refused(before, after, kept):
    times = LoopTimes()
    for value in before:
        times.note({"t": kept(value)}, len(before))
    times.end()
    with pytest.raises(PlanMismatch, match="more steps"):
        times.require_start({"t": kept(after)}, len(before))


@pytest.mark.parametrize("values", [[3, 2, 3, 2], [0, 1, 0], [1000, 500, 0, 1000, 500, 0], [5, 3, 7]], ids=str)
@pytest.mark.parametrize("kept", [float, torch.tensor], ids=["read", "on a device"])
def test_timesteps_that_start_again_are_refused(values, kept):
    times = LoopTimes()

    def run():
        for value in values:
            times.note({"t": kept(value), "width": kept(3)}, len(values))

    with pytest.raises(PlanMismatch, match="another generation has begun"):
        run()


def test_the_numbers_of_a_call():
    """One for all samples, or one for each; not what has more to say, nor switches."""
    call = {
        "x": torch.zeros(2, 4, 8, 8),
        "t": torch.tensor([7, 7]),
        "column": torch.tensor([[0.5], [0.5]]),
        "one": torch.tensor(3, dtype=torch.bfloat16),
        "plain": 4,
        "pooled": torch.zeros(2, 16),
        "empty": torch.zeros(0),
        "flags": torch.tensor([True, True]),
        "turns": torch.ones(2, dtype=torch.complex64),
        "switch": True,
        "name": "x",
        "args": (1.5, None),
        "kwargs": {"sigma": torch.tensor([0.25, 0.25])},
        "elsewhere": torch.zeros(2, device="meta"),
    }
    wanted = {"t": 7.0, "column": 0.5, "one": 3.0, "plain": 4.0, "0": 1.5, "sigma": 0.25}
    assert numbers_of(call) == wanted
