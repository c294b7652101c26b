"""Thirty calls of a day, each with other prompts, sizes, steps and batches: one plan serves them all, and each is right."""

import random
from dataclasses import replace

import diffusers
import pytest
from families import MORE
from family_replay import random_cells, replaying
from replay import distance, trace
from test_circumstances import cut
from test_families import plan_of
from test_variants import VARIANTS
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.plans.cells import Attend

pytestmark = pytest.mark.filterwarnings("ignore::arrowhead.errors.ArrowheadWarning")
SIZES = {"qwen": (64, 80, 96), "wan": (32, 48, 64), "flux": (64, 64, 64)}
CELL = {"qwen": 16, "wan": 16, "flux": 16}


def made(name):
    if name != "flux":
        return MORE[name]()
    make, how = VARIANTS["FluxImg2ImgPipeline"]
    return make(diffusers.FluxImg2ImgPipeline, **how)


def a_call(draw, name, bench):
    """The arguments of a call, its visual tokens, whether it is guided, and the lengths of its texts."""
    steps, height, width = draw.randint(1, 9), draw.choice(SIZES[name]), draw.choice(SIZES[name])
    seed, images = draw.randrange(1000), draw.randint(1, 3)
    more = {"num_inference_steps": steps} if name == "flux" else {"steps": steps, "height": height, "width": width}
    if name == "flux":
        more["strength"] = draw.uniform(1 / steps, 1)
    elif draw.random() < 0.2:
        more["guidance"] = 1.0
    lengths = (draw.randint(1, 7), draw.randint(1, 7)) if name == "qwen" else None

    def inputs():
        call = bench.inputs(seed=seed, images=images, **more)
        return call if lengths is None else cut(call, *lengths)

    visual = bench.visual if name == "flux" else (height // CELL[name]) * (width // CELL[name]) * (2 if name == "wan" else 1)
    return inputs, visual, more.get("guidance", 3.0) > 1, lengths


@pytest.mark.parametrize("name", SIZES)
def test_thirty_calls(name):
    draw, bench = random.Random(len(name)), made(name)
    model, usual = find(bench.pipe), bench.visual
    steps = 6
    own = plan_of(bench, model, random_cells(1, model.sites, steps, share=True))
    bench.pipe.scheduler.set_timesteps(steps, **({"mu": 0.5} if bench.pipe.scheduler.config.use_dynamic_shifting else {}))
    levels = tuple(float(step) / 1000 for step in bench.pipe.scheduler.timesteps)
    own = replace(own, target=replace(own.target, levels=levels))
    with left_as_it_was(bench):
        for _ in range(30):
            inputs, visual, guided, lengths = a_call(draw, name, bench)
            with ah.applied(bench.pipe, own) as run:
                given = trace(bench, inputs())
                assert run.cache_bytes == 0
                summary = run.summary()
            here = find(bench.pipe).levels
            rows = own.resample(tokens=replace(own.tokens, visual=visual), levels=here).cells
            assert summary.steps == summary.planned_steps == len(rows)
            if lengths is not None and lengths[0] != lengths[1]:
                rows = [
                    [replace(cell, share_cfg=False) if site.joint and isinstance(cell, Attend) else cell
                     for site, cell in zip(model.sites, row, strict=True)] for row in rows
                ]  # fmt: skip
            bench.visual = visual
            with replaying(bench, model.modules, rows, guided):
                wanted = trace(bench, inputs())
            bench.visual = usual
            assert distance(given, wanted) < 1e-5
