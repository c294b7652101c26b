"""Generations under other circumstances than the plan's: what is carried over is right, and said; nothing else ever happens."""

import re
import warnings
from contextlib import contextmanager
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from families import MORE, lumina2, qwen, wan
from family_replay import random_cells, replaying
from independent import reads, renews
from pipelines import dit, pixart_sigma
from replay import assert_same, cell, distance, plan, random_grid, replay, trace
from seeds import seeds
from test_families import plan_of
from test_variants import VARIANTS
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import ArrowheadWarning, InputsInvalid, PlanAdapted, PlanMismatch
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL, Arrow, Attend, Box, Full, Reuse
from arrowhead.plans.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::arrowhead.errors.ArrowheadWarning")
LETTERS = {cell(letter, 2, 5): letter for letter in "FCRDwvWVxyXYE"}
STEPS = 5


@contextmanager
def quiet():
    """No warning of arrowhead's is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArrowheadWarning)
        yield


def levels_of(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    return tuple(float(step) / pipe.scheduler.config.num_train_timesteps for step in pipe.scheduler.timesteps)


def with_levels(the_plan, levels):
    return replace(the_plan, target=replace(the_plan.target, levels=tuple(levels)))


def letters_of(the_plan):
    return ["".join(LETTERS[each] for each in row) for row in the_plan.cells]


def runnable(cells, sites):
    """These cells, with full attention for whatever reads something that no step before it computed."""
    columns = []
    for site, column in zip(sites, zip(*cells, strict=True), strict=True):
        found = []
        for step, each in enumerate(column):
            if isinstance(each, Reuse):
                found.append(FULL if not any(isinstance(before, Attend) for before in found) else each)
                continue
            methods = []
            for head, method in enumerate(each.methods(site.heads)):
                one = [before.of_head(head) for before in found] + [Attend(method)]
                kept = all(any(renews(before, what, 1) for before in one[:step]) for what in reads(one, step, 1))
                methods.append(method if kept else Full())
            found.append(Attend(tuple(methods), each.share_cfg))
        columns.append(found)
    return [*zip(*columns, strict=True)]


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 10])
@pytest.mark.parametrize("make", [dit, pixart_sigma])
def test_other_steps(make, steps):
    bench = make()
    own = plan(bench, random_grid(steps, STEPS, bench.layers))
    rows = letters_of(own.resample(steps=steps))
    with left_as_it_was(bench), ah.applied(bench.pipe, own) as run:
        with pytest.warns(
            PlanAdapted, match=rf"steps {steps}, was 5.*leaves \d+% of the modules' FLOPs, where.*changes='refuse'"
        ):
            given = trace(bench, bench.inputs(steps=steps))
        assert run.summary().planned_steps == steps
        assert f"steps {steps}, was 5" in run.summary().notes[0]
        with quiet():
            again = trace(bench, bench.inputs(steps=steps))  # said once, noted again
        assert f"steps {steps}, was 5" in run.summary().notes[0]
        assert run.cache_bytes == 0
        whole = trace(bench, bench.inputs())
        assert run.summary().notes == ()
    assert_same(given, replay(bench, rows, bench.inputs(steps=steps)))
    assert_same(again, given)
    assert_same(whole, replay(bench, letters_of(own), bench.inputs()))


def test_other_noise_levels_of_as_many_steps():
    """Each step takes the row of the step whose noise it removes: with a shift, the first rows serve longer."""
    bench = dit()
    own = with_levels(plan(bench, ["FFF", "RRR", "FFF", "RRR", "WXW"]), levels_of(bench.pipe, STEPS))
    with ah.applied(bench.pipe, own) as run:
        with quiet():
            trace(bench, bench.inputs())
        assert run.summary().notes == ()
        bench.pipe.scheduler = DPMSolverMultistepScheduler.from_config(bench.pipe.scheduler.config, use_karras_sigmas=True)
        with pytest.warns(PlanAdapted, match="levels .* was .*use_karras_sigmas: plan False, pipeline True"):
            given = trace(bench, bench.inputs())
    rows = letters_of(own.resample(levels=levels_of(bench.pipe, STEPS)))
    assert rows != letters_of(own)
    assert_same(given, replay(bench, rows, bench.inputs()))


@pytest.mark.parametrize("steps", [5, 8])
def test_another_scheduler(steps):
    bench = dit()
    rows = [re.sub("[DE]", "R", row) for row in random_grid(1, STEPS, 3)]  # slopes would be those of other letters
    own = with_levels(plan(bench, rows), levels_of(bench.pipe, STEPS))
    with ah.applied(bench.pipe, own):
        bench.pipe.scheduler = DDIMScheduler.from_config(bench.pipe.scheduler.config)
        with pytest.warns(PlanAdapted, match="scheduler: plan DPMSolverMultistepScheduler, pipeline DDIMScheduler"):
            given = trace(bench, bench.inputs(steps=steps))
    rows = letters_of(own.resample(levels=levels_of(bench.pipe, steps)))
    assert_same(given, replay(bench, rows, bench.inputs(steps=steps)))


@pytest.mark.parametrize("strength", [0.2, 0.4, 0.6])
def test_a_strength_is_the_plans_end(strength):
    make, how = VARIANTS["FluxImg2ImgPipeline"]
    bench = make(diffusers.FluxImg2ImgPipeline, **how)
    model = find(bench.pipe)
    inputs = {"strength": 1.0, "num_inference_steps": 5}
    cells = random_cells(3, model.sites, 5, share=True)
    with ah.applied(bench.pipe, ah.search(bench.pipe, bench.inputs(**inputs), threshold=0.1, progress=False)) as run:
        levels = run.plan.target.levels
    assert len(levels) == 5
    own = Plan(tuple(map(tuple, cells)), replace(target_of(model), levels=levels), run.plan.tokens, True, {}, 2)
    inputs |= {"strength": strength}
    with left_as_it_was(bench), ah.applied(bench.pipe, own) as run:
        given = trace(bench, bench.inputs(**inputs))
        summary = run.summary()
    kept = round(5 * strength)
    assert summary.steps == summary.planned_steps == kept
    with replaying(bench, model.modules, runnable(cells[5 - kept :], model.sites), True):
        wanted = trace(bench, bench.inputs(**inputs))
    assert distance(given, wanted) < 1e-5


def test_another_size():
    bench = pixart_sigma()
    own = plan(bench, ["FFF", "WXV", "RRW", "CwR", "VYR"])
    with left_as_it_was(bench), ah.applied(bench.pipe, own) as run:
        with pytest.warns(PlanAdapted, match=r"tokens .*visual=24.*was .*visual=16"):
            given = trace(bench, bench.inputs(height=24))
        assert run.summary().flops.module == pytest.approx(own.resample(tokens=replace(own.tokens, visual=24)).flops().module)
    assert_same(given, replay(bench, letters_of(own), bench.inputs(height=24), near=3, far=8))  # 2 and 5 times 24 / 16, rounded


def test_boxes_on_another_grid_and_on_none():
    bench = wan()
    model = find(bench.pipe)
    box = Attend(Arrow(Box(rows=1, columns=1)))
    tokens = model.tokens(model.transformer_arguments((), {"hidden_states": torch.zeros(1, 4, 2, 8, 6), "timestep": None,
                                                           "encoder_hidden_states": torch.zeros(1, 7, 8)}))  # fmt: skip
    own = Plan(((FULL,) * 2, *((box,) * 2,) * 4), target_of(model), tokens, True, {}, 2)
    bench.grid = replace(own.tokens.grid, rows=6)
    with ah.applied(bench.pipe, own), pytest.warns(PlanAdapted, match="rows=6"):
        given = trace(bench, bench.inputs(height=96))
    bench.visual = bench.grid.size
    wider = Attend(Arrow(Box(rows=2, columns=1)))  # 1 of 4 rows is 1.5 of 6
    with replaying(bench, model.modules, [(FULL,) * 2, *[(wider,) * 2] * 4], True):
        wanted = trace(bench, bench.inputs(height=96))
    assert distance(given, wanted) < 1e-5


def cut(inputs, prompt, negative):
    """The prompts with so many tokens: without the others, or, for Lumina 2, with the others masked."""
    for prefix, length in (("", prompt), ("negative_", negative)):
        embeds, mask = f"{prefix}prompt_embeds", f"{prefix}prompt_embeds_mask"
        if mask in inputs:
            inputs[embeds] = inputs[embeds][:, :length]
            inputs[mask] = torch.ones(inputs[embeds].shape[:2], dtype=torch.bool)
        else:
            shown = torch.arange(inputs[embeds].shape[1]).lt(length)
            inputs[f"{prefix}prompt_attention_mask"] = shown.expand(len(inputs[embeds]), -1)
    return inputs


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("lengths", [(3, 3), (3, 6), (6, 2)], ids=str)
@pytest.mark.parametrize("make", [qwen, lumina2])
def test_prompts_of_any_length(make, lengths, seed):
    """Where both have one length the plan is as it was; else the branches share nothing that has text in it."""
    bench = make()
    model = find(bench.pipe)
    cells = random_cells(seed, model.sites, STEPS, share=True)
    apart = [
        [replace(each, share_cfg=False) if site.joint and isinstance(each, Attend) else each
         for site, each in zip(model.sites, row, strict=True)] for row in cells
    ]  # fmt: skip
    own = plan_of(bench, model, cells)
    inputs = {"seed": seed, "images": 1 + seed % 2}
    with left_as_it_was(bench), ah.applied(bench.pipe, own) as run:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            given = trace(bench, cut(bench.inputs(**inputs), *lengths))
        notes, spent = run.summary().notes, run.summary().flops.module
        assert run.cache_bytes == 0
    same = lengths[0] == lengths[1] or apart == [[*row] for row in cells]
    assert [each for each in caught if issubclass(each.category, PlanAdapted)] == [] if same else notes
    assert ("other lengths" in "".join(notes)) is not same
    with replaying(bench, model.modules, cells if same else apart, True):
        wanted = trace(bench, cut(bench.inputs(**inputs), *lengths))
    assert distance(given, wanted) < 1e-5
    assert distance(given, trace(bench, cut(bench.inputs(**inputs), *lengths))) > 1e-3
    if lengths[0] == lengths[1]:
        text = replace(own.tokens, text=lengths[0])
        assert spent == pytest.approx(replace(own, tokens=text).flops().module)


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", ["z_image", "lumina2"])
def test_guidance_that_ends_on_the_way(name, seed):
    bench = MORE[name]()
    model = find(bench.pipe)
    cells = random_cells(seed, model.sites, STEPS, share=True)
    ending = {"cfg_truncation": 0.3} if name == "z_image" else {"cfg_trunc_ratio": 0.5}
    inputs = {"seed": seed, "images": 1 + seed % 2, **ending}
    with left_as_it_was(bench), ah.applied(bench.pipe, plan_of(bench, model, cells)) as run:
        with pytest.warns(PlanAdapted, match="guidance ends before step"):
            given = trace(bench, bench.inputs(**inputs))
        note = run.summary().notes[-1]
        assert run.cache_bytes == 0
    ends = int(note.split("before step ")[1][0])
    assert 0 < ends < STEPS
    with replaying(bench, model.modules, cells, True, ends):
        wanted = trace(bench, bench.inputs(**inputs))
    assert distance(given, wanted) < 1e-5
    assert distance(given, trace(bench, bench.inputs(**inputs))) > 1e-3
    with pytest.raises(InputsInvalid, match=r"cfg_trunc.*leave it out"):
        ah.search(bench.pipe, bench.inputs(**ending), threshold=0.5, progress=False)
    with (
        ah.applied(bench.pipe, plan_of(bench, model, cells), changes="refuse"),
        pytest.raises(InputsInvalid, match=r"cfg_trunc.*leave it out"),
    ):
        bench.pipe(**bench.inputs(**ending))


class TestRefuse:
    """What `changes="refuse"` says, and that the pipeline is as it was."""

    @pytest.mark.parametrize("steps", [3, 6])
    def test_other_steps(self, steps):
        bench = pixart_sigma()
        own = plan(bench, ["FFF", "WXV", "RRW", "CwR", "VYR"])
        with left_as_it_was(bench), ah.applied(bench.pipe, own, changes="refuse") as run:
            with pytest.raises(PlanMismatch, match=rf"plan is for 5 steps.*runs {steps}.*search again with {steps} steps"):
                bench.pipe(**bench.inputs(steps=steps))
            assert run.cache_bytes == 0

    def test_other_levels(self):
        bench = pixart_sigma()
        own = with_levels(plan(bench, ["FFF"] * 5), [1.0, 0.9, 0.8, 0.7, 0.6])
        with ah.applied(bench.pipe, own, changes="refuse"), pytest.raises(PlanMismatch, match="other noise levels"):
            bench.pipe(**bench.inputs())

    @pytest.mark.parametrize("wrong", ["", None, "allow", 1, True])
    def test_no_such_way(self, wrong):
        bench = dit()
        with left_as_it_was(bench), pytest.raises(InputsInvalid, match="wanted 'adapt' or 'refuse'"):
            ah.apply(bench.pipe, plan(bench, ["FFF"] * 5), changes=wrong)
