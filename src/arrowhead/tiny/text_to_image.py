"""A text-to-image pipeline in pixel space, called as diffusers' StableDiffusion3Pipeline is, without a VAE."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, SD3Transformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

from arrowhead.tiny.pixels import OUTPUT_TYPES, from_latents
from arrowhead.upstream import execution_device


class TinyMMDiTPipeline(DiffusionPipeline):
    """Generates images with an `SD3Transformer2DModel` that was trained on pixels; the CFG batch is [uncond, cond]."""

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)

    def encode_prompt(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Encode B prompts, padded to the tokenizer's length L, to text tokens (B, L, C) and pooled vectors (B, C)."""
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = self.text_encoder(ids.to(device))
        return text.last_hidden_state, text.text_embeds

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 28,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image for each prompt.

        Args:
            prompt: B prompts, or one.
            negative_prompt: one negative prompt for all, or one for each prompt; empty if None.
            guidance_scale: strength of classifier-free guidance; 1 or less turns it off.
            generator: source of the initial noise, or one for each image.
            num_inference_steps: denoising steps.
            height: in pixels; the side of the training pictures if None.
            width: in pixels; the side of the training pictures if None.
            output_type: `pil`, `np` (B, H, W, 3) in [0, 1], or `pt` (B, 3, H, W) in [0, 1].
            return_dict: return an `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: there is no prompt, the number of negative prompts differs, the model cannot draw the size, or the
                output type is unknown.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = negative_prompt or ""
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        height, width = height or self.side, width or self.side
        self._check(prompts, negatives, (height, width), output_type)
        device, guided = execution_device(self), guidance_scale > 1
        shape = (len(prompts), self.transformer.config.in_channels, height, width)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        text, pooled = self.encode_prompt([*negatives, *prompts] if guided else prompts, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([latents, latents]) if guided else latents  # (2B, 3, H, W): [uncond, cond]
            velocity = self.transformer(inputs, text, pooled, t.expand(len(inputs))).sample
            if guided:
                unconditional, conditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        self.maybe_free_model_hooks()
        pictures = from_latents(latents, output_type)
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    @property
    def side(self) -> int:
        """The side in pixels of the training pictures, which is also the largest side that the model can draw."""
        config = self.transformer.config
        return int(config.patch_size * config.pos_embed_max_size)

    def _check(self, prompts: list[str], negatives: list[str], size: tuple[int, int], output_type: str) -> None:
        patch = self.transformer.config.patch_size
        if not prompts or len(negatives) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(negatives)} negative prompts, wanted one each or more")
        if any(s % patch or not 0 < s <= self.side for s in size):
            raise ValueError(f"got height and width {size}, wanted multiples of {patch} up to {self.side}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"got output_type={output_type!r}, wanted 'pil', 'np' or 'pt'")
