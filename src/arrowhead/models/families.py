"""The families table: for each transformer class, where attention sits and how its pipelines call it. Data, not code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from arrowhead.layout import BranchOrder, Tokens


@dataclass(frozen=True)
class Family:
    """What has to be known about a transformer class and its pipelines.

    `site_pattern` is a regular expression for the module paths of the attention sites, `joint_pattern` for those of them that
    attend over text and image together, `cross_pattern` for attention from the image to the text, `feed_forward_pattern` for
    the image's feed-forwards, `block_pattern` for whole blocks; `branch_order` gives each pipeline class's order of the CFG
    branches in its batch, which no shape reveals; `tokens` counts them from a call's arguments; `guided` tells from the
    pipeline call's arguments whether there are both branches, `guidance_scale` how far apart they are driven, and `refused`
    what of them cannot be compressed.
    """

    transformer: str
    site_pattern: str
    branch_order: Mapping[str, BranchOrder]
    tokens: Callable[[Any, Mapping[str, Any]], Tokens]
    guided: Callable[[Mapping[str, Any]], bool]
    joint_pattern: str = ""
    cross_pattern: str = r"(?!)"
    feed_forward_pattern: str = r"transformer_blocks\.\d+\.ff"
    block_pattern: str = r"(single_)?transformer_blocks\.\d+"
    guidance_scale: Callable[[Mapping[str, Any]], float] = lambda call: float(call["guidance_scale"])
    refused: Callable[[Mapping[str, Any]], str | None] = lambda _: None


def _patches(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    height, width = call["hidden_states"].shape[-2:]  # (B, C, H, W)
    patch = transformer.config.patch_size
    return Tokens(visual=(height // patch) * (width // patch))


def _patches_then_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    return replace(_patches(transformer, call), text=call["encoder_hidden_states"].shape[1])  # (B, T, C)


def _text_then_packed(_: Any, call: Mapping[str, Any]) -> Tokens:
    visual, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]  # (B, V, C), (B, T, C)
    return Tokens(visual, text, text_first=True)


def _skipped_layers(call: Mapping[str, Any]) -> str | None:
    skips = call.get("skip_guidance_layers")
    return None if skips is None else f"skip_guidance_layers={skips}, which calls the transformer once more in some steps"


def _true_cfg(call: Mapping[str, Any]) -> bool:
    embedded = call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
    return call["true_cfg_scale"] > 1 and (call["negative_prompt"] is not None or embedded)


def _guidance_above_one(call: Mapping[str, Any]) -> bool:
    return call["guidance_scale"] > 1


FAMILIES: tuple[Family, ...] = (
    Family(
        transformer="DiTTransformer2DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        branch_order={"DiTPipeline": "cond_first", "TinyDiTPipeline": "cond_first"},
        tokens=_patches,
        guided=_guidance_above_one,
    ),
    Family(
        transformer="PixArtTransformer2DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        cross_pattern=r"transformer_blocks\.\d+\.attn2",
        branch_order={"PixArtAlphaPipeline": "uncond_first", "PixArtSigmaPipeline": "uncond_first"},
        tokens=_patches_then_text,
        guided=_guidance_above_one,
    ),
    Family(
        transformer="SD3Transformer2DModel",  # SD3.5 adds an image-only attn2 to some blocks
        site_pattern=r"transformer_blocks\.\d+\.attn2?",
        joint_pattern=r"transformer_blocks\.\d+\.attn",
        branch_order={"StableDiffusion3Pipeline": "uncond_first", "TinyMMDiTPipeline": "uncond_first"},
        tokens=_patches_then_text,
        guided=_guidance_above_one,
        refused=_skipped_layers,
    ),
    Family(
        transformer="FluxTransformer2DModel",  # single-stream blocks have no output projection of their own
        site_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        joint_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        branch_order={"FluxPipeline": "two_calls"},
        tokens=_text_then_packed,
        guided=_true_cfg,
        guidance_scale=lambda call: float(call["true_cfg_scale"]),
    ),
)
