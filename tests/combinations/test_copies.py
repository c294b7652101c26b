"""Saved, copied, moved and shared while a plan is applied: plain, right, or refused."""

import copy
import io
import json
import pickle

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from matrix import combines
from subjects import subject
from untouched import parts

import arrowhead as ah
from arrowhead.errors import AlreadyApplied, AlreadyGenerating, PlanAdapted

GROUP = "Copies"
PIPELINES = {"sd3": "works", "flux": "works"}
KINDS = frozenset({"self_attention", "feed_forward"})


def as_float32(inputs):
    return {n: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


@combines(GROUP, "save_pretrained while applied: what is loaded is plain", PIPELINES)
def test_saved_and_loaded(mechanism, outcome, tmp_path):
    here = subject(mechanism, torch.float32)
    plan, untouched = here.plan(3, KINDS), here.generate(1)
    with here.applied(plan):
        here.pipe.save_pretrained(tmp_path)
        compressed = here.generate(1)
    name = type(here.pipe).__name__
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == name
    missing = {part: None for part, own in here.pipe.components.items() if own is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **missing)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is getattr(diffusers, name)
    assert torch.equal(loaded(**here.inputs(1))[0], untouched)
    with ah.applied(loaded, plan):
        torch.testing.assert_close(loaded(**here.inputs(1))[0], compressed)


@combines(GROUP, "state_dict while applied")
def test_weights_have_their_names(mechanism, outcome):
    here = subject(mechanism)
    before = here.transformer.state_dict()
    with here.applied(here.plan(3, KINDS)):
        assert here.transformer.state_dict().keys() == before.keys()
        here.transformer.load_state_dict(before)


COPY = "refused: the copy would refer to the original's caches; remove first"


@combines(GROUP, "deepcopy or pickle of pipeline, transformer or attention while applied", COPY)
def test_copies_are_refused(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(3, KINDS)
    with here.applied(plan):
        wanted = here.generate(1)
        for carrier in {here.pipe, here.transformer}:
            with pytest.raises(AlreadyApplied, match=r"got a copy.*wanted.*call arrowhead.remove first"):
                copy.deepcopy(carrier)
            for pickled in (pickle.dumps, lambda what: torch.save(what, io.BytesIO())):
                by_pickle = (
                    () if here.adapter is None else (pickle.PicklingError, AttributeError)
                )  # at a forward, which is first
                with pytest.raises((AlreadyApplied, *by_pickle)):
                    pickled(carrier)
        if here.adapter is None:
            for part in (here.transformer.transformer_blocks[0], here.transformer.transformer_blocks[0].attn):
                with pytest.raises(AlreadyApplied, match="got a copy"):
                    copy.deepcopy(part)
        assert torch.equal(here.generate(1), wanted)


@combines(GROUP, "deepcopy after removal: two that know nothing of each other")
def test_a_copy_made_after_removal_is_plain(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(3, KINDS)
    wanted = here.compressed(plan, 1)
    other = copy.deepcopy(here.pipe)
    with torch.no_grad():
        for weight in here.transformer.parameters():
            weight.mul_(1.01)
    changed = here.compressed(plan, 1)
    assert not torch.equal(changed, wanted)
    with here.applied(plan), ah.applied(other, plan, here.adapter):
        assert torch.equal(here.generate(1), changed)
        if here.adapter is None:
            assert torch.equal(other(**here.inputs(1))[0], wanted)


ONE_AT_A_TIME = "works: one after another, each with a scheduler of its own"


@combines(GROUP, "copy.copy(pipe) while applied, for each request", dict.fromkeys(PIPELINES, ONE_AT_A_TIME))
def test_a_shallow_copy_for_each_request(mechanism, outcome):
    """Each copy gives what the pipeline gives; the plan's own scheduler counts, and not that of the pipeline."""
    here = subject(mechanism)
    plan, base = here.plan(3, KINDS), type(here.pipe)
    untouched = [here.generate(seed) for seed in (1, 2)]
    wanted = [here.compressed(plan, seed) for seed in (1, 2)]
    before = parts(here.pipe)
    run = ah.apply(here.pipe, plan)
    copies = [copy.copy(here.pipe), copy.copy(copy.copy(here.pipe))]
    for own in copies:
        own.scheduler = type(own.scheduler).from_config(own.scheduler.config)
    at = {}

    def within(pipe, step, timestep, kwargs):
        at[step] = [each.scheduler.step_index for each in (*copies, here.pipe)]
        with pytest.raises(AlreadyGenerating):
            here.generate(1)
        return kwargs

    for seed, own in ((2, copies[1]), (1, copies[0])):
        assert torch.equal(own(**here.inputs(seed))[0], wanted[seed - 1])
        assert run.summary().steps == 5
        assert run.cache_bytes == 0
    copies[0](**here.inputs(1), callback_on_step_end=within)
    assert at == {step: [step + 1, 5, 5] for step in range(5)}
    assert torch.equal(here.generate(1), wanted[0])
    copies[1].scheduler = type(here.pipe.scheduler).from_config(here.pipe.scheduler.config, shift=7.0)
    with pytest.warns(PlanAdapted):
        assert not torch.equal(copies[1](**here.inputs(2))[0], wanted[1])
    with pytest.raises(AlreadyApplied):
        ah.apply(copies[0], plan)
    del own
    ah.remove(copies.pop())
    assert parts(here.pipe) == before
    assert type(copies[0]) is base
    assert vars(copies[0]).keys() == vars(here.pipe).keys()
    assert torch.equal(here.generate(2), untouched[1])
    assert torch.equal(copies[0](**here.inputs(1))[0], untouched[0])
    with ah.applied(copies[0], plan):
        assert torch.equal(copies[0](**here.inputs(1))[0], wanted[0])
        assert torch.equal(here.pipe(**here.inputs(1))[0], untouched[0])


@combines(GROUP, "to(dtype) while applied")
def test_cast_while_applied(mechanism, outcome):
    """As if it had been cast before; and back again."""
    cast, here = subject(mechanism), subject(mechanism)
    plan = here.plan(3, KINDS)
    wanted = here.compressed(plan, 1)
    cast.pipe.to(torch.float32)

    def generate(it):
        if it.adapter is not None:
            return it.generate(1)  # its loop takes the dtype from the weights
        return it.pipe(**as_float32(it.inputs(1)))[0].clone()

    with cast.applied(plan):
        single = generate(cast)
    assert not torch.equal(single.double(), wanted)
    with here.applied(plan) as run:
        here.generate(1)
        here.pipe.to(torch.float32)
        assert torch.equal(generate(here), single)
        here.pipe.to(torch.float64).to(torch.device("cpu"))
        assert here.generate(1).dtype == torch.float64
        assert run.cache_bytes == 0


@combines(GROUP, "from_pipe while applied: the other pipeline is plain", PIPELINES)
def test_another_pipeline_of_the_same_transformer(mechanism, outcome):
    """Of the same class and of another; a plan is on the pipeline that it was put on."""
    here = subject(mechanism)
    base = type(here.pipe)
    starting = {"sd3": diffusers.StableDiffusion3Img2ImgPipeline, "flux": diffusers.FluxImg2ImgPipeline}[mechanism]
    plan, untouched = here.plan(3, KINDS), here.generate(1)
    here.pipe.vae.register_to_config(shift_factor=0.0)
    size = {"image": torch.zeros(1, 3, 16, 16).double(), "strength": 0.8}

    def started(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(**here.inputs(1, steps=5), **size)[0]

    wanted = started(starting.from_pipe(here.pipe, dtype=torch.float64))
    with here.applied(plan) as run:
        compressed = here.generate(1)
        other, image = (cls.from_pipe(here.pipe, dtype=torch.float64) for cls in (base, starting))
        assert type(other) is base
        other.set_progress_bar_config(disable=True)
        assert torch.equal(other(**here.inputs(1))[0], untouched)
        assert torch.equal(started(image), wanted)
        with pytest.raises(AlreadyApplied, match="remove"):
            ah.apply(other, plan)
        assert torch.equal(here.generate(1), compressed)
        assert run.summary().steps == 5
