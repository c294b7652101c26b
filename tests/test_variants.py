"""Pipelines that start from an image, inpaint, take reference images, or have a ControlNet."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from budget import flux
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FluxControlNetModel,
    HunyuanDiT2DControlNetModel,
    QwenImageControlNetModel,
    SD3ControlNetModel,
    ZImageControlNetModel,
)
from families import HUNYUAN_TEXTS, FamilyBench, chroma, cogview4, flow, flux2, hunyuan_dit, qwen, wan, wan_transformer, z_image
from family_replay import random_cells, replaying
from image_variants import IMAGE_VARIANTS
from PIL import Image
from pipelines import CAPTION, POOLED, randomise, sd3, vae
from replay import assert_identical, distance, trace
from test_families import INNER, plan_of
from untouched import left_as_it_was
from video_variants import VIDEO_VARIANTS

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.run import CalibrationRun
from arrowhead.errors import PlanMismatch
from arrowhead.models.families import FAMILIES
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL
from arrowhead.plans.layout import Grid

TEXTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
STRENGTH, ALL_STEPS, STEPS = 0.8, 5, 4  # at this strength a pipeline runs the last 4 of 5 steps
PARTS: dict[str, Callable[[int, int], dict[str, Any]]] = {  # further arguments of a call, by images and size
    "image": lambda images, size: {"image": picture(images, size)},
    "mask": lambda images, size: {"image": picture(images, size), "mask_image": triangle(images, size)},
    "mask, control": lambda images, size: PARTS["mask"](images, size) | PARTS["control"](images, size),
    "nothing": lambda images, size: {},
    "control": lambda images, size: {"control_image": picture(images, size)},
    "image, control": lambda images, size: PARTS["image"](images, size) | PARTS["control"](images, size),
    "control, its mask": lambda images, size: PARTS["control"](images, size) | {"control_mask": triangle(images, size)},
    "picture": lambda images, size: {"image": picture(images, size // 2), "max_area": size * size, "_auto_resize": False},
    "picture, mask": lambda images, size: PARTS["mask"](images, size) | {"max_area": size * size, "_auto_resize": False},
    "photo": lambda images, size: {"image": Image.linear_gradient("L").resize((128, 64)).convert("RGB")},
    "photo, mask": lambda images, size: PARTS["mask"](images, size) | PARTS["photo"](images, size),
}


def triangle(images, size):
    return torch.ones(images, 1, size, size).tril()


def picture(images, size):
    return torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(1))


def of_sd3(cls, parts, channels=4, controlnet=False, extra=0):
    base = sd3(num_layers=2, in_channels=channels, out_channels=channels)
    more = {}
    if controlnet:
        sizes = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 4}
        texts = {"joint_attention_dim": CAPTION[1], "caption_projection_dim": 24, "pooled_projection_dim": POOLED}
        control = {"extra_conditioning_channels": extra, "pos_embed_max_size": 8, "out_channels": 4}
        more["controlnet"] = SD3ControlNetModel(**control, **sizes, **texts)
    names = dict.fromkeys((*TEXTS, "text_encoder_3", "tokenizer_3"))
    return made(cls, base, channels, names | more, parts, FamilyBench(None, False, 16, None, CAPTION[0]))


def of_flux(cls, parts, in_channels=16, controlnet=False, distilled=False, pictures=0):
    base = flux(in_channels=in_channels, out_channels=16)
    more = {}
    if controlnet:
        sizes = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1}
        texts = {"joint_attention_dim": CAPTION[1], "pooled_projection_dim": POOLED, "guidance_embeds": True}
        more["controlnet"] = FluxControlNetModel(in_channels=16, axes_dims_rope=(2, 2, 4), **sizes, **texts)
    bench = FamilyBench(None, True, 16 + pictures, None, CAPTION[0], text_first=True, two_calls=not distilled)
    bench.distilled = distilled
    return made(cls, base, 4, dict.fromkeys(TEXTS) | more, parts, bench)


def of_chroma(cls, parts):
    bench = FamilyBench(None, True, 16, None, CAPTION[0], text_first=True, two_calls=True)
    base = chroma()
    base.pipe.transformer.register_to_config(guidance_embeds=False)  # inpainting reads it
    return made(cls, base, 4, {"text_encoder": None, "tokenizer": None}, parts, bench)


def of_qwen(cls, parts, controlnet=False, extra=0, visual=16, one_prompt=False):
    means = {"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4}
    own = AutoencoderKLQwenImage(base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, **means)
    randomise(own, 1)
    more = {"vae": own, "text_encoder": None, "tokenizer": None}
    if controlnet:
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "axes_dims_rope": (2, 2, 4)}
        control = {"in_channels": 16, "joint_attention_dim": CAPTION[1], "extra_condition_channels": extra}
        more["controlnet"] = QwenImageControlNetModel(**control, **sizes)
    more |= {"processor": None} if "Edit" in cls.__name__ else {}
    bench = FamilyBench(None, True, visual, None, CAPTION[0], text_first=True, two_calls=True)
    return made(cls, qwen(), 4, more, parts, bench, halvings=3, one_prompt=one_prompt)


def of_wan(cls, parts, second=False, frames=False):
    """Image to video: the image is in further channels, or, with `frames`, in the latents' first frame, as in Wan 2.2 5B."""
    config = {"in_channels": 4 if frames else 12}
    transformers = {f"transformer{name}": wan_transformer(seed, **config) for seed, name in enumerate(["", "_2"][: 1 + second])}
    means = {"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4}
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **means)
    randomise(vae, 1)
    bench = wan(**transformers, boundary_ratio=0.875 if second else None)
    settings = {"boundary_ratio": bench.pipe.config.boundary_ratio, "expand_timesteps": frames}
    pipe = cls(None, None, vae, flow(), **transformers, **settings).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    own, bench.pipe, bench.switch = bench.inputs, pipe, 2 if second else None
    image = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    bench.inputs = lambda *args, **more: own(*args, image=image, **more)
    return bench


def of_cogview4(cls, parts):
    bench = FamilyBench(None, True, 16, None, CAPTION[0], text_first=True, two_calls=True)
    return made(cls, cogview4(in_channels=8), 4, {"text_encoder": None, "tokenizer": None}, parts, bench, halvings=3)


def of_hunyuan_dit(cls, parts):
    base = hunyuan_dit()
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "sample_size": 8}
    more = {"transformer_num_layers": 4, "activation_fn": "gelu"} | HUNYUAN_TEXTS
    net = HunyuanDiT2DControlNetModel(in_channels=4, patch_size=2, **sizes, **more)
    names = dict.fromkeys([*TEXTS, "safety_checker", "feature_extractor"]) | {"requires_safety_checker": False}
    return made(cls, base, 4, names | {"controlnet": net}, parts, FamilyBench(None, False, 16, None, text_seen=10), halvings=3)


def of_flux2(cls, parts, visual=16, two_calls=False):
    base = flux2()
    bench = FamilyBench(None, True, visual, None, CAPTION[0], text_first=True, two_calls=two_calls)
    bench.distilled = not two_calls
    return made(cls, base, 4, dict.fromkeys(TEXTS[:2]) | {"vae": base.pipe.vae}, parts, bench, halvings=3)


def of_z_image(cls, parts, controls=None):
    more = dict.fromkeys(TEXTS[:2])
    if controls:
        sizes = {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 1}
        places = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
        more["controlnet"] = ZImageControlNetModel(control_in_dim=controls, **places, **sizes)
    return made(cls, z_image(), 4, more, parts, FamilyBench(None, True, 32, None, 32, text_seen=32))


def made(cls, base, channels, more, parts, bench, halvings=1, one_prompt=False):
    """Returns `bench` with a pipeline around the transformer of `base`, with 8 × 8 latents.

    `one_prompt`: the pipeline takes one prompt, and generates several images of it.
    """
    size = 8 * 2**halvings
    if "controlnet" in more:
        randomise(more["controlnet"], 5, sharp=(".attn.",))
    pipe = cls(
        transformer=base.pipe.transformer,
        scheduler=base.pipe.scheduler,
        **{"vae": vae(1, halvings, latent_channels=channels, shift_factor=0.1)} | more,
    )
    pipe.to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    taken = inspect.signature(cls.__call__).parameters

    def inputs(seed=0, images=1, guidance=3.0, steps=ALL_STEPS, **others):
        torch.manual_seed(seed)  # SD3's ControlNet pipeline encodes its image with the global generator
        call = base.inputs(seed=seed, images=1 if one_prompt else images, guidance=guidance, steps=steps)
        call["num_images_per_prompt"] = images if one_prompt else 1
        call |= {"height": size, "width": size, "strength": STRENGTH} | PARTS[parts](images, size)
        return {name: value for name, value in call.items() if name in taken} | others

    bench.pipe, bench.inputs = pipe, inputs
    return bench


VARIANTS: dict[str, tuple[Callable[..., FamilyBench], dict[str, Any]]] = (
    {
        "StableDiffusion3Img2ImgPipeline": (of_sd3, {"parts": "image"}),
        "StableDiffusion3InpaintPipeline": (of_sd3, {"parts": "mask", "channels": 16}),
        "StableDiffusion3ControlNetPipeline": (of_sd3, {"parts": "control", "controlnet": True}),
        "StableDiffusion3ControlNetInpaintingPipeline": (
            of_sd3,
            {"parts": "control, its mask", "controlnet": True, "extra": 1},
        ),
        "FluxImg2ImgPipeline": (of_flux, {"parts": "image"}),
        "FluxInpaintPipeline": (of_flux, {"parts": "mask"}),
        "FluxFillPipeline": (of_flux, {"parts": "mask", "in_channels": 48, "distilled": True}),
        "FluxControlPipeline": (of_flux, {"parts": "control", "in_channels": 32, "distilled": True}),
        "FluxControlNetPipeline": (of_flux, {"parts": "control", "controlnet": True}),
        "FluxControlImg2ImgPipeline": (of_flux, {"parts": "image, control", "in_channels": 32, "distilled": True}),
        "FluxControlInpaintPipeline": (of_flux, {"parts": "mask, control", "in_channels": 32, "distilled": True}),
        "FluxControlNetImg2ImgPipeline": (of_flux, {"parts": "image, control", "controlnet": True, "distilled": True}),
        "FluxControlNetInpaintPipeline": (of_flux, {"parts": "mask, control", "controlnet": True, "distilled": True}),
        "FluxKontextPipeline": (of_flux, {"parts": "picture", "pictures": 2 * 2}),
        "FluxKontextInpaintPipeline": (of_flux, {"parts": "picture, mask", "pictures": 4 * 4}),
        "ChromaImg2ImgPipeline": (of_chroma, {"parts": "image"}),
        "ChromaInpaintPipeline": (of_chroma, {"parts": "mask"}),
        "QwenImageImg2ImgPipeline": (of_qwen, {"parts": "image"}),
        "QwenImageInpaintPipeline": (of_qwen, {"parts": "mask"}),
        "QwenImageControlNetPipeline": (of_qwen, {"parts": "control", "controlnet": True}),
        "QwenImageControlNetInpaintPipeline": (of_qwen, {"parts": "control, its mask", "controlnet": True, "extra": 4}),
        "QwenImageEditPipeline": (of_qwen, {"parts": "photo", "visual": 16 + 2 * 6}),
        "QwenImageEditInpaintPipeline": (of_qwen, {"parts": "photo, mask", "visual": 2 * 6 + 2 * 6}),
        "QwenImageEditPlusPipeline": (of_qwen, {"parts": "photo", "visual": 16 + 2 * 6, "one_prompt": True}),
        "Flux2Pipeline": (of_flux2, {"parts": "nothing"}),
        "Flux2KleinInpaintPipeline": (of_flux2, {"parts": "mask", "visual": 16 + 16, "two_calls": True}),
        "ZImageImg2ImgPipeline": (of_z_image, {"parts": "image"}),
        "ZImageInpaintPipeline": (of_z_image, {"parts": "mask"}),
        "ZImageControlNetPipeline": (of_z_image, {"parts": "control", "controls": 4}),
        "ZImageControlNetInpaintPipeline": (of_z_image, {"parts": "mask, control", "controls": 9}),
        "CogView4ControlPipeline": (of_cogview4, {"parts": "control"}),
        "HunyuanDiTControlNetPipeline": (of_hunyuan_dit, {"parts": "control"}),
        "WanImageToVideoPipeline": (of_wan, {"parts": "image", "second": True}),
        "WanImageToVideoPipeline, 5B": (of_wan, {"parts": "image", "frames": True}),
    }
    | IMAGE_VARIANTS
    | VIDEO_VARIANTS
)
LONG = {  # a budget search with these is a slow test; similar ones are tested always
    "StableDiffusion3ControlNetInpaintingPipeline",
    "FluxControlImg2ImgPipeline",
    "FluxControlInpaintPipeline",
    "FluxControlNetImg2ImgPipeline",
    "FluxControlNetInpaintPipeline",
    "FluxKontextInpaintPipeline",
    "ChromaInpaintPipeline",
    "QwenImageImg2ImgPipeline",
    "QwenImageInpaintPipeline",
    "QwenImageControlNetPipeline",
    "QwenImageControlNetInpaintPipeline",
    "QwenImageEditInpaintPipeline",
    "QwenImageEditPlusPipeline",
    "Cosmos2TextToImagePipeline",
    "Cosmos2VideoToWorldPipeline",
    "EasyAnimateControlPipeline",
    "EasyAnimateInpaintPipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "Kandinsky5I2IPipeline",
    "Kandinsky5I2VPipeline",
    "Cosmos2_5_TransferPipeline",
    "LTX2HDRPipeline",
    "LTX2InContextPipeline",
    "VisualClozeGenerationPipeline",
    "Kandinsky5T2IPipeline",
    "LTX2ConditionPipeline",
    "LTX2ImageToVideoPipeline",
}
FIRST = {"DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline", "StableDiffusion3Pipeline", "FluxPipeline"}


def variant(name, monkeypatch):
    """The bench of a pipeline in `VARIANTS`."""
    make, how = VARIANTS[name]
    cls = getattr(diffusers, name.split(",")[0])
    module = sys.modules[cls.__module__]
    if sized := getattr(module, "calculate_dimensions", None):  # diffusers scales reference images to a million pixels
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: sized(area // 256, ratio))
    return make(cls, **how)


@pytest.fixture(params=VARIANTS)
def bench(request, monkeypatch):
    return variant(request.param, monkeypatch)


def steps_of(bench):
    """The steps that the pipeline runs."""
    return STEPS if "strength" in bench.inputs() else ALL_STEPS


def test_every_pipeline_is_tested():
    named = {name for family in FAMILIES for name in family.branch_order if not name.startswith("Tiny")}
    others = {name for family in FAMILIES if family.tested == "essentials" for name in list(family.branch_order)[:1]}
    assert named == FIRST | others | {name.split(",")[0] for name in VARIANTS}


@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
def test_plans_are_what_a_replay_gives(bench, guidance):
    model, steps = find(bench.pipe, INNER), steps_of(bench)
    guided = guidance > 1 and not bench.distilled
    inputs = {"images": 2, "guidance": guidance}
    untouched = trace(bench, bench.inputs(**inputs))
    assert len(untouched.outputs) == bench.loops * steps * (2 if guided and bench.two_calls else 1)
    full = plan_of(bench, model, [[FULL] * len(model.sites)] * steps, guided)
    with left_as_it_was(bench, **inputs), ah.applied(bench.pipe, full):
        assert_identical(trace(bench, bench.inputs(**inputs)), untouched)
    cells = random_cells(3, model.sites, steps, guided, bench.switch)
    plan = plan_of(bench, model, cells, guided)
    with ah.applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(**inputs))
        assert run.summary().notes == ()
        assert sum(run.summary().cells.values()) == bench.loops * steps * len(model.sites) * plan.calls
    with replaying(bench, model.modules, cells, guided) as sites:
        assert distance(given, trace(bench, bench.inputs(**inputs))) < 1e-5
    assert all(site.passed == bench.loops * len(site.column) * plan.calls for site in sites)
    assert distance(given, untouched) > 1e-2


HOW = {"greedy": {"threshold": 0.7}, "budget": {"budget": ah.Budget(module_flops=0.6)}}


@pytest.mark.parametrize(
    ("bench", "how"),
    [
        pytest.param(name, HOW[how], id=f"{name}-{how}", marks=[pytest.mark.slow] if (name in LONG and how == "budget") else [])
        for name in VARIANTS
        for how in HOW
    ],
    indirect=["bench"],
)
def test_searches_find_plans_for_the_steps_that_run(bench, how):
    with left_as_it_was(bench):
        plan = ah.search(bench.pipe, bench.inputs(), progress=False, **how)
    assert plan.steps == steps_of(bench)
    assert plan.flops().module < 0.95
    with ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs())
        assert run.summary().flops.module == pytest.approx(plan.flops().module)


@pytest.mark.parametrize(
    ("bench", "drawn"),
    [
        ("FluxKontextPipeline", 4 * 4),
        ("FluxKontextInpaintPipeline", 4 * 4),
        ("QwenImageEditPipeline", 4 * 4),
        ("QwenImageEditInpaintPipeline", 2 * 6),
        ("QwenImageEditPlusPipeline", 4 * 4),
    ],
    indirect=["bench"],
)
def test_searches_leave_out_the_output_at_reference_images(bench, drawn):
    """Where tokens of reference images follow those of the image, there is no grid."""
    calibration, seen = CalibrationRun(driver_of(bench.pipe, bench.inputs()), find(bench.pipe)), []
    calibration.run(lambda step: seen.append(step.full().shape[1]), first_only=True)
    assert seen == [drawn]
    assert calibration.tokens == bench.tokens
    assert bench.tokens.grid is None
    assert bench.visual > drawn


def test_without_reference_images_all_tokens_are_the_image():
    make, how = VARIANTS["FluxKontextPipeline"]
    bench = make(diffusers.FluxKontextPipeline, **how)
    calibration, seen = CalibrationRun(driver_of(bench.pipe, bench.inputs(image=None)), find(bench.pipe)), []
    calibration.run(lambda step: seen.append(step.full().shape[1]), first_only=True)
    assert seen == [4 * 4]
    assert calibration.tokens.grid == Grid(1, 4, 4)


def test_another_strength_is_refused():
    make, how = VARIANTS["FluxImg2ImgPipeline"]
    bench = make(diffusers.FluxImg2ImgPipeline, **how)
    plan = ah.search(bench.pipe, bench.inputs(), threshold=0.7, progress=False)
    with (
        ah.applied(bench.pipe, plan, changes="refuse"),
        pytest.raises(PlanMismatch, match="plan is for 4 steps, pipeline runs 5"),
    ):
        bench.pipe(**bench.inputs(strength=1.0))
