"""How the pipelines of each family do classifier-free guidance: from which arguments, at which scale, and what is unsupported.

Functions get the arguments of a pipeline's call by name, and the pipeline as `pipe`.
"""

import math
from collections.abc import Mapping
from typing import Any


def guidance_above_one(call: Mapping[str, Any]) -> bool:
    """Whether guidance is on: its scale is above 1."""
    return call["guidance_scale"] > 1


def guidance_above_zero(call: Mapping[str, Any]) -> bool:
    """Whether Z-Image's guidance is on: cond + scale · (cond - uncond), so that it is off at 0."""
    return call["guidance_scale"] > 0


def true_cfg(call: Mapping[str, Any]) -> bool:
    """Whether there is guidance besides the distilled one: `true_cfg_scale` is above 1, and there is a negative prompt.

    Pipelines without `true_cfg_scale` have none.
    """
    names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    embedded = all(call[name] is not None for name in names if name in call)
    return call.get("true_cfg_scale", 1.0) > 1 and (call["negative_prompt"] is not None or embedded)


def undistilled_guidance(call: Mapping[str, Any]) -> bool:
    """Whether FLUX.2 klein's guidance is on: weights that are not distilled, and a scale above 1.

    FLUX.2 itself takes no negative prompt: its scale is an input of the transformer.
    """
    return "negative_prompt_embeds" in call and call["guidance_scale"] > 1 and not call["is_distilled"]


def second_or_first_scale(call: Mapping[str, Any]) -> float:
    """The scale of Wan 2.2's second transformer, by default that of the first."""
    scale, second = call["guidance_scale"], call["guidance_scale_2"]
    return float(scale if second is None else second)


def first_step_below_boundary(pipe: Any) -> int | None:
    """The first step that Wan 2.2 runs its second transformer in: timesteps below `boundary_ratio` of those of training."""
    ratio = pipe.config.get("boundary_ratio")
    boundary = -math.inf if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps
    below = (pipe.scheduler.timesteps < boundary).nonzero()  # one read for all steps: each waits for the device
    return int(below[0]) if len(below) else None


def video_or_audio_guidance(call: Mapping[str, Any]) -> bool:
    """Whether LTX-2's guidance is on, for the video or for the audio, whose scale is by default the video's."""
    return call["guidance_scale"] > 1 or (call.get("audio_guidance_scale") or 0) > 1


def guidance_by_more_calls(call: Mapping[str, Any]) -> str | None:
    """LTX-2's guidance by blocks without attention, and by video and audio apart: calls of the transformer beside the two."""
    off = {"stg_scale": 0, "audio_stg_scale": 0, "modality_scale": 1, "audio_modality_scale": 1}
    on = ", ".join(f"{name}={call[name]}" for name, value in off.items() if (call.get(name) or value) > value)
    return f"{on}, which call the transformer once more in each step (off at {off})" if on else None


def skip_layer_guidance(call: Mapping[str, Any]) -> str | None:
    """SD3's guidance by skipped layers: a third call of the transformer in some steps."""
    skips = call.get("skip_guidance_layers")
    return None if skips is None else f"skip_guidance_layers={skips}, which calls the transformer once more in some steps"


def cfg_trunc_ratio(call: Mapping[str, Any]) -> str | None:
    """Lumina 2's guidance in some of the steps only."""
    ratio = call["cfg_trunc_ratio"]
    return f"cfg_trunc_ratio={ratio}, by which some steps have guidance and some do not" if ratio < 1 else None


def cfg_truncation(call: Mapping[str, Any]) -> str | None:
    """Z-Image's guidance in some of the steps only."""
    limit = call["cfg_truncation"]
    ends = guidance_above_zero(call) and limit is not None and limit < 1
    return f"cfg_truncation={limit}, by which some steps have guidance and some do not" if ends else None


def cfg_interval(call: Mapping[str, Any]) -> str | None:
    """ACE-Step's guidance in some of the steps only."""
    start, end = call["cfg_interval_start"], call["cfg_interval_end"]
    named = f"cfg_interval_start={start} and cfg_interval_end={end}, by which some steps have guidance and some do not"
    return named if ace_step_guidance(call) and (start > 0 or end < 1) else None


def ace_step_guidance(call: Mapping[str, Any]) -> bool:
    """Whether ACE-Step's guidance is on: a scale above 1, and weights into which guidance is not distilled."""
    return guidance_above_one(call) and not call["pipe"].is_turbo
