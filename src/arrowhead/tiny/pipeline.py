"""A class-conditional pipeline in pixel space, called as diffusers' DiTPipeline is, without a VAE."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from arrowhead.tiny.pixels import OUTPUT_TYPES, from_latents
from arrowhead.upstream import execution_device


class TinyDiTPipeline(DiffusionPipeline):
    """Generates images with a `DiTTransformer2DModel` that was trained on pixels; the CFG batch is [cond, uncond]."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: DPMSolverMultistepScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image for each label.

        Args:
            class_labels: B class numbers.
            guidance_scale: strength of classifier-free guidance; 1 or less turns it off.
            generator: source of the initial noise, or one for each image.
            num_inference_steps: denoising steps.
            output_type: `pil`, `np` (B, H, W, 3) in [0, 1], or `pt` (B, 3, H, W) in [0, 1].
            return_dict: return an `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: there is no label, a label is no class of the model, or the output type is unknown.
        """
        config, device = self.transformer.config, execution_device(self)
        null = config.num_embeds_ada_norm
        class_labels = [int(label) for label in class_labels]
        if not class_labels or not all(0 <= label < null for label in class_labels):
            raise ValueError(f"got class_labels={class_labels}, wanted at least one, each from 0 to {null - 1}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"got output_type={output_type!r}, wanted 'pil', 'np' or 'pt'")
        guided, images = guidance_scale > 1, len(class_labels)
        shape = (images, config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        labels = torch.tensor([*class_labels, *([null] * images if guided else [])], device=device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([latents, latents]) if guided else latents  # (2B, 3, H, W): [cond, uncond]
            inputs = self.scheduler.scale_model_input(inputs, t)
            velocity = self.transformer(inputs, timestep=t.expand(len(inputs)), class_labels=labels).sample
            if guided:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        self.maybe_free_model_hooks()
        pictures = from_latents(latents, output_type)
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)
