"""Transformers of diffusers that are known and left out, each with what it has that does not fit."""

REFUSED: dict[str, str] = {
    "SanaTransformer2DModel": "linear attention: there is no softmax to look at through a band",
    "SanaVideoTransformer3DModel": "linear attention: there is no softmax to look at through a band",
    "SanaWMTransformer3DModel": "linear attention in most of its layers",
    "AnyFlowFARTransformer3DModel": "causal attention, frame by frame",
}
