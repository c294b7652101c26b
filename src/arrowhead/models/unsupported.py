"""What of diffusers is known and not supported: transformer classes, and parts that a supported class may have."""

from typing import Any

UNSUPPORTED: dict[str, str] = {
    "SanaTransformer2DModel": "linear attention, which has no softmax that a band could limit",
    "SanaVideoTransformer3DModel": "linear attention, which has no softmax that a band could limit",
    "SanaWMTransformer3DModel": "linear attention in most of its layers",
    "AnyFlowFARTransformer3DModel": "causal attention, frame by frame",
}
"""By the name of the transformer's class, the part of the class that does not fit."""

PERTURBED = "perturbed-attention guidance: a third branch in the batch, whose attention is left out"
CONDITIONS = "a sequence of several images and texts for each sample, whose layout the families table cannot describe"
UNSUPPORTED_PIPELINES: dict[str, str] = {
    "StableDiffusion3PAGPipeline": PERTURBED,
    "StableDiffusion3PAGImg2ImgPipeline": PERTURBED,
    "PixArtSigmaPAGPipeline": PERTURBED,
    "HunyuanDiTPAGPipeline": PERTURBED,
    "LTXI2VLongMultiPromptPipeline": "several windows of the video in one call, each of them with a loop over the timesteps",
    "ZImageOmniPipeline": CONDITIONS,
    "Flux2KleinKVPipeline": "reference images in the first step alone, whose keys and values the later steps attend to",
    "VisualClozePipeline": "a second pipeline that runs after the first; give its `generation_pipe`",
}
"""By the name of the pipeline's class, the part of the call that no plan goes with. The transformer's class is supported."""


def attention_to_an_image(transformer: Any) -> str | None:
    """The attention to an image that Wan 2.1's image-to-video transformers have within their cross-attention."""
    image_dim = transformer.config.image_dim
    return None if image_dim is None else f"image_dim={image_dim}: attention to an image beside the one to the text"
