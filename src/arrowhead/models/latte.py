"""The adapter of Latte's transformer: attention within frames and along time. Plans for the pipeline have the former alone."""

from arrowhead.models.custom import Adapter
from arrowhead.models.custom_attention import Attention
from arrowhead.models.video_tokens import video_by_frames


def latte(*, guidance_scale: float = 7.5) -> Adapter:
    """Returns the adapter of diffusers' `LatteTransformer3DModel`: self-attention within frames, and along time.

    The transformer is called with latents (B, 4, F, H, W), unconditional rows first, and returns (B, 8, F, H, W): the latter 4
    channels are a variance. A search's plan has the sites in the order in which they run.

    Args:
        guidance_scale: that of the pipeline's calls. Up to 1 there is no guidance.

    Raises:
        InputsInvalid: the scale is not a finite number.

    For a `LattePipeline`, which is called as ever while a plan for its transformer is applied:

        adapter = arrowhead.latte(guidance_scale=7.5)
        plan = arrowhead.search(pipe.transformer, lambda: pipe(**inputs), adapter=adapter, threshold=0.1)
        with arrowhead.applied(pipe.transformer, plan, adapter):
            video = pipe(**inputs).frames
    """
    return Adapter(
        {
            r"transformer_blocks\.\d+\.attn1": Attention(over="space"),
            r"temporal_transformer_blocks\.\d+\.attn1": Attention(over="time"),
        },
        tokens=video_by_frames,
        cfg="uncond_first" if guidance_scale > 1 else None,
        guidance_scale=guidance_scale,
        latent_channels=4,
    )
