"""What of diffusers is known and not supported: transformer classes, and parts that a supported class may have."""

from collections.abc import Mapping
from typing import Any

UNSUPPORTED: dict[str, str] = {
    "SanaTransformer2DModel": "linear attention, which has no softmax that a band could limit",
    "SanaVideoTransformer3DModel": "linear attention, which has no softmax that a band could limit",
    "SanaWMTransformer3DModel": "linear attention in most of its layers",
    "AnyFlowFARTransformer3DModel": "causal attention, frame by frame",
    "QwenImage21Transformer2DModel": "causal attention, of text and reference images, in a call for each part of the sequence",
    "Kandinsky6SRTransformer3DModel": "attention to blocks of tokens that each call chooses anew",
    "StableAudio3DiTModel": "differential attention, the difference of two attentions in each module",
    "Ideogram4Transformer2DModel": "a second transformer for the unconditional branch, in every step",
    "PRXTransformer2DModel": "attention in which the text has keys and values and no queries",
    "NucleusMoEImageTransformer2DModel": "attention in which the text has keys and values and no queries",
    "Cosmos3OmniTransformer": "causal attention of the prompt and full attention of the rest, in one module's call",
    "RFD4ProteinaTransformer": "attention with a bias for each pair of residues; it makes proteins",
    "Transformer2DModel": "classes of discrete codes in place of noise levels",
    "WanAnimate2Transformer3DModel": "attention by FlexAttention's block masks alone",
    "OmniGenTransformer2DModel": "prompt, timestep and images in one sequence, partly causal; guidance that is never off",
}
"""By the name of the transformer's class, the part of the class that does not fit."""

PERTURBED = "perturbed-attention guidance: a third branch in the batch, whose attention is left out"
TWICE = "two steps of the scheduler at each timestep, of which the first is taken back"
FORCING = "diffusion forcing: each frame has a timestep, and frames begin and end at different steps of the loop"
CONDITIONS = "a sequence of several images and texts for each sample, whose layout the families table cannot describe"
STAGES = "stages at several resolutions in each of several chunks, which no search sees"
UNSUPPORTED_PIPELINES: dict[str, str] = {
    "StableDiffusion3PAGPipeline": PERTURBED,
    "StableDiffusion3PAGImg2ImgPipeline": PERTURBED,
    "PixArtSigmaPAGPipeline": PERTURBED,
    "HunyuanDiTPAGPipeline": PERTURBED,
    "LTXI2VLongMultiPromptPipeline": "several windows of the video, each with a loop without the last timestep",
    "SkyReelsV2DiffusionForcingPipeline": FORCING,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": FORCING,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": FORCING,
    "CosmosTextToWorldPipeline": TWICE,
    "CosmosVideoToWorldPipeline": TWICE,
    "HeliosPyramidPipeline": STAGES,
    "LTX2DFRPipeline": "frames at a rate that changes on the way, which no test covers",
    "LTX2DFRTemporalRefinePipeline": "frames at a rate that changes on the way, which no test covers",
    "ZImageOmniPipeline": CONDITIONS,
    "Flux2KleinKVPipeline": "reference images in the first step alone, whose keys and values the later steps attend to",
}
"""By the name of the pipeline's class, the part of the call that no plan goes with. The transformer's class is supported."""


def causal_blocks(transformer: Any) -> str | None:
    """The mask by which SkyReels V2, in diffusion forcing, attends to earlier blocks of frames alone."""
    frames = transformer.config.num_frame_per_block
    return f"num_frame_per_block={frames}: attention to earlier frames alone" if frames > 1 else None


def text_in_video_layers(transformer: Any) -> str | None:
    """Blocks of EasyAnimate whose text passes the video's layers, and leaves attention without a projection."""
    video, both = transformer.config.mmdit_layers, transformer.config.num_layers
    return f"mmdit_layers={video} of {both}: blocks without layers for the text" if video < both else None


def temporal_reasoning(call: Mapping[str, Any]) -> str | None:
    """ChronoEdit's frames between the picture and its edit, which the pipeline drops on the way."""
    return (
        "enable_temporal_reasoning=True, by which frames are dropped on the way" if call["enable_temporal_reasoning"] else None
    )


def sparse_attention(transformer: Any) -> str | None:
    """Kandinsky 5's attention to blocks of tokens that each call chooses anew."""
    kind = transformer.config.attention_type
    return f"attention_type={kind!r}: attention to blocks that each call chooses" if kind != "regular" else None
