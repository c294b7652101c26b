"""Latte's transformer with its attention along time, which plans for its pipeline leave alone."""

from arrowhead.models.custom import Adapter, Attention
from arrowhead.models.token_layouts import frame_by_frame


def latte(*, guidance_scale: float = 7.5) -> Adapter:
    """The adapter of `LatteTransformer3DModel`: self-attention within frames, and along time.

    It is for `pipe.transformer`, while `lambda: pipe(**inputs)` generates. Plans name the sites within frames first.

    Args:
        guidance_scale: of the pipeline's calls: up to 1 there is no guidance.
    """
    return Adapter(
        {
            r"transformer_blocks\.\d+\.attn1": Attention(over="space"),
            r"temporal_transformer_blocks\.\d+\.attn1": Attention(over="time"),
        },
        tokens=frame_by_frame,
        cfg="uncond_first" if guidance_scale > 1 else None,
        guidance_scale=guidance_scale,
        latent_channels=4,  # of 8: the others are a variance
    )
