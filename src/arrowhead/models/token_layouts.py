"""How each family lays out its tokens: how many there are, and where text stands."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import Grid, Tokens

PADDED_TO = 32
"""Of so many tokens Z-Image makes the lengths of image and text a multiple, as diffusers' SEQ_MULTI_OF has it."""


def patches(transformer: Any, call: Mapping[str, Any], *, text: int = 0, text_first: bool = False) -> Tokens:
    """The image in square patches, with so many tokens of text after or before it."""
    height, width = call["hidden_states"].shape[-2:]  # (B, C, H, W)
    patch = transformer.config.patch_size
    return Tokens.of_grid(1, height // patch, width // patch, text=text, text_first=text_first)


def patches_then_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Image and text attend together, the image first."""
    return patches(transformer, call, text=call["encoder_hidden_states"].shape[1])  # (B, T, C)


def patches_beside_two_texts(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Image in square patches, beside the texts of two encoders."""
    texts = call["encoder_hidden_states"], call["encoder_hidden_states_t5"]
    return patches(transformer, call, text=sum(text.shape[1] for text in texts))  # (B, T, C) each


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
    return patches(transformer, call, text=before, text_first=True)


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
    return patches(transformer, call, text=lengths[0], text_first=True)


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


def before_pictures_to_go_by(call: Mapping[str, Any]) -> int:
    """FLUX's own tokens come first, those of pictures to go by have later times, and what becomes of them goes nowhere."""
    times = call["img_ids"][..., 0].flatten()[: call["hidden_states"].shape[1]]  # of (V, 3), or (B, V, 4)
    return int((times == 0).sum())


def before_other_shapes(call: Mapping[str, Any]) -> int | None:
    """Qwen-Image's own tokens come first, too, and are those of the first shape."""
    shapes = call["img_shapes"]
    return None if shapes is None else math.prod(_drawn(shapes))
