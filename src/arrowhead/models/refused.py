"""Transformers of diffusers that are known and left out, each with what it has that does not fit."""

REFUSED: dict[str, str] = {
    "SanaTransformer2DModel": "linear attention: there is no softmax to look at through a band",
    "SanaVideoTransformer3DModel": "linear attention: there is no softmax to look at through a band",
    "SanaWMTransformer3DModel": "linear attention in most of its layers",
    "Flux2Transformer2DModel": "single-stream blocks in which one layer projects for attention and feed-forward together",
    "ZImageTransformer2DModel": "inputs in lists, padded sample by sample, so that no call says how many tokens are seen",
    "Lumina2Transformer2DModel": "fewer heads of keys than of queries",
    "AnyFlowFARTransformer3DModel": "causal attention, frame by frame",
}
