"""The families table: for each transformer class, where attention sits and how its pipelines call it. Data, not code."""

from arrowhead.models.family import (
    Family,
    guidance_above_one,
    patches,
    patches_then_text,
    skipped_layers,
    text_then_packed,
    true_cfg,
)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="DiT",
        tested="all contracts",
        left_alone="class and step embeddings, output layer",
        transformer="DiTTransformer2DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        branch_order={"DiTPipeline": "cond_first", "TinyDiTPipeline": "cond_first"},
        tokens=patches,
        guided=guidance_above_one,
    ),
    Family(
        name="PixArt",
        tested="all contracts",
        left_alone="caption projection, step embeddings, output layer",
        transformer="PixArtTransformer2DModel",
        site_pattern=r"transformer_blocks\.\d+\.attn1",
        cross_pattern=r"transformer_blocks\.\d+\.attn2",
        branch_order={"PixArtAlphaPipeline": "uncond_first", "PixArtSigmaPipeline": "uncond_first"},
        tokens=patches_then_text,
        guided=guidance_above_one,
    ),
    Family(
        name="SD3, SD3.5",
        tested="all contracts",
        left_alone="the text's own feed-forwards (but for whole blocks), embeddings",
        transformer="SD3Transformer2DModel",  # SD3.5 adds an image-only attn2 to some blocks
        site_pattern=r"transformer_blocks\.\d+\.attn2?",
        joint_pattern=r"transformer_blocks\.\d+\.attn",
        branch_order={"StableDiffusion3Pipeline": "uncond_first", "TinyMMDiTPipeline": "uncond_first"},
        tokens=patches_then_text,
        guided=guidance_above_one,
        refused=skipped_layers,
    ),
    Family(
        name="FLUX.1",
        tested="all contracts",
        left_alone="the text's own feed-forwards (but for whole blocks), embeddings",
        transformer="FluxTransformer2DModel",  # single-stream blocks have no output projection of their own
        site_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        joint_pattern=r"(single_)?transformer_blocks\.\d+\.attn",
        branch_order={"FluxPipeline": "two_calls"},
        tokens=text_then_packed,
        guided=true_cfg,
        guidance_scale=lambda call: float(call["true_cfg_scale"]),
    ),
)
