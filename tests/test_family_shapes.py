"""The sizes, batches and dtypes of users, for the families other than the first four: oblong, several images, 16 bits."""

import pytest
import torch
from families import MORE
from family_replay import random_cells, replaying
from image_benches import IMAGES
from replay import distance, trace
from test_families import INNER, STEPS, fewer, plan_of, with_and_without

from arrowhead import applied
from arrowhead.models.find import find

OBLONG = (
    {  # the size in a call, and its number of visual tokens
        "wan": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "wan22": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "qwen": ({"height": 48, "width": 112}, 3 * 7),
        "chroma": ({"height": 48, "width": 112}, 3 * 7),
        "hunyuan_video": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "ltx": ({"height": 160, "width": 96, "num_frames": 17}, 3 * 5 * 3),
        "cogvideox": ({"height": 48, "width": 80, "num_frames": 9}, 3 * 3 * 5),
        "allegro": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "latte": ({"height": 80, "width": 48}, 3 * 5 * 3),
        "mochi": ({"height": 80, "width": 48, "num_frames": 13}, 3 * 5 * 3),
        "aura_flow": ({"height": 48, "width": 112}, 3 * 7),
        "hunyuan_dit": ({"height": 48, "width": 112}, 3 * 7),
        "lumina2": ({"height": 48, "width": 112}, 3 * 7),
        "flux2": ({"height": 48, "width": 112}, 3 * 7),
        "z_image": ({"height": 80, "width": 112}, 64),  # 5 × 7, padded
        "ovis_image": ({"height": 48, "width": 112}, 3 * 7),
        "bria": ({"height": 48, "width": 112}, 3 * 7),
        "cogview4": ({"height": 48, "width": 112}, 3 * 7),
        "cogview3": ({"height": 48, "width": 112}, 3 * 7),
        "skyreels": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "hunyuan_video15": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "easy_animate": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "chrono_edit": ({"height": 80, "width": 48, "num_frames": 5}, 2 * 5 * 3),
        "anyflow": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "cosmos": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "kandinsky5": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "ltx2": ({"height": 160, "width": 96, "num_frames": 17}, 3 * 5 * 3),
        "framepack": ({"height": 80, "width": 48}, (2 + 2) * 5 * 3 + 3 * 2 + 4 * 2),
        "wan_animate": ({"height": 80, "width": 48}, 3 * 5 * 3),
        "helios": ({"height": 80, "width": 48}, (2 + 2) * 5 * 3 + 3 * 2 + 2),
        "motif": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
        "wan_vace": ({"height": 80, "width": 48, "num_frames": 9}, 3 * 5 * 3),
    }
    | dict.fromkeys(IMAGES, ({"height": 48, "width": 112}, 3 * 7))
    | {
        "glm_image": ({"height": 96, "width": 64}, 6 * 4),
        "hunyuan_image": ({"height": 96, "width": 224}, 3 * 7),
        "hidream": ({"height": 48, "width": 112}, 16),  # 2 × 6, padded to the largest image
        "stable_audio": ({}, 20),  # of one length
        "ace_step": ({"audio_duration": 2.0}, 25),
        "longcat_audio": ({"audio_duration_s": 2.5}, 25),
    }
)
SEVERAL = ["qwen", "aura_flow", "allegro", "latte", "hunyuan_dit", "flux2", "z_image"]
"""The families whose pipelines repeat embeddings and masks for several images of a prompt."""

PER_PROMPT = {"allegro": "num_videos_per_prompt"}


def compare(name, dtype, visual=None, made=lambda bench: bench, **inputs):
    """Run a random plan: returns its distance from its replay, and that of the replay from the untouched run."""
    bench, guided = made(MORE[name](dtype)), inputs["guidance"] > 1
    bench.visual = visual or bench.visual
    model = find(bench.pipe, INNER)
    cells = random_cells(7, model.sites, STEPS, guided, bench.switch)
    plan = plan_of(bench, model, cells, guided)
    with applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(**inputs))
        assert run.summary().notes == ()
        assert run.summary().flops.module == pytest.approx(plan.flops().module)
    with replaying(bench, model.modules, cells, guided):
        wanted = trace(bench, bench.inputs(**inputs))
    return distance(given, wanted), distance(wanted, trace(bench, bench.inputs(**inputs)))


@pytest.mark.parametrize(
    ("name", "images"),
    [pytest.param(name, n, id=f"{n}-{name}", marks=fewer(name, n == 3)) for n in (1, 3) for name in MORE],
)
@with_and_without
def test_oblong(name, guidance, images):
    more, visual = OBLONG[name]
    apart, changed = compare(name, torch.float64, visual, guidance=guidance, images=images, **more)
    assert apart < 1e-5
    assert changed > 1e-2


@pytest.mark.parametrize("name", SEVERAL)
@with_and_without
@pytest.mark.parametrize("images", [1, 2])
def test_several_images_of_a_prompt(name, guidance, images):
    several = {PER_PROMPT.get(name, "num_images_per_prompt"): 2}
    apart, changed = compare(name, torch.float64, guidance=guidance, images=images, **several)
    assert apart < 1e-5
    assert changed > 1e-2


@with_and_without
def test_texts_of_other_lengths_in_one_batch(guidance):
    """Mochi attends to each sample's text without padding: here to none, some and all of it."""
    masks = {"prompt_attention_mask": torch.arange(7).lt(torch.tensor([[0], [4], [7]]))}
    masks["negative_prompt_attention_mask"] = masks["prompt_attention_mask"].flip(0)
    masks = masks if guidance > 1 else {"prompt_attention_mask": masks["prompt_attention_mask"]}
    apart, changed = compare("mochi", torch.float64, guidance=guidance, images=3, **masks)
    assert apart < 1e-5
    assert changed > 1e-2


@with_and_without
def test_frames_that_are_padding(guidance):
    """Allegro's transformer takes a mask of the video, which its pipeline never gives: a band is ANDed with it."""

    def masked(bench):
        def forward(hidden_states, **kwargs):
            shown = torch.ones(len(hidden_states), *hidden_states.shape[2:])
            shown[::2, 1, 4:] = 0  # of every other sample half of the second frame
            return type(bench.pipe.transformer).forward(bench.pipe.transformer, hidden_states, attention_mask=shown, **kwargs)

        bench.pipe.transformer.forward = forward
        return bench

    inputs = {"guidance": guidance, "images": 2}
    plain, shown = (trace(bench, bench.inputs(**inputs)) for bench in (MORE["allegro"](), masked(MORE["allegro"]())))
    assert distance(shown, plain) > 1e-2
    apart, changed = compare("allegro", torch.float64, made=masked, **inputs)
    assert apart < 1e-5
    assert changed > 1e-2


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{dtype}-{name}", marks=fewer(name, dtype == torch.bfloat16))
        for dtype in (torch.float32, torch.bfloat16)
        for name in MORE
    ],
)
@with_and_without
def test_in_other_precisions(name, guidance, dtype):
    apart, changed = compare(name, dtype, guidance=guidance, images=2)
    assert apart < (1e-3 if dtype == torch.float32 else changed / 2)
