"""How families of images lay out their tokens: how many, in which grid, and whether the text is before or after them.

Those of videos are in `video_tokens`.

Functions get the arguments of a transformer's call by name. Shapes: B samples, V visual tokens, T text tokens, C channels,
H × W latents.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import Grid, Tokens

Z_IMAGE_MULTIPLE = 32
"""Z-Image pads image and text to a multiple of 32 tokens each (SEQ_MULTI_OF in diffusers)."""


def image_only(transformer: Any, call: Mapping[str, Any], *, text: int = 0, text_first: bool = False) -> Tokens:
    """An image (B, C, H, W) in square patches, with `text` tokens after it or before it."""
    height, width = call["hidden_states"].shape[-2:]
    patch = transformer.config.patch_size
    return Tokens.of_grid(1, height // patch, width // patch, text=text, text_first=text_first)


def image_then_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """An image (B, C, H, W) in square patches, before or beside a text (B, T, C)."""
    return image_only(transformer, call, text=call["encoder_hidden_states"].shape[1])


def text_then_image(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A text (B, T, C) before an image (B, C, H, W) in square patches."""
    return image_only(transformer, call, text=call["encoder_hidden_states"].shape[1], text_first=True)


def image_with_two_texts(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """An image (B, C, H, W) in square patches, beside the texts (B, T, C) of two encoders."""
    texts = call["encoder_hidden_states"], call["encoder_hidden_states_t5"]
    return image_only(transformer, call, text=sum(text.shape[1] for text in texts))


def masked_text_then_image(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A text before an image (B, C, H, W) in square patches. Lumina 2 removes the text's padding, by a mask (B, T).

    Raises:
        InputsInvalid: texts of several lengths, so that images begin at several positions.
    """
    lengths = sorted({int(length) for length in call["encoder_attention_mask"].sum(1)})
    if len(lengths) > 1:
        raise InputsInvalid(
            f"got prompts of {', '.join(map(str, lengths))} tokens in one batch, so that each image begins elsewhere; wanted "
            "one length; generate them one by one, or pad embeddings and masks"
        )
    return image_only(transformer, call, text=lengths[0], text_first=True)


def registers_and_text_then_image(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Learnt register tokens (1, R, C) and a text (B, T, C), before an image (B, C, H, W) in square patches."""
    before = transformer.register_tokens.shape[1] + call["encoder_hidden_states"].shape[1]
    return image_only(transformer, call, text=before, text_first=True)


def padded_image_then_text(_: Any, call: Mapping[str, Any]) -> Tokens:
    """A list of images (C, F, H, W) in patches before a list of texts (T, C): each padded, and texts again to the longest.

    Raises:
        InputsInvalid: images of several sizes, so that texts begin at several positions.
    """
    sizes = {tuple(image.shape[1:]) for image in call["x"]}
    if len(sizes) > 1:
        raise InputsInvalid(f"got images of the sizes {sorted(sizes)} in one batch, wanted one; generate them one by one")
    ((frames, height, width),) = sizes
    patch, patch_frames = call["patch_size"], call["f_patch_size"]
    visual, text = (frames // patch_frames) * (height // patch) * (width // patch), max(map(len, call["cap_feats"]))
    return Tokens(visual + -visual % Z_IMAGE_MULTIPLE, text + -text % Z_IMAGE_MULTIPLE)


def text_then_packed_image(_: Any, call: Mapping[str, Any]) -> Tokens:
    """A text (B, T, C) before an image that comes as tokens (B, V, C), with shapes (Qwen-Image) or positions (FLUX).

    There is no grid where tokens of reference images follow those of the image.
    """
    visual, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]
    grid = None
    if call.get("img_shapes") is not None:
        grid = grid_of(_image_shape(call["img_shapes"]), visual)
    elif (positions := call.get("img_ids")) is not None and not positions.is_meta:
        # (V, 3), or (B, V, 4): time, row and column come first; reference images have later times
        time, *last = (int(position) for position in positions.flatten(0, -2)[-1, :3].tolist())
        grid = None if time else grid_of([1, *(position + 1 for position in last)], visual)
    return Tokens(visual, text, text_first=True, grid=grid)


def image_tokens_by_positions(call: Mapping[str, Any]) -> int:
    """The number of the image's own tokens in a call of FLUX: the first ones, at time 0. Reference images have later times."""
    times = call["img_ids"][..., 0].flatten()[: call["hidden_states"].shape[1]]  # of (V, 3), or (B, V, 4)
    return int((times == 0).sum())


def image_tokens_by_shapes(call: Mapping[str, Any]) -> int | None:
    """The number of the image's own tokens in a call of Qwen-Image: the first ones, of the first shape."""
    shapes = call["img_shapes"]
    return None if shapes is None else math.prod(_image_shape(shapes))


def _image_shape(shapes: Sequence[Any]) -> Sequence[int]:
    """Frames, rows and columns of the image: the first shape of a sample. Pipelines with a ControlNet give that one alone."""
    first = shapes[0]
    return first[0] if isinstance(first, list) else first


def grid_of(sizes: Sequence[Any], visual: int) -> Grid | None:
    """The grid of these frames, rows and columns; None where a size is not known, or the tokens are not as many."""
    return Grid(*sizes) if None not in sizes and math.prod(sizes) == visual else None
