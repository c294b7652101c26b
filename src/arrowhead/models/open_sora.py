"""The adapter of OpenSora v1.1's transformer, STDiT2, which diffusers does not have."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arrowhead.models.custom import Adapter, Attention, FusedQKV
from arrowhead.plans.layout import Tokens


def open_sora(*, guidance_scale: float = 7.0, temporal: bool = False) -> Adapter:
    """Returns the adapter of `opensora.models.stdit.STDiT2`: spatial self-attention, as in DiTFastAttn, and feed-forwards.

    OpenSora's sampler calls `model.forward(...)` with latents (B, 4, F, H, W), conditional rows first. The output has 8
    channels, the latter 4 of which are a variance. Cross-attention is computed in every step, and so is temporal attention by
    default.

    Args:
        guidance_scale: that of the sampling loop, for the predicted errors of budgets.
        temporal: whether temporal attention is compressed, too.

    Raises:
        InputsInvalid: the scale is not a finite number.

    With an STDiT2 `model`, and a function `sample` that runs OpenSora's sampling loop on the model:

        adapter = arrowhead.open_sora(guidance_scale=7.0)
        plan = arrowhead.search(model, lambda: sample(model), adapter=adapter, budget=arrowhead.Budget(module_flops=0.6))
        with arrowhead.applied(model, plan, adapter):
            video = sample(model)
    """
    attention: dict[str, Attention] = {r"blocks\.\d+\.attn": FusedQKV(over="space", q_norm="q_norm", k_norm="k_norm")}
    if temporal:
        along_time = FusedQKV(over="time", q_norm="q_norm", k_norm="k_norm", rotary="rotary_emb", rotary_first=True)
        attention[r"blocks\.\d+\.attn_temp"] = along_time
    return Adapter(
        attention,
        tokens=_video_by_frames,
        cfg="cond_first",
        feed_forward=r"blocks\.\d+\.mlp",
        guidance_scale=guidance_scale,
        latent_channels=4,
    )


def _video_by_frames(model: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, C, F, H, W) in patches, each frame a sequence; sizes are padded to whole patches."""
    frames, *sides = (-(-size // patch) for size, patch in zip(call["x"].shape[2:], model.patch_size, strict=True))
    return replace(Tokens.of_grid(frames, *sides), frames=frames)
