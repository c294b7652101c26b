"""Sizes, batches and numbers that users have, for the families beyond the first four: oblong, several at once, 16 bits."""

import pytest
import torch
from families import MORE
from family_replay import random_cells, replaying
from replay import distance, trace
from test_families import INNER, STEPS, plan_of, with_and_without

from arrowhead import applied
from arrowhead.models import find

OBLONG = {  # what a call says, and how many visual tokens that is
    "wan": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
    "qwen": ({"height": 48, "width": 112}, 3 * 7),
    "chroma": ({"height": 48, "width": 112}, 3 * 7),
    "hunyuan_video": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
    "ltx": ({"height": 160, "width": 96, "num_frames": 17}, 3 * 5 * 3),
    "cogvideox": ({"height": 48, "width": 80, "num_frames": 9}, 3 * 3 * 5),
    "aura_flow": ({"height": 48, "width": 112}, 3 * 7),
    "hunyuan_dit": ({"height": 48, "width": 112}, 3 * 7),
    "lumina2": ({"height": 48, "width": 112}, 3 * 7),
    "flux2": ({"height": 48, "width": 112}, 3 * 7),
    "z_image": ({"height": 80, "width": 112}, 64),  # 5 × 7, padded
}
SEVERAL = [
    "qwen",
    "aura_flow",
    "hunyuan_dit",
    "flux2",
    "z_image",
]  # the others repeat no embeddings, or no masks that come with them


def compare(name, dtype, visual=None, **inputs):
    """A plan at random against its replay: how far apart they are, and how far the replay is from the untouched run."""
    bench, guided = MORE[name](dtype), inputs["guidance"] > 1
    bench.visual = visual or bench.visual
    model = find(bench.pipe, INNER)
    cells = random_cells(7, model.sites, STEPS, guided)
    plan = plan_of(bench, model, cells, guided)
    with applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(**inputs))
        assert run.summary().notes == ()
        assert run.summary().flops.module == pytest.approx(plan.flops().module)
    with replaying(bench, model.modules, cells, guided):
        wanted = trace(bench, bench.inputs(**inputs))
    return distance(given, wanted), distance(wanted, trace(bench, bench.inputs(**inputs)))


@pytest.mark.parametrize("name", MORE)
@with_and_without
@pytest.mark.parametrize("images", [1, 3])
def test_oblong(name, guidance, images):
    more, visual = OBLONG[name]
    apart, changed = compare(name, torch.float64, visual, guidance=guidance, images=images, **more)
    assert apart < 1e-5
    assert changed > 1e-2


@pytest.mark.parametrize("name", SEVERAL)
@with_and_without
@pytest.mark.parametrize("images", [1, 2])
def test_several_images_of_a_prompt(name, guidance, images):
    apart, changed = compare(name, torch.float64, guidance=guidance, images=images, num_images_per_prompt=2)
    assert apart < 1e-5
    assert changed > 1e-2


@pytest.mark.parametrize("name", MORE)
@with_and_without
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_other_precisions(name, guidance, dtype):
    apart, changed = compare(name, dtype, guidance=guidance, images=2)
    assert apart < (1e-3 if dtype == torch.float32 else changed / 2)
