"""What real use brings: schedulers of every kind, offloading, lists of generators, exchanged parts, Ctrl-C in the bar."""

import sys

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from pipelines import dit, dit_transformer, pixart_sigma
from replay import assert_identical, assert_same, compressed, plan, trace
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import InputsInvalid, NotIntercepted, PlanMismatch

SEARCH = sys.modules["arrowhead.searches.api"]  # the module: `ah.search` is its function
MIXED = ["FFF", "WRC", "RVF", "WWR", "RCV"]
SCHEDULERS = {
    "DPMSolverSinglestepScheduler": {},  # changes a setting of its own whenever it begins
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
    "HeunDiscreteScheduler": {},
    "DDPMScheduler": {"trained_betas": torch.linspace(1e-4, 0.02, 1000).numpy()},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_plan_goes_round_and_comes_back(name, tmp_path):
    """Searched, saved, loaded, and applied to a pipeline whose scheduler was saved and loaded too."""
    bench = dit()
    bench.pipe.register_modules(scheduler=getattr(diffusers, name)(**SCHEDULERS[name]))
    ah.search(bench.pipe, bench.inputs(), threshold=0.5, progress=False).save(tmp_path / "plan.json")
    loaded = ah.Plan.load(tmp_path / "plan.json")
    torch.manual_seed(0)  # some samplers draw noise of their own
    same = compressed(bench, loaded, bench.inputs())
    bench.pipe.scheduler.save_pretrained(tmp_path)
    bench.pipe.register_modules(scheduler=type(bench.pipe.scheduler).from_pretrained(tmp_path))
    torch.manual_seed(0)
    assert_identical(compressed(bench, loaded, bench.inputs()), same)


def test_other_betas_of_the_same_length_are_another_scheduler():
    bench = dit()
    betas = torch.linspace(1e-4, 0.02, 2000)
    bench.pipe.register_modules(scheduler=diffusers.DDPMScheduler(2000, trained_betas=betas.numpy()))
    the_plan = plan(bench, MIXED)
    betas[1000] *= 1.01
    bench.pipe.register_modules(scheduler=diffusers.DDPMScheduler(2000, trained_betas=betas.numpy()))
    with pytest.raises(PlanMismatch, match="trained_betas"):
        ah.apply(bench.pipe, the_plan, changes="refuse")


def test_offloaded_weights_change_nothing():
    """accelerate hooks every module, and brings weights only when a module is really called (PixArt alone fails so, too)."""
    bench = dit()
    the_plan = plan(bench, MIXED)
    wanted = compressed(bench, the_plan, bench.inputs(images=2))
    found = ah.search(bench.pipe, bench.inputs(), threshold=0.5, progress=False)
    cpu_offload(bench.pipe.transformer, execution_device=torch.device("cpu"))
    assert_same(compressed(bench, the_plan, bench.inputs(images=2)), wanted)
    assert ah.search(bench.pipe, bench.inputs(), threshold=0.5, progress=False) == found


def test_a_list_of_generators_is_left_as_it_was(either):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    states = [g.get_state() for g in generators]
    found = ah.search(either.pipe, either.inputs(images=2, generator=generators), threshold=0.5, progress=False)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))
    assert found.about["seeds"] == [3, 4]


def test_an_interrupt_in_the_progress_bar_leaves_nothing(either, monkeypatch):
    """The exception is kept, as an interactive session does: what it refers to stays alive."""

    class Bar(SEARCH.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    with left_as_it_was(either):
        monkeypatch.setattr(SEARCH, "tqdm", Bar)
        with pytest.raises(KeyboardInterrupt) as kept:
            ah.search(either.pipe, either.inputs(), threshold=0.5, progress=False)
        monkeypatch.undo()
    assert kept.value.__traceback__ is not None


def test_an_exchanged_transformer_is_refused():
    bench = dit()
    own, other = bench.pipe.transformer, dit_transformer(seed=1, num_embeds_ada_norm=1000).double()
    with ah.applied(bench.pipe, plan(bench, MIXED)) as run:
        bench.pipe.transformer = other
        with pytest.raises(PlanMismatch, match="exchanged"):
            bench.pipe(**bench.inputs())
        bench.pipe.transformer = own
        bench.pipe(**bench.inputs())
        assert run.summary().steps == 5


def test_a_block_that_is_skipped_when_it_should_write_is_named(either):
    """As a cache of whole blocks does it."""
    block = either.pipe.transformer.transformer_blocks[1]
    own, calls = block.forward, []

    def sometimes(hidden_states, *args, **kwargs):
        calls.append(1)
        return hidden_states if len(calls) == 1 else own(hidden_states, *args, **kwargs)

    block.forward = sometimes
    with ah.applied(either.pipe, plan(either, MIXED)), pytest.raises(NotIntercepted, match=r"transformer_blocks\.1\.attn1"):
        either.pipe(**either.inputs())
    del block.forward


@pytest.mark.parametrize("step", range(-1, 5))
def test_a_block_that_is_skipped_is_refused(either, step):
    """In one step, or in each (-1): the picture would be another cache's, and the figures the plan's."""
    block, the_plan = either.pipe.transformer.transformer_blocks[2], plan(either, ["FFF", "FFR", "FFR", "FFR", "FFR"])
    own, calls = block.forward, []
    fresh = compressed(either, the_plan, either.inputs())

    def sometimes(hidden_states, *args, **kwargs):
        calls.append(1)
        return hidden_states if step in (-1, len(calls) - 1) else own(hidden_states, *args, **kwargs)

    with ah.applied(either.pipe, the_plan) as run:
        block.forward = sometimes
        if step == 0:  # and what it should have stored is missing
            said = "transformer_blocks.2.attn1"
        else:
            said = rf"transformer_blocks\.2\.attn1: got no call of it in 1 of the first {max(step, 0) + 1} calls"
        with pytest.raises(NotIntercepted, match=said):
            either.pipe(**either.inputs())
        assert len(calls) == max(step, 0) + 1
        assert run.cache_bytes == 0
        del block.forward
        assert_identical(trace(either, either.inputs()), fresh)


def test_weights_that_are_not_finite_are_said_to_be(either):
    with torch.no_grad():
        either.attentions[0].to_v.weight[0, 0] = torch.nan
    with pytest.raises(InputsInvalid, match="not finite"):
        ah.search(either.pipe, either.inputs(), threshold=0.5, progress=False)


def test_callbacks_and_negative_prompts_see_the_same_call():
    bench, seen = pixart_sigma(), []
    calls = {"callback": lambda step, *_: seen.append(step), "callback_steps": 1}
    wanted = trace(bench, bench.inputs())
    assert_identical(compressed(bench, plan(bench, ["FFF"] * 5), bench.inputs(**calls)), wanted)
    assert seen == [0, 1, 2, 3, 4]
