"""How each family calls for classifier-free guidance, and what of it is not supported."""

import math
from collections.abc import Mapping
from typing import Any


def truncated_guidance(call: Mapping[str, Any]) -> str | None:
    """Lumina 2 can leave the second call out in the last steps."""
    ratio = call["cfg_trunc_ratio"]
    return f"cfg_trunc_ratio={ratio}, by which some steps have guidance and some do not" if ratio < 1 else None


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


def guidance_above_one(call: Mapping[str, Any]) -> bool:
    """Guidance is on where its scale says so."""
    return call["guidance_scale"] > 1
