"""The order of the CFG branches in the families table, compared with what each diffusers pipeline gives its transformer.

Every prompt embedding is 1 and every negative one -1 (DiT: a label, and the label of no class). A hook on the transformer
reads which rows, in which of its first two calls, have which mark. The benches' own order is not used.
"""

import inspect
import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import families
import image_benches
import image_variants
import pipelines
import pytest
import torch
import video_benches
from budget import flux
from test_variants import VARIANTS, variant

from arrowhead.models.families import FAMILIES
from arrowhead.models.find import find

IMAGES = 2
COND, UNCOND = 1, -1
MADE = {
    "DiTPipeline": pipelines.dit,
    "TinyDiTPipeline": pipelines.tiny,
    "PixArtAlphaPipeline": pipelines.pixart_alpha,
    "PixArtSigmaPipeline": pipelines.pixart_sigma,
    "StableDiffusion3Pipeline": pipelines.sd3,
    "TinyMMDiTPipeline": pipelines.tiny_mmdit,
    "FluxPipeline": flux,
    "ChromaPipeline": families.chroma,
    "QwenImagePipeline": families.qwen,
    "WanPipeline": families.wan,
    "HunyuanVideoPipeline": families.hunyuan_video,
    "LTXPipeline": families.ltx,
    "CogVideoXPipeline": families.cogvideox,
    "AllegroPipeline": families.allegro,
    "LattePipeline": families.latte,
    "MochiPipeline": families.mochi,
    "AuraFlowPipeline": families.aura_flow,
    "HunyuanDiTPipeline": families.hunyuan_dit,
    "Lumina2Pipeline": families.lumina2,
    "Flux2KleinPipeline": families.flux2,
    "ZImagePipeline": families.z_image,
    "OvisImagePipeline": families.ovis_image,
    "BriaPipeline": families.bria,
    "CogView4Pipeline": families.cogview4,
    "CogView3PlusPipeline": families.cogview3,
    "SkyReelsV2Pipeline": families.skyreels,
    "WanVACEPipeline": families.wan_vace,
    "LongCatImagePipeline": image_benches.longcat_image,
    "BriaFiboPipeline": image_benches.bria_fibo,
    "ErnieImagePipeline": image_benches.ernie_image,
    "Krea2Pipeline": image_benches.krea2,
    "GlmImagePipeline": image_benches.glm_image,
    "HunyuanImagePipeline": image_benches.hunyuan_image,
    "HiDreamImagePipeline": image_benches.hidream,
    "LuminaPipeline": image_benches.lumina_next,
    "BriaFibo2Pipeline": image_benches.fibo2,
    "JoyImageEditPipeline": image_benches.joy_image,
    "JoyImageEditPlusPipeline": image_benches.joy_image_plus,
    "StableAudioPipeline": image_benches.stable_audio,
    "AceStepPipeline": image_benches.ace_step,
    "LongCatAudioDiTPipeline": image_benches.longcat_audio,
    "HunyuanVideo15Pipeline": video_benches.hunyuan_video15,
    "EasyAnimatePipeline": video_benches.easy_animate,
    "ChronoEditPipeline": video_benches.chrono_edit,
    "Cosmos2_5_PredictBasePipeline": video_benches.cosmos,
    "Kandinsky5T2VPipeline": video_benches.kandinsky5,
    "LTX2Pipeline": video_benches.ltx2,
    "AnyFlowPipeline": video_benches.anyflow,
    "HunyuanVideoFramepackPipeline": video_benches.framepack,
    "WanAnimatePipeline": video_benches.wan_animate,
    "HeliosPipeline": video_benches.helios,
    "MotifVideoPipeline": video_benches.motif,
}
VARIANT_OF = {name.split(",")[0]: name for name in reversed(VARIANTS)}  # the first variant of each class
IN_TABLE = [name for family in FAMILIES for name in family.branch_order]
CONDITIONAL_ONLY = {  # distilled guidance: these pipelines take no negative prompt
    "FluxFillPipeline",
    "FluxControlPipeline",
    "FluxControlImg2ImgPipeline",
    "FluxControlInpaintPipeline",
    "FluxControlNetImg2ImgPipeline",
    "FluxControlNetInpaintPipeline",
    "Flux2Pipeline",
    "VisualClozeGenerationPipeline",
    "VisualClozePipeline",
}
MARKED = (  # arguments of transformers that carry a prompt
    "encoder_hidden_states",
    "encoder_hidden_states_t5",
    "pooled_projections",
    "cap_feats",
    "text_bth",
    "class_labels",
)


class Seen(Exception):
    """Ends a pipeline's call once its transformer has been called twice."""


def marked(prompts, *shape):
    """Embeddings of the benches' prompts: 1 for a prompt, -1 for a negative one."""
    marks = [torch.full(shape, UNCOND if image_benches.NOT in prompt else COND) for prompt in prompts]
    return torch.stack(marks).double()


def bench_of(name, monkeypatch):
    for module in (image_benches, image_variants):
        monkeypatch.setattr(module, "embedded", marked)
    bench = MADE[name]() if name in MADE else variant(VARIANT_OF[name], monkeypatch)
    assert type(bench.pipe).__name__ == name
    return bench


def marked_inputs(bench):
    """The arguments of a guided call of the pipeline for two images, with every prompt marked."""
    inputs = bench.inputs(images=IMAGES, guidance=3.0)
    for name, value in inputs.items():
        if "prompt_embeds" in name and not name.endswith("_mask"):
            mark = UNCOND if name.startswith("negative") else COND
            tensors = [torch.full_like(tensor, mark) for tensor in value]  # of one prompt each, (T, C) or (C,)
            inputs[name] = tensors if isinstance(value, list) else torch.stack(tensors)
    return inputs


def mark_texts(text_encoder):
    """Let a text encoder give 1 for a text that has words and -1 for the empty one."""

    def forward(ids):  # (B, T)
        marks = (ids >= pipelines.WORDS.index("red")).any(1).double().mul(COND - UNCOND).add(UNCOND)
        tokens = marks[:, None, None].expand(*ids.shape, pipelines.CAPTION[1])
        return SimpleNamespace(last_hidden_state=tokens, text_embeds=tokens[:, 0, : pipelines.POOLED])

    text_encoder.forward = forward


def mark_of(row, no_class):
    """The mark that a row of a transformer's argument carries: a label, or embeddings that are all 1, or all -1."""
    if not row.dtype.is_floating_point:
        return UNCOND if row == no_class else COND
    row = row[: pipelines.CAPTION[0]]  # StableAudio's duration comes after it
    (mark,) = row[row != 0].unique().tolist() or [UNCOND]  # padding may be zero, and so is CogView3-Plus' missing prompt
    assert mark in (COND, UNCOND)
    return int(mark)


def seen_marks(bench, inputs):
    """The marks of the rows in the transformer's first two calls."""
    transformer, calls = bench.pipe.transformer, []
    no_class = getattr(transformer.config, "num_embeds_ada_norm", None)
    if getattr(bench.pipe, "text_encoder", None) is not None:
        mark_texts(bench.pipe.text_encoder)

    def read(module, args, kwargs):
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        texts = [arguments[name] for name in MARKED if arguments.get(name) is not None]
        first, *others = ([mark_of(row, no_class) for row in text] for text in texts)
        assert all(other == first for other in others)
        calls.append(first)
        if len(calls) == 2:
            raise Seen

    with transformer.register_forward_pre_hook(read, with_kwargs=True), pytest.raises(Seen):
        bench.pipe(**inputs)
    return calls


def marks_by_table(pipe, inputs):
    """The marks that the first two calls have if the families table is right."""
    model = find(pipe)
    branches = model.branches(model.call_arguments((), inputs))
    single = isinstance(pipe, diffusers.WanVACEPipeline | diffusers.MotifVideoImage2VideoPipeline)
    cond, uncond = ([mark] * (1 if single else IMAGES) for mark in (COND, UNCOND))
    if not branches.guided:
        return [cond, cond]
    return {
        "cond_first": [cond + uncond] * 2,
        "uncond_first": [uncond + cond] * 2,
        "two_calls": [cond, uncond],
    }[branches.order]


def check(name, monkeypatch):
    bench = bench_of(name, monkeypatch)
    inputs = marked_inputs(bench)
    wanted = marks_by_table(bench.pipe, inputs)
    seen = seen_marks(bench, inputs)
    assert seen == wanted
    assert (UNCOND not in seen[0] + seen[1]) == (name in CONDITIONAL_ONLY)


def test_every_pipeline_of_the_table_is_asked():
    assert len(IN_TABLE) == len({*IN_TABLE})
    assert {*IN_TABLE} == {*MADE} | {*VARIANT_OF}
    assert not {*MADE} & {*VARIANT_OF}


@pytest.mark.parametrize("name", IN_TABLE)
def test_a_pipeline_brings_its_branches_as_the_table_says(name, monkeypatch):
    check(name, monkeypatch)


@pytest.mark.parametrize("name", sorted(CONDITIONAL_ONLY))
def test_pipelines_without_an_unconditional_branch_take_no_negative_prompt(name):
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    assert not [parameter for parameter in parameters if parameter.startswith(("negative", "true_cfg"))]


def with_order(monkeypatch, name, order):
    """Put this order in the table for all pipelines of the family of this one."""
    family = next(family for family in FAMILIES if name in family.branch_order)
    wrong = replace(family, branch_order=dict.fromkeys(family.branch_order, order))
    table = tuple(wrong if other is family else other for other in FAMILIES)
    monkeypatch.setattr(sys.modules["arrowhead.models.find"], "FAMILIES", table)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("PixArtAlphaPipeline", "cond_first"),
        ("PixArtAlphaPipeline", "two_calls"),
        ("ZImagePipeline", "uncond_first"),
        ("ZImagePipeline", "two_calls"),
        ("QwenImagePipeline", "cond_first"),
        ("QwenImagePipeline", "uncond_first"),
    ],
)
def test_a_wrong_order_in_the_table_is_noticed(name, order, monkeypatch):
    with_order(monkeypatch, name, order)
    with pytest.raises(AssertionError):
        check(name, monkeypatch)
