"""What has to be known about a family of models, and the ways in which families lay their tokens out and call for guidance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from arrowhead.layout import BranchOrder, Grid, Kind, Tokens

NONE = r"(?!)"
"""A pattern that matches nothing."""


@dataclass(frozen=True)
class Family:
    """What has to be known about a transformer class and its pipelines.

    `name` is what people call it. `site_pattern` is a regular expression for the module paths of the attention sites,
    `joint_pattern` for those of them that attend over text and image together, `cross_pattern` for attention from the image
    to the text, `feed_forward_pattern` for the image's feed-forwards, `block_pattern` for whole blocks; `branch_order` gives
    each pipeline class's order of the CFG branches in its batch, which no shape reveals; `tokens` counts them from a call's
    arguments; `guided` tells from the pipeline call's arguments whether there are both branches, `guidance_scale` how far
    apart they are driven, and `refused` what of them cannot be compressed. `per_sample_pattern` names layers of a block that
    multiply once for a sample rather than its tokens, `text_pattern` those that multiply the text's. `left_alone` says what
    of the transformer is computed in every step, and `tested` which of the tests it goes through.
    """

    name: str
    transformer: str
    site_pattern: str
    branch_order: Mapping[str, BranchOrder]
    tokens: Callable[[Any, Mapping[str, Any]], Tokens]
    guided: Callable[[Mapping[str, Any]], bool]
    joint_pattern: str = ""
    cross_pattern: str = NONE
    feed_forward_pattern: str = r"transformer_blocks\.\d+\.ff"
    block_pattern: str = r"(single_)?transformer_blocks\.\d+"
    guidance_scale: Callable[[Mapping[str, Any]], float] = lambda call: float(call["guidance_scale"])
    per_sample_pattern: str = r"norm.*"
    text_pattern: str = r".*context.*"
    refused: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    left_alone: str = ""
    tested: Literal["all contracts", "essentials"] = "essentials"

    def knows(self, kind: Kind) -> bool:
        """Whether it has sites of this kind."""
        patterns: dict[Kind, str] = {
            "self_attention": self.site_pattern,
            "cross_attention": self.cross_pattern,
            "feed_forward": self.feed_forward_pattern,
            "block": self.block_pattern,
        }
        return patterns[kind] != NONE


def patches(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """The image in square patches."""
    height, width = call["hidden_states"].shape[-2:]  # (B, C, H, W)
    patch = transformer.config.patch_size
    return Tokens.of_grid(1, height // patch, width // patch)


def patches_then_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Image and text attend together, the image first."""
    return replace(patches(transformer, call), text=call["encoder_hidden_states"].shape[1])  # (B, T, C)


def text_then_packed(_: Any, call: Mapping[str, Any]) -> Tokens:
    """The text before an image that comes as tokens; where these belong, Qwen-Image is told by shapes, FLUX by positions."""
    visual, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]  # (B, V, C), (B, T, C)
    grid = None
    if call.get("img_shapes") is not None:  # of each sample's images, the first of which is drawn
        grid = _filled(call["img_shapes"][0][0], visual)
    elif call.get("img_ids") is not None:  # (V, 3): frame, row and column
        grid = _filled([int(place) + 1 for place in call["img_ids"].flatten(0, -2)[-1].tolist()], visual)
    return Tokens(visual, text, text_first=True, grid=grid)


def _filled(sizes: Sequence[Any], visual: int) -> Grid | None:
    """Frames, rows and columns as a grid, if these are known and so many tokens fill it."""
    return Grid(*sizes) if None not in sizes and math.prod(sizes) == visual else None


def video_patches(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video in patches, frame by frame, beside a text that is looked at."""
    sizes = zip(call["hidden_states"].shape[2:], transformer.config.patch_size, strict=True)  # (B, C, F, H, W)
    return Tokens.of_grid(*(size // patch for size, patch in sizes), text=call["encoder_hidden_states"].shape[1])


def frames_then_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Video in patches, frame by frame, before the text."""
    frames, height, width = call["hidden_states"].shape[2:]  # (B, C, F, H, W)
    patch, in_time = transformer.config.patch_size, transformer.config.patch_size_t
    return Tokens.of_grid(frames // in_time, height // patch, width // patch, text=call["encoder_hidden_states"].shape[1])


def packed_beside_text(_: Any, call: Mapping[str, Any]) -> Tokens:
    """Visual tokens that come as such, with their grid's sizes, beside a text that is looked at."""
    visual, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]  # (B, V, C), (B, T, C)
    return Tokens(visual, text, grid=_filled([call.get(name) for name in ("num_frames", "height", "width")], visual))


def text_then_frames(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """The text before a video in patches, frame by frame."""
    frames, _, height, width = call["hidden_states"].shape[1:]  # (B, F, C, H, W)
    patch, in_time = transformer.config.patch_size, transformer.config.patch_size_t or 1
    sizes = -(-frames // in_time), height // patch, width // patch
    return Tokens.of_grid(*sizes, text=call["encoder_hidden_states"].shape[1], text_first=True)


def registers_then_patches(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Learnt tokens and the text before the image in square patches."""
    before = transformer.register_tokens.shape[1] + call["encoder_hidden_states"].shape[1]
    return replace(patches(transformer, call), text=before, text_first=True)


def skipped_layers(call: Mapping[str, Any]) -> str | None:
    """SD3's guidance by skipped layers is a third call in some of the steps."""
    skips = call.get("skip_guidance_layers")
    return None if skips is None else f"skip_guidance_layers={skips}, which calls the transformer once more in some steps"


def true_cfg(call: Mapping[str, Any]) -> bool:
    """Guidance beside the distilled one, where the pipeline has it and is given something to guide away from."""
    names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    embedded = all(call[name] is not None for name in names if name in call)
    return call.get("true_cfg_scale", 1.0) > 1 and (call["negative_prompt"] is not None or embedded)


def guidance_above_one(call: Mapping[str, Any]) -> bool:
    """Guidance is on where its scale says so."""
    return call["guidance_scale"] > 1
