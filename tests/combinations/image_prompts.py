"""Small pipelines of SD3 and FLUX with IP-Adapters, put on as `load_ip_adapter` does, with random weights."""

from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from pipelines import randomise
from torch import Tensor, nn

CHANNELS = 12
"""Of an image prompt."""


def put_ip_adapter(transformer: Any, dtype: torch.dtype = torch.float64) -> None:
    """Load an IP-Adapter into SD3's transformer; into FLUX's two, of two lengths and scales."""
    flux = hasattr(transformer, "single_transformer_blocks")
    processors: dict[str, Any] = {}
    for seed, (name, processor) in enumerate(transformer.attn_processors.items()):
        if not flux:
            processors[name] = SD3IPAdapterJointAttnProcessor2_0(24, 24, 8, timesteps_emb_dim=24)
        elif name.startswith("single"):
            processors[name] = processor.__class__()
        else:
            processors[name] = FluxIPAdapterAttnProcessor(24, CHANNELS, num_tokens=(4, 3), scale=[1.0, 0.7])
        if isinstance(processors[name], nn.Module):
            randomise(processors[name].to(dtype), seed)
    transformer.set_attn_processor(processors)
    if flux:
        layers = [ImageProjection(CHANNELS, CHANNELS, tokens) for tokens in (4, 3)]
        transformer.encoder_hid_proj = MultiIPAdapterImageProjection(layers)
        transformer.config.encoder_hid_dim_type = "ip_image_proj"
    else:
        sizes = {"embed_dim": CHANNELS, "output_dim": 24, "hidden_dim": 24, "dim_head": 8, "heads": 2}
        transformer.image_proj = IPAdapterTimeImageProjection(depth=1, num_queries=4, timestep_freq_shift=0, **sizes)
    randomise((transformer.encoder_hid_proj if flux else transformer.image_proj).to(dtype), 9)


def image_prompts(pipe: Any, seed: int) -> dict[str, Any]:
    """The arguments of a call with random image prompts, for all images; other ones for the unconditional branch."""
    generator = torch.Generator().manual_seed(seed + 500)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(pipe.dtype)

    if hasattr(pipe.transformer, "single_transformer_blocks"):
        names = "ip_adapter_image_embeds", "negative_ip_adapter_image_embeds"
        return {name: [draw(1, 1, CHANNELS) for _ in range(2)] for name in names}
    return {"ip_adapter_image_embeds": draw(2, 5, CHANNELS)}  # unconditional, conditional
