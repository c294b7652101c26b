"""Stacks in the uses that a pipeline is put to: ControlNets, reference images, compiled models, texts, guidance that ends."""

import pytest
import torch
from budget import flux
from families import MORE
from replay import distance, trace
from test_circumstances import cut
from test_stack import ALL, blocks_of, replayed
from test_variants import steps_of, variant
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import PlanAdapted
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL

USES = [
    "StableDiffusion3ControlNetPipeline",
    "StableDiffusion3Img2ImgPipeline",
    "FluxControlNetPipeline",
    "FluxKontextPipeline",
    "QwenImageControlNetPipeline",
    "QwenImageEditPipeline",
    "ZImageControlNetPipeline",
    "HunyuanDiTControlNetPipeline",
    "WanVideoToVideoPipeline",
    "ChromaInpaintPipeline",
]


def solved(bench, inputs, steps):
    """A plan that skips half of the steps, from a watched generation."""
    profile = ah.profile(bench.pipe, inputs, progress=False)
    return ah.solve(profile, ah.Budget(transformer_flops=0.5 + 0.5 * profile.skipped_flops + 0.5 / steps))


@pytest.mark.parametrize("name", USES)
def test_variants(name, monkeypatch):
    bench = variant(name, monkeypatch)
    with left_as_it_was(bench):
        plan = solved(bench, bench.inputs(), steps_of(bench))
    column = [cell for (cell,) in plan.cells]
    assert 0 < column.count(FULL) < len(column) == steps_of(bench)
    with ah.applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(seed=1))
        assert run.summary().notes == ()
    with replayed(bench, column, plan.guided):
        wanted = trace(bench, bench.inputs(seed=1))
    assert distance(given, wanted) < 1e-6
    assert distance(given, trace(bench, bench.inputs(seed=1))) > 1e-9


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "z_image", "wan"])
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_compiled(name, whole):
    bench = ALL[name](torch.float32)
    plan = solved(bench, bench.inputs(), 5)
    with ah.applied(bench.pipe, plan):
        wanted = trace(bench, bench.inputs(seed=1)).result
    untouched = trace(bench, bench.inputs(seed=1)).result
    torch.compiler.reset()
    transformer = bench.pipe.transformer
    try:
        if whole:
            transformer.compile(backend="eager")
        else:
            for block in blocks_of(transformer, find(bench.pipe, {"stack"})):
                block.compile(backend="eager")
        with ah.applied(bench.pipe, plan):
            torch.testing.assert_close(bench.pipe(**bench.inputs(seed=1))[0], wanted)
        torch.testing.assert_close(bench.pipe(**bench.inputs(seed=1))[0], untouched)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("lengths", [(3, 3), (3, 6), (6, 2)], ids=str)
@pytest.mark.parametrize("name", ["qwen", "lumina2"])
def test_prompts_of_any_length(name, lengths):
    """In the watched generation, and in those that follow."""
    bench = MORE[name]()
    plan = solved(bench, cut(bench.inputs(), *lengths), 5)
    column = [cell for (cell,) in plan.cells]
    for texts in (lengths, (5, 4)):
        with ah.applied(bench.pipe, plan):
            given = trace(bench, cut(bench.inputs(seed=1), *texts))
        with replayed(bench, column, guided=True):
            wanted = trace(bench, cut(bench.inputs(seed=1), *texts))
        assert distance(given, wanted) < 1e-6


@pytest.mark.parametrize("name", ["z_image", "lumina2"])
def test_guidance_that_ends_on_the_way(name):
    bench = MORE[name]()
    plan = solved(bench, bench.inputs(), 5)
    column = [cell for (cell,) in plan.cells]
    ending = {"cfg_truncation": 0.3} if name == "z_image" else {"cfg_trunc_ratio": 0.5}
    with ah.applied(bench.pipe, plan) as run:
        with pytest.warns(PlanAdapted, match="guidance ends before step"):
            given = trace(bench, bench.inputs(**ending))
        ends = int(run.summary().notes[-1].split("before step ")[1][0])
    with replayed(bench, column, guided=True, ends=ends):
        wanted = trace(bench, bench.inputs(**ending))
    assert distance(given, wanted) < 1e-6


def test_other_steps_are_carried_over():
    bench = flux()
    plan = solved(bench, bench.inputs(steps=8), 8)
    with ah.applied(bench.pipe, plan), pytest.warns(PlanAdapted, match="steps 5, was 8"):
        given = trace(bench, bench.inputs(steps=5, seed=1))
    levels = bench.pipe.scheduler.timesteps / bench.pipe.scheduler.config.num_train_timesteps
    column = [cell for (cell,) in plan.resample(levels=levels.tolist()).cells]
    with replayed(bench, column, guided=True):
        wanted = trace(bench, bench.inputs(steps=5, seed=1))
    assert distance(given, wanted) < 1e-6
