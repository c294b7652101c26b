"""OpenSora v1.1's transformer, STDiT2, which is not in diffusers: its adapter."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arrowhead.models.custom import Adapter, Attention, FusedQKV
from arrowhead.plans.layout import Tokens


def open_sora(*, guidance_scale: float = 7.0, temporal: bool = False) -> Adapter:
    """The adapter of `opensora.models.stdit.STDiT2`: its spatial self-attention, as DiTFastAttn has it, and feed-forwards.

    Its sampler calls `model.forward(...)` with both branches in one batch, the conditional one first. Cross-attention is left
    alone, and temporal attention unless it is asked for.

    Args:
        guidance_scale: of the loop, which budgets go by.
        temporal: whether temporal attention is compressed, too.
    """
    attention: dict[str, Attention] = {r"blocks\.\d+\.attn": FusedQKV(over="space", q_norm="q_norm", k_norm="k_norm")}
    if temporal:
        turned = FusedQKV(over="time", q_norm="q_norm", k_norm="k_norm", rotary="rotary_emb", rotary_first=True)
        attention[r"blocks\.\d+\.attn_temp"] = turned
    return Adapter(
        attention,
        tokens=_video_patches,
        cfg="cond_first",
        feed_forward=r"blocks\.\d+\.mlp",
        guidance_scale=guidance_scale,
        latent_channels=4,  # of 8: the others are a variance
    )


def _video_patches(model: Any, call: Mapping[str, Any]) -> Tokens:
    """A video (B, C, T, H, W) in patches, the last ones padded."""
    frames, *sides = (-(-size // patch) for size, patch in zip(call["x"].shape[2:], model.patch_size, strict=True))
    return replace(Tokens.of_grid(frames, *sides), frames=frames)
