"""Further pipelines of the families in `image_families`, with small random weights: they edit or refine an image."""

from collections.abc import Callable
from typing import Any

import torch
from budget import flux
from diffusers import AdaptiveProjectedMixGuidance, AutoencoderKLQwenImage, HunyuanImageTransformer2DModel
from families import qwen, wan_vae
from family_bench import CHANNELS, DIM, HEADS, SHARP, TEXT, FamilyBench, finished, flow, inputs_of
from image_benches import Encoder, bria_fibo, embedded, encode_in_layers, longcat_image
from PIL import Image
from pipelines import CAPTION, POOLED, randomise, vae
from transformers import ProcessorMixin

PHOTO = Image.linear_gradient("L").resize((128, 64)).convert("RGB")


class Processor(ProcessorMixin):
    """Stands in for a processor of texts and images."""

    image_processor = None

    def __init__(self) -> None:
        pass


def of_longcat(cls: Any) -> FamilyBench:
    """Beside the image drawn, of 3 × 6 tokens, one to edit of as many; one prompt in a call."""
    base = longcat_image()
    own, transformer = base.inputs, base.pipe.transformer
    pipe = cls(flow(), vae(1, 3, latent_channels=16, shift_factor=0.1), None, None, Processor(), transformer)
    pipe._encode_prompt = lambda prompt, image: embedded(prompt, TEXT, CHANNELS)
    base.pipe, base.visual = finished(pipe, torch.float64), 3 * 6 + 3 * 6

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        call = own(seed, image=PHOTO, num_images_per_prompt=images, **more)
        return {name: value for name, value in call.items() if name not in ("height", "width", "enable_prompt_rewrite")}

    base.inputs = inputs
    return base


def of_fibo(cls: Any) -> FamilyBench:
    """Beside the image drawn, of 4 × 4 tokens, one to edit of 8 × 16."""
    base = bria_fibo(in_channels=4)
    own, transformer = base.inputs, base.pipe.transformer
    pipe = cls(transformer, flow(), wan_vae(), None, None)
    encode_in_layers(pipe, torch.float64)
    base.pipe, base.visual = finished(pipe, torch.float64), 4 * 4 + 8 * 16

    def inputs(*args: Any, **more: Any) -> dict[str, Any]:
        call = own(*args, image=PHOTO, **{"height": 64, "width": 64, **more})
        texts = (f'{{"edit_instruction": "{prompt}"}}' for prompt in call["prompt"])
        return call | {"prompt": [*texts]}

    base.inputs = inputs
    return base


def of_hunyuan(cls: Any) -> FamilyBench:
    """An image to refine in further channels, beside one text; the last dimensions are frames, rows and columns."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": DIM, "num_layers": 1, "num_single_layers": 1}
    shape = {"in_channels": 8, "out_channels": 4, "num_refiner_layers": 1, "rope_axes_dim": (2, 2, 4), "patch_size": (1, 1, 1)}
    model = HunyuanImageTransformer2DModel(text_embed_dim=CHANNELS, guidance_embeds=True, **sizes, **shape)
    randomise(model, 0, SHARP)
    pipe = cls(flow(), None, None, None, model, AdaptiveProjectedMixGuidance(guidance_scale=3.0))
    own = inputs_of(torch.float64, "guidance", "{}prompt_embeds_mask", height=64, width=80)

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, **more: Any) -> dict[str, Any]:
        call = own(seed, images, **more)
        del call["guidance"]
        pipe.guider.guidance_scale = guidance
        latents = torch.randn(images, 4, 1, 4, 5, generator=torch.Generator().manual_seed(10**6 + seed))
        return call | {"image": latents.double()}

    return FamilyBench(finished(pipe, torch.float64), True, 4 * 5, inputs, TEXT, two_calls=True)


def of_layered(cls: Any) -> FamilyBench:
    """Three images of 2 × 4 tokens drawn, the whole and two layers of it, and one more that is given; one prompt in a call."""
    base = qwen(use_additional_t_cond=True)
    means = {"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4}
    own = AutoencoderKLQwenImage(base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, input_channels=3, **means)
    randomise(own, 1)
    before = base.inputs
    pipe = cls(scheduler=flow(), vae=own, text_encoder=None, tokenizer=None, processor=None, transformer=base.pipe.transformer)
    object.__setattr__(pipe, "text_encoder", Encoder(torch.float64))
    base.pipe, base.visual = finished(pipe, torch.float64), 4 * 2 * 4

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        call = before(seed, **more) | {"image": PHOTO, "layers": 2, "prompt": "a word", "num_images_per_prompt": images}
        call["output_type"] = "pt"  # of latents diffusers makes no output
        return {name: value for name, value in call.items() if name not in ("height", "width")}

    base.inputs = inputs
    return base


def of_cloze(cls: Any) -> FamilyBench:
    """Two pictures of 4 × 4 tokens, the one drawn and the other given; or that, and then one of 4 × 8 tokens made of it."""
    parts: dict[str, Any] = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    base = flux(in_channels=48, out_channels=16)
    own = vae(1, 1, latent_channels=4, shift_factor=0.1)
    pipe = cls(base.pipe.scheduler, own, transformer=base.pipe.transformer, resolution=16, **parts)
    then = getattr(pipe, "upsampling_pipe", None)
    for each in (pipe, then, getattr(pipe, "generation_pipe", None)):
        if each is not None:
            each._get_t5_prompt_embeds = lambda prompt, **_: embedded(prompt, *CAPTION)
            each._get_clip_prompt_embeds = lambda prompt, **_: embedded(prompt, POOLED)
            each.set_progress_bar_config(disable=True)
    size = {"upsampling_height": 8 * 2, "upsampling_width": 16 * 2} if then else {}

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, steps: int = 5, **more: Any) -> dict[str, Any]:
        generator, photo = torch.Generator().manual_seed(seed), PHOTO.resize((16, 16))
        prompts = {"task_prompt": ["a task"] * images, "content_prompt": [f"{seed}, {i}" for i in range(images)]}
        call = {"image": [[[photo.rotate(30 * i), None]] for i in range(images)], "generator": generator, "output_type": "pt"}
        return call | prompts | size | {"guidance_scale": guidance, "num_inference_steps": steps} | more

    bench = FamilyBench(finished(pipe, torch.float64), True, 2 * 4 * 4, inputs, CAPTION[0], text_first=True)
    bench.distilled, bench.loops = True, 2 if then else 1
    return bench


IMAGE_VARIANTS: dict[str, tuple[Callable[..., FamilyBench], dict[str, Any]]] = {
    "VisualClozeGenerationPipeline": (of_cloze, {}),
    "VisualClozePipeline": (of_cloze, {}),
    "LongCatImageEditPipeline": (of_longcat, {}),
    "BriaFiboEditPipeline": (of_fibo, {}),
    "HunyuanImageRefinerPipeline": (of_hunyuan, {}),
    "QwenImageLayeredPipeline": (of_layered, {}),
}
