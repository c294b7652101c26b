"""What of diffusers is known and not supported: transformer classes, and parts that a supported class may have."""

from typing import Any

UNSUPPORTED: dict[str, str] = {
    "SanaTransformer2DModel": "linear attention, which has no softmax that a band could limit",
    "SanaVideoTransformer3DModel": "linear attention, which has no softmax that a band could limit",
    "SanaWMTransformer3DModel": "linear attention in most of its layers",
    "AnyFlowFARTransformer3DModel": "causal attention, frame by frame",
}
"""By the name of the transformer's class, the part of the class that does not fit."""


def attention_to_an_image(transformer: Any) -> str | None:
    """The attention to an image that Wan 2.1's image-to-video transformers have within their cross-attention."""
    image_dim = transformer.config.image_dim
    return None if image_dim is None else f"image_dim={image_dim}: attention to an image beside the one to the text"
