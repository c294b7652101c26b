"""Small diffusers pipelines with random weights whose attention matters, and the arguments of a call of each."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from arrowhead.tiny.pipeline import TinyDiTPipeline
from arrowhead.tiny.text_to_image import TinyMMDiTPipeline

CAPTION = (7, 12)  # text tokens, channels
POOLED = 10  # channels of SD3's embedding of the whole text


@dataclass
class Bench:
    """A pipeline under test.

    Attributes:
        pipe: the pipeline.
        conditional_first: whether the conditional rows come first in its CFG batch.
        visual: the visual tokens in a call with `inputs`.
        inputs: `inputs(seed, images, guidance, steps, **more)`, new keyword arguments of a call.
        text: the text tokens in its joint attention.
    """

    pipe: Any
    conditional_first: bool
    visual: int
    inputs: Callable[..., dict[str, Any]]
    text: int = 0

    @property
    def layers(self) -> int:
        return len(self.attentions)

    @property
    def attentions(self) -> list[Any]:
        """The self-attentions in the order they run: `attn1`, or `attn` and, where there is one, `attn2`."""
        blocks = self.pipe.transformer.transformer_blocks
        if not self.text:
            return [block.attn1 for block in blocks]
        return [attn for block in blocks for attn in (block.attn, block.attn2) if attn is not None]


def randomise(module: torch.nn.Module, seed: int, sharp: Sequence[str] = (".attn1.",)) -> None:
    """Give a module random weights other than zero, so that attention scores have a deviation of about 3, outputs about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        gain = 1.7 if any(path in name for path in sharp) else 1.0
        if weight.ndim > 1 and "table" not in name:
            noise *= gain / weight[0].numel() ** 0.5
        elif weight.ndim == 1 and "norm" in name and name.endswith("weight") and "linear" not in name:
            noise = gain * (1 + 0.2 * noise)
        else:
            noise *= 0.5
        weight.data.copy_(noise)
    module.eval()


def scheduler(**settings: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**{"prediction_type": "v_prediction", **settings})


def vae(seed: int, halvings: int = 1, cls: type = AutoencoderKL, **config: Any) -> Any:
    """A VAE with one attention: by default 4 latent channels, and half the image's size."""
    blocks = halvings + 1
    model = cls(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        **{"latent_channels": 4, **({"scaling_factor": 1.0} if cls is AutoencoderKL else {}), **config},
    )
    randomise(model, seed)
    return model


def _finished(pipe: Any, dtype: torch.dtype) -> Any:
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _class_inputs(classes: int) -> Callable[..., dict[str, Any]]:
    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, steps: int = 5, **more: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (images,), generator=generator).tolist()
        call = {"class_labels": labels, "guidance_scale": guidance, "num_inference_steps": steps}
        return call | {"generator": generator, "output_type": "pt"} | more

    return inputs


def _caption_inputs(
    seed: int = 0, images: int = 1, guidance: float = 3.0, steps: int = 5, negative: int = 0, **more: Any
) -> dict[str, Any]:
    """The arguments of a call with the embeddings of `images` prompts; `negative` seeds those of the negative prompt."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, *CAPTION)
    mask = torch.ones(images, CAPTION[0], dtype=torch.long)
    mask[:, 5:] = 0
    call = {
        "prompt_embeds": torch.randn(shape, generator=generator, dtype=torch.float64),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": torch.randn(shape, generator=torch.Generator().manual_seed(10**6 + negative)),
        "negative_prompt_attention_mask": torch.ones(images, CAPTION[0], dtype=torch.long),
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "generator": generator,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return call | more


def dit_transformer(seed: int = 0, cls: type = DiTTransformer2DModel, **config: Any) -> Any:
    standard = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8, "in_channels": 4}
    model = cls(**standard | config)
    randomise(model, seed)
    return model


def dit(dtype: torch.dtype = torch.float64, seed: int = 0, learned_sigma: bool = False, **config: Any) -> Bench:
    model = dit_transformer(seed, **{"out_channels": 8 if learned_sigma else 4, **config})
    pipe = _finished(DiTPipeline(model, vae(seed + 1), scheduler()), dtype)
    return Bench(pipe, True, (model.config.sample_size // 2) ** 2, _class_inputs(1000))


def tiny(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Bench:
    flow = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    settings = {"in_channels": 3, "num_embeds_ada_norm": 10, "num_attention_heads": 2, **config}
    pipe = _finished(TinyDiTPipeline(dit_transformer(seed, **settings), flow), dtype)
    return Bench(pipe, True, (pipe.transformer.config.sample_size // 2) ** 2, _class_inputs(10))


def _pixart(pipeline: type, sample_size: int, dtype: torch.dtype, seed: int, config: dict[str, Any]) -> Bench:
    standard = {
        "num_attention_heads": 4,
        "attention_head_dim": 6,
        "cross_attention_dim": 24,
        "num_layers": 3,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": sample_size,
        "caption_channels": CAPTION[1],
    }
    model = PixArtTransformer2DModel(**standard | config)
    randomise(model, seed)
    pipe = pipeline(tokenizer=None, text_encoder=None, vae=vae(seed + 1), transformer=model, scheduler=scheduler())
    return Bench(_finished(pipe, dtype), False, 16, _caption_inputs)


def pixart_alpha(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Bench:
    """With the size and aspect conditions of the 1024-pixel model."""
    return _pixart(PixArtAlphaPipeline, 128, dtype, seed, config)


def pixart_sigma(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Bench:
    return _pixart(PixArtSigmaPipeline, 8, dtype, seed, config)


def _sd3_transformer(seed: int, **config: Any) -> SD3Transformer2DModel:
    standard = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 3,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": CAPTION[1],
        "caption_projection_dim": 24,  # heads × head dimension
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 8,
    }
    model = SD3Transformer2DModel(**standard | config)
    randomise(model, seed, sharp=(".attn.", ".attn2."))
    return model


def sd3(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Bench:
    """Text and image attend jointly, the image first; the last block returns no text."""
    parts: dict[str, Any] = dict.fromkeys(
        ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    )
    model = _sd3_transformer(seed, **config)
    pipe = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(seed + 1), **parts)

    def inputs(
        seed: int = 0, images: int = 1, guidance: float = 3.0, steps: int = 5, negative: int = 0, **more: Any
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        other = torch.Generator().manual_seed(10**6 + negative)
        call = {
            "prompt_embeds": torch.randn(images, *CAPTION, generator=generator).to(dtype),
            "pooled_prompt_embeds": torch.randn(images, POOLED, generator=generator).to(dtype),
            "negative_prompt_embeds": torch.randn(images, *CAPTION, generator=other).to(dtype),
            "negative_pooled_prompt_embeds": torch.randn(images, POOLED, generator=other).to(dtype),
            "guidance_scale": guidance,
            "num_inference_steps": steps,
            "generator": generator,
            "height": 16,
            "width": 16,
            "output_type": "latent",
        }
        return call | more

    return Bench(_finished(pipe, dtype), False, 16, inputs, text=CAPTION[0])


def sd35(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Bench:
    """Two blocks with three sites, the second of which attends over the image alone; Q and K have norms for each head."""
    return sd3(dtype, seed, **{"num_layers": 2, "qk_norm": "rms_norm", "dual_attention_layers": (0,), **config})


WORDS = ("<pad>", "<begin>", "<unknown>", "<end>", "red", "green", "small", "fish", "house", "cloud")


def tiny_mmdit(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Bench:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", model_max_length=CAPTION[0]
    )
    sizes = {"hidden_size": CAPTION[1], "intermediate_size": 24, "projection_dim": POOLED, "num_hidden_layers": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    text = CLIPTextConfig(vocab_size=len(WORDS), max_position_embeddings=CAPTION[0], num_attention_heads=2, **sizes, **ids)
    encoder = CLIPTextModelWithProjection(text)
    randomise(encoder, seed + 1)
    model = _sd3_transformer(seed, **{"in_channels": 3, "out_channels": 3, "pos_embed_max_size": 4, **config})
    pipe = TinyMMDiTPipeline(model, FlowMatchEulerDiscreteScheduler(shift=2.0), encoder, tokenizer)

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, steps: int = 5, **more: Any) -> dict[str, Any]:
        draw = random.Random(seed)
        prompts = [" ".join(["<begin>", *draw.sample(WORDS[4:], 3), "<end>"]) for _ in range(images)]
        call = {"prompt": prompts, "guidance_scale": guidance, "num_inference_steps": steps, "output_type": "pt"}
        return call | {"generator": torch.Generator().manual_seed(seed)} | more

    return Bench(_finished(pipe, dtype), False, 16, inputs, text=CAPTION[0])


BENCHES: dict[str, Callable[..., Bench]] = {
    "dit": dit,
    "dit_learned_sigma": lambda *args, **kwargs: dit(*args, **{"learned_sigma": True, **kwargs}),
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
    "tiny": tiny,
}
JOINT: dict[str, Callable[..., Bench]] = {"sd3": sd3, "sd35": sd35, "tiny_mmdit": tiny_mmdit}
"""Pipelines in which text and image attend together."""
