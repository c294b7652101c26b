"""How families of videos lay out their tokens, see `token_layouts`.

Functions get the arguments of a transformer's call by name. Shapes: B samples, V visual tokens, T text tokens, C channels,
F frames, H × W latents.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from arrowhead.models.token_layouts import grid_of
from arrowhead.plans.layout import Tokens


def video_with_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, C, F, H, W) in patches, frame by frame, beside a text (B, T, C) for cross-attention."""
    sizes = zip(call["hidden_states"].shape[2:], transformer.config.patch_size, strict=True)
    return Tokens.of_grid(*(size // patch for size, patch in sizes), text=call["encoder_hidden_states"].shape[1])


def video_then_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, C, F, H, W) in patches, frame by frame, before or beside a text (B, T, C) or (B, 1, T, C)."""
    frames, height, width = call["hidden_states"].shape[2:]
    patch, patch_frames = transformer.config.patch_size, getattr(transformer.config, "patch_size_t", 1)
    text = call["encoder_hidden_states"].shape[-2]
    return Tokens.of_grid(frames // patch_frames, height // patch, width // patch, text=text)


def text_then_video(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A text (B, T, C) before a video (B, F, C, H, W) in patches, frame by frame."""
    frames, _, height, width = call["hidden_states"].shape[1:]
    patch, patch_frames = transformer.config.patch_size, transformer.config.patch_size_t or 1
    sizes = -(-frames // patch_frames), height // patch, width // patch
    return Tokens.of_grid(*sizes, text=call["encoder_hidden_states"].shape[1], text_first=True)


def video_by_frames(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, C, F, H, W) in square patches, each frame a sequence."""
    frames, height, width = call["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    return replace(Tokens.of_grid(frames, height // patch, width // patch), frames=frames)


def packed_video_with_text(_: Any, call: Mapping[str, Any]) -> Tokens:
    """A video that comes as tokens (B, V, C), with the sizes of its grid, beside a text (B, T, C) for cross-attention."""
    visual, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]
    return Tokens(visual, text, grid=grid_of([call.get(name) for name in ("num_frames", "height", "width")], visual))


def tokens_of_the_video(call: Mapping[str, Any]) -> int:
    """The tokens of a packed video itself, before which none and after which those of keyframes and reference videos stand."""
    return int(call["num_frames"] * call["height"] * call["width"])


def video_then_texts(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, C, F, H, W) in patches before the texts (B, T, C) of one or two encoders and the tokens of an image."""
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    texts = [call[name] for name in names if call.get(name) is not None]
    return replace(video_then_text(transformer, call), text=sum(text.shape[1] for text in texts))


def texts_then_video(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """The texts (B, T, C) of one or two encoders before a video (B, C, F, H, W) in patches."""
    texts = [call["encoder_hidden_states"], call["encoder_hidden_states_t5"]]
    tokens = video_then_text(transformer, call)
    return replace(tokens, text=sum(text.shape[1] for text in texts if text is not None), text_first=True)


def frames_with_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, F, C, H, W) in patches, frame by frame, beside a text (B, T, C) for cross-attention."""
    return video_with_text(transformer, {**call, "hidden_states": call["hidden_states"].transpose(1, 2)})


def video_of_last_channels_with_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, F, H, W, C) in patches, frame by frame, beside a text (B, T, C) for cross-attention."""
    return video_with_text(transformer, {**call, "hidden_states": call["hidden_states"].movedim(-1, 1)})


def history_and_video_with_text(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """A history of three lengths before a video (B, C, F, H, W), all in patches, beside a text (B, T, C) for cross-attention.

    Patches of the history cover twice and four times as much where it is older.
    """
    names = ("latents_history_short", "latents_history_mid", "latents_history_long")
    return _after_history(video_with_text(transformer, call), [call[name] for name in names])


def history_and_video_then_texts(transformer: Any, call: Mapping[str, Any]) -> Tokens:
    """Such a history before a video (B, C, F, H, W), then the tokens (B, T, C) of an image and a text (B, T, C).

    Of one sample alone the text's padding is left out.
    """
    names = ("latents_clean", "latents_history_2x", "latents_history_4x")
    mask = call["encoder_attention_mask"]
    text = mask.shape[1] if len(mask) > 1 else int(mask.sum())
    tokens = replace(video_then_text(transformer, call), text=call["image_embeds"].shape[1] + text)
    return _after_history(tokens, [call[name] for name in names])


def _after_history(tokens: Tokens, history: Sequence[Any]) -> Tokens:
    """The tokens of a video with those of its history (B, C, F, H, W), newest first, before it: so there is no grid."""
    visual, patch = tokens.visual, (1, 2, 2)
    for times, latents in zip((1, 2, 4), history, strict=True):
        if latents is not None:
            visual += math.prod(-(-size // (times * side)) for size, side in zip(latents.shape[2:], patch, strict=True))
    return replace(tokens, visual=visual, grid=None)
