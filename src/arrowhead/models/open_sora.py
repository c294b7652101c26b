"""The adapter of OpenSora's transformers, STDiT2 (v1.1) and STDiT3 (v1.2), which diffusers does not have."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import Adapter
from arrowhead.models.custom_attention import Attention, FusedQKV
from arrowhead.plans.layout import Tokens

_NEWER = r"spatial_blocks\.\d+\.attn", r"temporal_blocks\.\d+\.attn"
"""The attention of STDiT3, in space and along time."""


def open_sora(*, guidance_scale: float = 7.0, temporal: bool = False, version: Literal["1.1", "1.2"] = "1.1") -> Adapter:
    """Returns the adapter of OpenSora's `STDiT2` or `STDiT3`: spatial self-attention, as in DiTFastAttn, and feed-forwards.

    OpenSora's sampler calls the model with latents (B, 4, F, H, W), conditional rows first. The output has 8 channels, the
    latter 4 of which are a variance. Cross-attention is computed in every step, and so is temporal attention by default.

    Args:
        guidance_scale: that of the sampling loop, for the predicted errors of budgets.
        temporal: whether temporal attention is compressed, too.
        version: "1.1" for `opensora.models.stdit.STDiT2`, whose blocks attend in space and along time; "1.2" for `STDiT3`,
            whose spatial and temporal blocks take turns.

    Raises:
        InputsInvalid: the scale is not a finite number, or there is no such version.

    With an STDiT2 `model`, and a function `sample` that runs OpenSora's sampling loop on the model:

        adapter = arrowhead.open_sora(guidance_scale=7.0)
        plan = arrowhead.search(model, lambda: sample(model), adapter=adapter, budget=arrowhead.Budget(module_flops=0.6))
        with arrowhead.applied(model, plan, adapter):
            video = sample(model)
    """
    if version not in ("1.1", "1.2"):
        raise InputsInvalid(f"got version={version!r:.200}, wanted '1.1' or '1.2'; describe others with arrowhead.describe")
    older = version == "1.1"
    spatial, along_time = (r"blocks\.\d+\.attn", r"blocks\.\d+\.attn_temp") if older else _NEWER
    attention: dict[str, Attention] = {spatial: FusedQKV(over="space", q_norm="q_norm", k_norm="k_norm")}
    if temporal:
        attention[along_time] = FusedQKV(over="time", q_norm="q_norm", k_norm="k_norm", rotary="rotary_emb", rotary_first=older)
    return Adapter(
        attention,
        tokens=_video_by_frames,
        cfg="cond_first",
        feed_forward=r"blocks\.\d+\.mlp" if older else r"(spatial|temporal)_blocks\.\d+\.mlp",
        guidance_scale=guidance_scale,
        latent_channels=4,
    )


def _video_by_frames(model: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, C, F, H, W) in patches, each frame a sequence; sizes are padded to whole patches."""
    frames, *sides = (-(-size // patch) for size, patch in zip(call["x"].shape[2:], model.patch_size, strict=True))
    return replace(Tokens.of_grid(frames, *sides), frames=frames)
