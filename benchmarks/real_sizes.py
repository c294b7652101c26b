"""Transformers at the sizes that the papers measured, with random weights, and pipelines that only call them.

The numbers are those of the public models' configurations; nothing is downloaded. A pipeline here is of the real class,
so that plans can be applied, but its call is only the loop over timesteps: no text encoder, no scheduler's step, no VAE.
"""

# ruff: noqa: ARG002 - the looped call takes what arrowhead asks of it

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from arrowhead.plans.layout import Tokens

GUIDED = 2  # samples of an image: both CFG branches


class Loop:
    """Before a pipeline's class: its call is the transformer's, at every timestep, on the same inputs.

    Its other arguments are those that arrowhead looks at.
    """

    scheduler: Any
    transformer: Any

    @torch.no_grad()
    def __call__(
        self,
        inputs: Mapping[str, Any],
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        true_cfg_scale: float = 1.0,
        negative_prompt: None = None,
        negative_prompt_embeds: None = None,
        negative_pooled_prompt_embeds: None = None,
    ) -> torch.Tensor:
        """The last output."""
        self.scheduler.set_timesteps(num_inference_steps)
        for _ in self.scheduler.timesteps:
            out = self.transformer(**inputs, return_dict=False)[0]
        return out


class LoopedDiT(Loop, DiTPipeline):
    """DiT."""


class LoopedPixArt(Loop, PixArtSigmaPipeline):
    """PixArt-Σ."""


class LoopedSD3(Loop, StableDiffusion3Pipeline):
    """Stable Diffusion 3."""


class LoopedFlux(Loop, FluxPipeline):
    """FLUX.1."""


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _dit_inputs(config: Mapping[str, Any], side: int, _: int) -> dict[str, Any]:
    labels = torch.tensor([1, config["num_embeds_ada_norm"]])  # the last one is no class
    return {"hidden_states": _noise(GUIDED, 4, side, side), "timestep": torch.full((GUIDED,), 500), "class_labels": labels}


def _pixart_inputs(config: Mapping[str, Any], side: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(GUIDED, 4, side, side),
        "timestep": torch.full((GUIDED,), 500),
        "encoder_hidden_states": _noise(GUIDED, text, config["caption_channels"]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3_inputs(config: Mapping[str, Any], side: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(GUIDED, 16, side, side),
        "timestep": torch.full((GUIDED,), 500),
        "encoder_hidden_states": _noise(GUIDED, text, config["joint_attention_dim"]),
        "pooled_projections": _noise(GUIDED, config["pooled_projection_dim"]),
    }


def _flux_inputs(config: Mapping[str, Any], side: int, text: int) -> dict[str, Any]:
    """One sample: guidance is an input. Latents are packed, four to a token."""
    side //= 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)  # (V, 3)
    return {
        "hidden_states": _noise(1, side * side, config["in_channels"]),
        "timestep": torch.full((1,), 0.5),
        "guidance": torch.full((1,), 3.5),
        "encoder_hidden_states": _noise(1, text, config["joint_attention_dim"]),
        "pooled_projections": _noise(1, config["pooled_projection_dim"]),
        "img_ids": places.float(),
        "txt_ids": torch.zeros(text, 3),
    }


@dataclass(frozen=True)
class Model:
    """A transformer at a resolution. `config` is the class's beside `sample_size`, which is the side of the latents.

    `attended` is what its attention attends over, `small` what the smoke run has in place of some settings.
    """

    name: str
    pixels: int
    text: int
    attended: Tokens
    transformer: Callable[..., Any]
    config: Mapping[str, Any]
    pipeline: Callable[..., Any]
    scheduler: Callable[..., Any]
    inputs: Callable[[Mapping[str, Any], int, int], dict[str, Any]]
    small: Mapping[str, Any] = field(default_factory=dict)
    guided: bool = True

    @property
    def side(self) -> int:
        """Of the latents."""
        return self.pixels // 8

    def shrunk(self) -> "Model":
        """The same with two blocks of each kind and 256 visual tokens, 7 of text."""
        text = 7 if self.attended.text else 0
        return replace(
            self,
            pixels=256,
            text=7,
            attended=replace(self.attended, visual=256, text=text),
            config={**self.config, **self.small},
        )

    def build(self, device: str, dtype: torch.dtype = torch.float32) -> Any:
        """The pipeline."""
        sized = {} if self.transformer is FluxTransformer2DModel else {"sample_size": self.side}
        with torch.device(device):
            transformer = self.transformer(**self.config, **sized).eval().to(dtype)
        unused = [name for name in inspect.signature(self.pipeline).parameters if name not in ("transformer", "scheduler")]
        return self.pipeline(transformer=transformer, scheduler=self.scheduler(), **dict.fromkeys(unused))

    def call(self, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments of the pipeline's call, without the number of steps."""
        with torch.device(device):
            inputs = self.inputs(self.config, self.side, self.text)
        inputs = {name: value.to(dtype) if _is_float(value) else value for name, value in inputs.items()}
        return {"inputs": inputs, **({"guidance_scale": 4.0} if self.guided else {})}


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


DIT = Model(
    "DiT-XL/2-512",
    512,
    0,
    Tokens(1024),
    DiTTransformer2DModel,
    {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_layers": 28,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    },
    LoopedDiT,
    DPMSolverMultistepScheduler,
    _dit_inputs,
    {"num_attention_heads": 4, "num_layers": 2},
)
PIXART = Model(
    "PixArt-Σ-1024",
    1024,
    300,
    Tokens(4096),
    PixArtTransformer2DModel,
    {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_layers": 28,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "use_additional_conditions": False,
    },
    LoopedPixArt,
    DPMSolverMultistepScheduler,
    _pixart_inputs,
    {"num_attention_heads": 4, "num_layers": 2, "cross_attention_dim": 288, "caption_channels": 64},
)
SD3 = Model(
    "SD3-1024",
    1024,
    333,
    Tokens(4096, 333),
    SD3Transformer2DModel,
    {
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "num_layers": 24,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    LoopedSD3,
    FlowMatchEulerDiscreteScheduler,
    _sd3_inputs,
    {"num_attention_heads": 4, "num_layers": 2, "joint_attention_dim": 64, "caption_projection_dim": 256},
)
FLUX = Model(
    "FLUX-1024",
    1024,
    512,
    Tokens(4096, 512, text_first=True),
    FluxTransformer2DModel,
    {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 19,
        "num_single_layers": 38,
        "in_channels": 64,
        "patch_size": 1,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    LoopedFlux,
    FlowMatchEulerDiscreteScheduler,
    _flux_inputs,
    {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 64},
    guided=False,
)


def at_2k(model: Model) -> Model:
    """The same at 2048 pixels."""
    attended = replace(model.attended, visual=4 * model.attended.visual)
    return replace(model, name=model.name.replace("1024", "2K"), pixels=2048, attended=attended)


MODELS = (DIT, PIXART, at_2k(PIXART), SD3, at_2k(SD3), FLUX, at_2k(FLUX))
