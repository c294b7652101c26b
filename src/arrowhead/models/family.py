"""What has to be known about a family of models, and the ways in which families lay their tokens out and call for guidance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from arrowhead.errors import InputsInvalid
from arrowhead.layout import BranchOrder, Grid, Kind, Tokens

PADDED_TO = 32
"""Of so many tokens Z-Image makes the lengths of image and text a multiple, as diffusers' SEQ_MULTI_OF has it."""

NONE = r"(?!)"
"""A pattern that matches nothing."""


@dataclass(frozen=True)
class Family:
    """What has to be known about a transformer class and its pipelines.

    `name` is what people call it. `site_pattern` is a regular expression for the module paths of the attention sites,
    `joint_pattern` for those of them that attend over text and image together, `cross_pattern` for attention from the image
    to the text, `feed_forward_pattern` for the image's feed-forwards, `block_pattern` for whole blocks; `branch_order` gives
    each pipeline class's order of the CFG branches in its batch, which no shape reveals; `tokens` counts them from a call's
    arguments; `guided` tells from the pipeline call's arguments, and the pipeline's settings, whether there are both branches,
    `guidance_scale` how far apart they are driven, and `refused` what of them cannot be compressed. `per_sample_pattern` names
    layers of a block that multiply once for a sample rather than its tokens, `text_pattern` those that multiply the text's.
    `samples` is the transformer's argument with a latent for each sample; `returned` are the tokens at the beginning of its
    output that a pipeline goes on with, None where that is all. `left_alone` says what of the transformer is computed in every
    step, and `tested` which of the tests it goes through. `over` says along what sites attend, and `by_sample` how, see `Site`;
    `heads_apart` is False where all have to be projected. `unfit` tells what of a transformer does not fit. Where a pipeline
    may have a second transformer, `takes_over` tells from one that is running the step from which that one is called, and
    `later_guidance_scale` how far it drives the branches apart.
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
    over: Literal["all", "space"] = "all"
    by_sample: bool = False
    heads_apart: bool = True
    refused: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    samples: str = "hidden_states"
    returned: Callable[[Mapping[str, Any]], int | None] = lambda _: None
    unfit: Callable[[Any], str | None] = lambda _: None
    takes_over: Callable[[Any], int | None] | None = None
    later_guidance_scale: Callable[[Mapping[str, Any]], float] | None = None
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


def patches_beside_two_texts(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Image in square patches, beside the texts of two encoders."""
    texts = call["encoder_hidden_states"], call["encoder_hidden_states_t5"]
    return replace(patches(transformer, call), text=sum(text.shape[1] for text in texts))  # (B, T, C) each


def text_then_packed(_: Any, call: Mapping[str, Any]) -> Tokens:
    """The text before an image that comes as tokens; where these belong, Qwen-Image is told by shapes, FLUX by positions.

    With pictures to go by after the image's own tokens there is no grid.
    """
    visual, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]  # (B, V, C), (B, T, C)
    grid = None
    if call.get("img_shapes") is not None:
        grid = _filled(_drawn(call["img_shapes"]), visual)
    elif (ids := call.get("img_ids")) is not None and not ids.is_meta:
        # (V, 3), or (B, V, 4): time, row and column first; pictures have later times
        time, *last = (int(place) for place in ids.flatten(0, -2)[-1, :3].tolist())
        grid = None if time else _filled([1, *(place + 1 for place in last)], visual)
    return Tokens(visual, text, text_first=True, grid=grid)


def _drawn(shapes: Sequence[Any]) -> Sequence[int]:
    """Frames, rows and columns of what is drawn, the first of a sample's images; pipelines with a ControlNet name no other."""
    first = shapes[0]
    return first[0] if isinstance(first, list) else first


def _filled(sizes: Sequence[Any], visual: int) -> Grid | None:
    """Frames, rows and columns as a grid, if these are known and so many tokens fill it."""
    return Grid(*sizes) if None not in sizes and math.prod(sizes) == visual else None


def video_patches(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video in patches, frame by frame, beside a text that is looked at."""
    sizes = zip(call["hidden_states"].shape[2:], transformer.config.patch_size, strict=True)  # (B, C, F, H, W)
    return Tokens.of_grid(*(size // patch for size, patch in sizes), text=call["encoder_hidden_states"].shape[1])


def frames_then_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Video in patches, frame by frame, before the text, or beside it."""
    frames, height, width = call["hidden_states"].shape[2:]  # (B, C, F, H, W)
    patch, in_time = transformer.config.patch_size, getattr(transformer.config, "patch_size_t", 1)
    text = call["encoder_hidden_states"].shape[-2]  # (B, T, C) or (B, 1, T, C)
    return Tokens.of_grid(frames // in_time, height // patch, width // patch, text=text)


def frame_by_frame(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video in patches, each frame a sequence of its own."""
    frames, height, width = call["hidden_states"].shape[2:]  # (B, C, F, H, W)
    patch = transformer.config.patch_size
    return replace(Tokens.of_grid(frames, height // patch, width // patch), frames=frames)


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


def caption_then_patches(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """What a mask shows of the text, right before the image: Lumina 2 leaves out what it hides.

    Raises:
        InputsInvalid: the image begins elsewhere in another sample.
    """
    lengths = sorted({int(length) for length in call["encoder_attention_mask"].sum(1)})  # (B, T)
    if len(lengths) > 1:
        raise InputsInvalid(
            f"got prompts of {', '.join(map(str, lengths))} tokens in one batch, so that each image begins elsewhere; wanted "
            "one length; generate them one by one, or pad embeddings and masks"
        )
    return replace(patches(transformer, call), text=lengths[0], text_first=True)


def truncated_guidance(call: Mapping[str, Any]) -> str | None:
    """Lumina 2 can leave the second call out in the last steps."""
    ratio = call["cfg_trunc_ratio"]
    return f"cfg_trunc_ratio={ratio}, by which some steps have guidance and some do not" if ratio < 1 else None


def padded_patches_then_text(_: Any, call: Mapping[str, Any]) -> Tokens:
    """A list of images in patches and one of texts, each padded, and the texts once more to the longest.

    Raises:
        InputsInvalid: images of several sizes, so that in each the text begins elsewhere.
    """
    sizes = {tuple(image.shape[1:]) for image in call["x"]}  # (C, F, H, W) each
    if len(sizes) > 1:
        raise InputsInvalid(f"got images of the sizes {sorted(sizes)} in one batch, wanted one; generate them one by one")
    ((frames, height, width),) = sizes
    patch, in_time = call["patch_size"], call["f_patch_size"]
    visual, text = (frames // in_time) * (height // patch) * (width // patch), max(map(len, call["cap_feats"]))
    return Tokens(visual + -visual % PADDED_TO, text + -text % PADDED_TO)


def truncated_cfg(call: Mapping[str, Any]) -> str | None:
    """Z-Image can leave guidance out in the last steps."""
    limit = call["cfg_truncation"]
    ends = guidance_above_zero(call) and limit is not None and limit < 1
    return f"cfg_truncation={limit}, by which some steps have guidance and some do not" if ends else None


def guidance_above_zero(call: Mapping[str, Any]) -> bool:
    """Z-Image's scale is that of what is added."""
    return call["guidance_scale"] > 0


def below_boundary(pipe: Any) -> int | None:
    """Wan 2.2's second transformer is called at timesteps below a fraction of those of training."""
    ratio = pipe.config.get("boundary_ratio")
    boundary = -math.inf if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps
    below = (pipe.scheduler.timesteps < boundary).nonzero()  # all at once: on a device each look is waited for
    return int(below[0]) if len(below) else None


def second_or_only_scale(call: Mapping[str, Any]) -> float:
    """Of Wan 2.2's second transformer: the first one's where none is named for it."""
    scale, second = call["guidance_scale"], call["guidance_scale_2"]
    return float(scale if second is None else second)


def looks_at_an_image(transformer: Any) -> str | None:
    """Wan 2.1's from images has a second attention, to the image, within the one to the text."""
    image_dim = transformer.config.image_dim
    return None if image_dim is None else f"image_dim={image_dim}: attention to an image beside the one to the text"


def skipped_layers(call: Mapping[str, Any]) -> str | None:
    """SD3's guidance by skipped layers is a third call in some of the steps."""
    skips = call.get("skip_guidance_layers")
    return None if skips is None else f"skip_guidance_layers={skips}, which calls the transformer once more in some steps"


def true_cfg(call: Mapping[str, Any]) -> bool:
    """Guidance beside the distilled one, where the pipeline has it and is given something to guide away from."""
    names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    embedded = all(call[name] is not None for name in names if name in call)
    return call.get("true_cfg_scale", 1.0) > 1 and (call["negative_prompt"] is not None or embedded)


def undistilled_guidance(call: Mapping[str, Any]) -> bool:
    """FLUX.2 klein's, but for distilled weights; FLUX.2's own scale is given to the model."""
    return "negative_prompt_embeds" in call and call["guidance_scale"] > 1 and not call["is_distilled"]


def before_pictures_to_go_by(call: Mapping[str, Any]) -> int:
    """FLUX's own tokens come first, those of pictures to go by have later times, and what becomes of them goes nowhere."""
    times = call["img_ids"][..., 0].flatten()[: call["hidden_states"].shape[1]]  # of (V, 3), or (B, V, 4)
    return int((times == 0).sum())


def before_other_shapes(call: Mapping[str, Any]) -> int | None:
    """Qwen-Image's own tokens come first, too, and are those of the first shape."""
    shapes = call["img_shapes"]
    return None if shapes is None else math.prod(_drawn(shapes))


def guidance_above_one(call: Mapping[str, Any]) -> bool:
    """Guidance is on where its scale says so."""
    return call["guidance_scale"] > 1
