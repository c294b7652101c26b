"""What the benches of families have in common: the class of a bench, and the arguments of its calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import CAPTION, POOLED, Bench

from arrowhead.models.find import find
from arrowhead.plans.layout import Grid, Tokens

TEXT, CHANNELS = CAPTION
HEADS, DIM = 2, 8
SHARP = (".attn1.", ".attn.")


@dataclass
class FamilyBench(Bench):
    """A bench of a family.

    Attributes:
        text_first: whether the text tokens come before the visual ones.
        text_seen: the text tokens that some site attends to, jointly or by cross-attention.
        two_calls: whether the CFG branches come in two calls.
        switch: the step, of five, from which a second transformer is called; None without one.
        distilled: whether the pipeline has no unconditional branch at any scale.
        single: whether the pipeline takes one prompt and generates one sample, at any number of images that is asked for.
        loops: the denoising loops in a call of the pipeline.
        frames: the number of sequences that the visual tokens are for sites that attend within a frame.
        grid: the grid of the visual tokens where boxes are tested.
    """

    text_first: bool = False
    text_seen: int = TEXT
    two_calls: bool = False
    switch: int | None = None
    distilled: bool = False
    single: bool = False
    loops: int = 1
    frames: int = 1
    grid: Grid | None = None

    @property
    def attentions(self) -> list[Any]:
        """The self-attention modules in the order they run."""
        return list(find(self.pipe).modules.values())

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.visual, self.text, self.text_first, self.frames)


def finished(pipe: Any, dtype: torch.dtype) -> Any:
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(
    dtype: torch.dtype, scale: str, mask: str | None, pooled: bool = False, channels: int = CHANNELS, **common: Any
) -> Callable[..., dict[str, Any]]:
    """The arguments of a call of a pipeline: `scale` is the name of its guidance scale, `mask` that of the prompts' masks.

    The last two tokens of the prompt are padding.
    """

    def inputs(seed: int = 0, images: int = 1, guidance: float = 3.0, steps: int = 5, **more: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        call: dict[str, Any] = {}
        for prefix, shown in (("", TEXT - 2), ("negative_", TEXT)):
            call[f"{prefix}prompt_embeds"] = torch.randn(images, TEXT, channels, generator=generator).to(dtype)
            if pooled:
                call[f"{prefix}pooled_prompt_embeds"] = torch.randn(images, POOLED, generator=generator).to(dtype)
            if mask:
                call[mask.format(prefix)] = torch.arange(TEXT).lt(shown).expand(images, TEXT)
        call |= {scale: guidance, "num_inference_steps": steps, "generator": generator, "output_type": "latent"}
        return call | common | more

    return inputs


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)
