"""One small model for each way in which attention is reached, in one form: what every combination is tried on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from family_replay import random_cells
from own import Own, STDiT2
from pipelines import CAPTION, randomise, sd3, vae
from torch import Tensor, nn

import arrowhead as ah
from arrowhead.models.custom import CustomModel as StandIn
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.layout import ATTENTION_KINDS, Tokens, relevant_tokens
from arrowhead.plans.plan import Plan

STEPS = 5
MECHANISMS = {"sd3": "processor with SDPA", "flux": "dispatch_attention_fn", "own": "custom model"}
"""Subjects by name, and the mechanism that each stands for."""


@dataclass
class Subject:
    """A model that generates: `pipe` is a pipeline, or a custom model with `adapter`."""

    pipe: Any
    transformer: nn.Module
    tokens: Tokens
    generate: Callable[..., Tensor]  # of a seed, and of more arguments of the pipeline's call: what comes out, a copy
    adapter: ah.Adapter | None = None

    def plan(self, seed: int = 0, kinds: frozenset[str] | set[str] = ATTENTION_KINDS) -> Plan:
        """At random: a full step, then anything that sites of these kinds may do."""
        model = find(self.pipe if self.adapter is None else StandIn(self.pipe, self.adapter), kinds)
        cells = random_cells(seed, model.sites, STEPS, share=True)
        return Plan(tuple(map(tuple, cells)), target_of(model), relevant_tokens(self.tokens, model.sites), guided=True)

    def applied(self, plan: Plan, **settings: Any) -> AbstractContextManager[ah.Run]:
        return ah.applied(self.pipe, plan, self.adapter, **settings)

    def compressed(self, plan: Plan, seed: int = 0, **inputs: Any) -> Tensor:
        """Generated with a plan, which is off again afterwards."""
        with self.applied(plan):
            return self.generate(seed, **inputs)

    def search(self, **settings: Any) -> Plan:
        """By any strategy."""
        inputs = self.inputs(0) if self.adapter is None else lambda: self.generate(0)
        return ah.search(self.pipe, inputs, adapter=self.adapter, progress=False, **settings)

    inputs: Callable[..., dict[str, Any]] = dict  # of a pipeline's call: fresh keyword arguments, of a seed and of more


def subject(name: str, dtype: torch.dtype = torch.float64) -> Subject:
    """A fresh one. Every one is guided; FLUX is by the distilled scale and by two calls, see `flux`."""
    return {"sd3": joint, "flux": flux, "own": own}[name](dtype)


def joint(dtype: torch.dtype) -> Subject:
    bench = sd3(dtype)

    def inputs(seed: int = 0, **more: Any) -> dict[str, Any]:
        return bench.inputs(seed, steps=more.pop("steps", STEPS), **more)

    def generate(seed: int = 0, **more: Any) -> Tensor:
        return bench.pipe(**inputs(seed, **more))[0].clone()

    return Subject(bench.pipe, bench.pipe.transformer, Tokens(bench.visual, bench.text), generate, inputs=inputs)


class TwoCalls(Subject):
    """Whose branches come one after the other."""

    def plan(self, seed: int = 0, kinds: frozenset[str] | set[str] = ATTENTION_KINDS) -> Plan:
        found = super().plan(seed, kinds)
        return Plan(found.cells, found.target, found.tokens, guided=True, calls=2)


def flux(dtype: torch.dtype) -> Subject:
    """Text first, two kinds of blocks, true CFG in two calls."""
    text, channels = CAPTION
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        axes_dims_rope=(2, 2, 4),
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=3,
        attention_head_dim=8,
        joint_attention_dim=channels,
        pooled_projection_dim=10,
        guidance_embeds=True,
    )
    randomise(model, 0, sharp=(".attn.",))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae(1), None, None, None, None, model)
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)

    def inputs(seed: int = 0, images: int = 1, steps: int = STEPS, **more: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        call: dict[str, Any] = {}
        for prefix in ("", "negative_"):
            call[f"{prefix}prompt_embeds"] = torch.randn(images, text, channels, generator=generator).to(dtype)
            call[f"{prefix}pooled_prompt_embeds"] = torch.randn(images, 10, generator=generator).to(dtype)
        size = {"height": 16, "width": 16, "num_inference_steps": steps, "true_cfg_scale": 3.0, "output_type": "latent"}
        return call | size | {"generator": generator} | more

    def generate(seed: int = 0, **more: Any) -> Tensor:
        return pipe(**inputs(seed, **more))[0].clone()

    return TwoCalls(pipe, model, Tokens(16, text, True), generate, inputs=inputs)


def own(dtype: torch.dtype) -> Subject:
    """OpenSora's transformer by its names and calls, in a custom loop."""
    loop = Own(STDiT2().to(dtype), ah.open_sora(guidance_scale=3.0))

    def generate(seed: int = 0, by_call: bool = True) -> Tensor:
        return loop.sample(seed, by_call=by_call)

    return Subject(loop.model, loop.model, loop.tokens, generate, loop.adapter)
