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


def image_then_padded_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """An image (B, C, H, W) in square patches, before a text (B, T, C) whose padding is masked (ERNIE-Image)."""
    return image_only(transformer, call, text=call["text_bth"].shape[1])


def image_then_t5_and_llama(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """An image (B, C, H, W) in square patches, before texts of T5 (B, T, C) and of Llama (L, B, T, C).

    HiDream pads an image that is no square to the tokens of the largest one. Each block is given the texts of T5 and of
    Llama's last layer, and that of its own layer of Llama.
    """
    height, width = call["hidden_states"].shape[-2:]
    text = call["encoder_hidden_states_t5"].shape[1] + 2 * call["encoder_hidden_states_llama3"].shape[2]
    return image_only(transformer, call, text=text) if height == width else Tokens(transformer.max_seq, text)


def patched_with_two_texts(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """An image (B, C, H, W) or (B, C, F, H, W) in patches, before a text (B, T, C) and, where there is one, a second."""
    sizes = call["hidden_states"].shape[2:]
    grid = [size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True)]
    second = call["encoder_hidden_states_2"] if transformer.context_embedder_2 is not None else None
    text = call["encoder_hidden_states"].shape[1] + (0 if second is None else second.shape[1])
    return Tokens.of_grid(*[1] * (3 - len(grid)), *grid, text=text)


def gist_and_image(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """An image (B, C, H, W) in square patches, and those of images to edit, after FIBO 2's summary of the text.

    The summary has more tokens for a longer text (B, L, T, C); in a batch of several lengths it is padded, and comes last.
    """
    patch, settings, mask = transformer.config.patch_size, transformer.config, call["encoder_attention_mask"]
    _, _, length, _ = call["encoder_hidden_states"].shape
    lengths = {length} if mask is None else {*mask.sum(1).tolist()}
    counts = [
        min(settings.max_num_gist_tokens, max(settings.min_num_gist_tokens, _gist(length, settings))) for length in lengths
    ]
    images = call["hidden_states"], *(call["context_latents"] or [])
    visual = sum((image.shape[-2] // patch) * (image.shape[-1] // patch) for image in images)
    sizes = [1, *(size // patch for size in call["hidden_states"].shape[-2:])]
    return Tokens(visual, max(counts), text_first=min(counts) == max(counts), grid=grid_of(sizes, visual))


def _gist(length: int, settings: Any) -> int:
    """The tokens, in whole steps, of FIBO 2's summary of a text, before limits."""
    share = (length - settings.gist_min_text_len) / (settings.gist_max_text_len - settings.gist_min_text_len)
    more = min(1.0, max(0.0, share)) * (settings.max_num_gist_tokens - settings.min_num_gist_tokens)
    return math.ceil((settings.min_num_gist_tokens + more) / settings.gist_step) * settings.gist_step


def items_then_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Images of one size, (B, I, C, F, H, W) in patches, before a text (B, T, C). There is no grid where there are several."""
    _, items, _, *sizes = call["hidden_states"].shape
    frames, rows, columns = (size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True))
    visual = items * frames * rows * columns
    grid = grid_of([frames, rows, columns], visual)
    return Tokens(visual, call["encoder_hidden_states"].shape[1], grid=grid)


def last_item(_: Mapping[str, Any]) -> slice:
    """The image that is drawn, of the images in JoyImage's output: the last one."""
    return slice(-1, None)


def packed_items_then_text(_: Any, call: Mapping[str, Any]) -> Tokens:
    """Patches of several images, (B, V, C, F, H, W), the one that is drawn first, before a text (B, T, C)."""
    visual, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]
    return Tokens(visual, text, grid=grid_of(call["shape_list"][0][0], visual))


def tokens_of_first_item(call: Mapping[str, Any]) -> int:
    """The number of tokens of the image that is drawn, by the shapes of a call of JoyImage Edit Plus."""
    return math.prod(call["shape_list"][0][0])


def seconds_then_audio(_: Any, call: Mapping[str, Any]) -> Tokens:
    """Tokens of the duration (B, S, C) before an audio (B, C, L)."""
    seconds = call["global_hidden_states"].shape[1]
    return Tokens(call["hidden_states"].shape[2], seconds, text_first=True)


def audio_with_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """An audio (B, L, C), in patches where the model has them, beside a text (B, T, C) for cross-attention."""
    patch = transformer.config.get("patch_size", 1)
    return Tokens(-(-call["hidden_states"].shape[1] // patch), call["encoder_hidden_states"].shape[1])


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
    elif (positions := call.get("img_ids")) is not None:
        grid = _grid_by_positions(positions, visual)
    elif (positions := call.get("position_ids")) is not None:  # of the text, too
        grid = _grid_by_positions(positions[text:], visual)
    return Tokens(visual, text, text_first=True, grid=grid)


def image_tokens_by_positions(call: Mapping[str, Any]) -> int:
    """The number of the image's own tokens in a call of FLUX: the first, of one time. Reference images have later ones."""
    times = call["img_ids"][..., 0].flatten()[: call["hidden_states"].shape[1]]  # of (V, 3), or (B, V, 4)
    return int((times == times[0]).sum())


def image_tokens_by_shapes(call: Mapping[str, Any]) -> int | None:
    """The number of the image's own tokens in a call of Qwen-Image: the first ones, of the first shape."""
    shapes = call["img_shapes"]
    return None if shapes is None else math.prod(_image_shape(shapes))


def _grid_by_positions(positions: Any, visual: int) -> Grid | None:
    """The grid of tokens with these positions, (V, 3) or (B, V, 4): time, row and column come first.

    None where the last token has a later time than the first one, as those of reference images have.
    """
    if positions.is_meta:
        return None
    first, last = positions.flatten(0, -2)[[0, -1], :3].tolist()
    time, rows, columns = (int(end - begin) for begin, end in zip(first, last, strict=True))
    return None if time else grid_of([1, rows + 1, columns + 1], visual)


def _image_shape(shapes: Sequence[Any]) -> Sequence[int]:
    """Frames, rows and columns of the image: the first shape of a sample. Pipelines with a ControlNet give that one alone."""
    first = shapes[0]
    return first[0] if isinstance(first, list) else first


def grid_of(sizes: Sequence[Any], visual: int) -> Grid | None:
    """The grid of these frames, rows and columns; None where a size is not known, or the tokens are not as many."""
    return Grid(*sizes) if None not in sizes and math.prod(sizes) == visual else None
