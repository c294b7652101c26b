"""Other accelerations that need no training: each function applies one to a fresh pipeline, for one generation.

All are set up as their documentation says. Where a default was made for models of another depth or another call, the function
says what is set instead, and why. If one does not support a model, it raises, and peers.py notes the message.
"""

import inspect
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from typing import Any

import budget
import torch
from diffusers import CacheMixin, hooks
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor

import arrowhead as ah

Peer = Callable[[Any, budget.Name], None]
"""Hooks a fresh pipeline, which serves for one generation."""
FEATURES = [r"transformer_blocks\.\d+\.(attn|attn1|ff|ff_context)"]
"""The modules whose outputs TaylorSeer forecasts: attention and feed-forwards; by itself it takes attention alone."""


class KeptText(JointTransformerBlock):
    """The last block of SD3 gives no text, though caches subtract and add it: this one gives what it got; nobody reads it."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As its parent does, but never None."""
        text, image = super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        return encoder_hidden_states if text is None else text, image


def keep_text(pipe: Any) -> None:
    """Make SD3's last block such that diffusers' caches of whole blocks can take it."""
    last = pipe.transformer.transformer_blocks[-1]
    if isinstance(last, JointTransformerBlock):
        last.__class__ = KeptText
        told = TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
        TransformerBlockRegistry.register(KeptText, told)


def name_arguments(pipe: Any) -> None:
    """Call the transformer by keywords, as diffusers' own pipelines do and as some peers want it."""
    names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]

    def named(_module: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        return (), {**dict(zip(names, args, strict=False)), **kwargs}

    pipe.transformer.register_forward_pre_hook(named, with_kwargs=True)


def current_timestep(pipe: Any) -> Callable[[], float]:
    """What `pipe.current_timestep` is in other pipelines. Call it after `name_arguments`."""
    seen = [1000.0]

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        seen[0] = float(kwargs["timestep"].flatten()[0])

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return lambda: seen[0]


def uncond_first(pipe: Any) -> None:
    """Swap the halves of a DiT's batch on the way in and back on the way out: FasterCache wants [uncond, cond]."""

    def swapped(_module: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return args, {key: swap(value) if isinstance(value, Tensor) else value for key, value in kwargs.items()}

    def back(_module: Any, _args: Any, output: Any) -> Any:
        output.sample = swap(output.sample)
        return output

    pipe.transformer.register_forward_pre_hook(swapped, with_kwargs=True)
    pipe.transformer.register_forward_hook(back)


def swap(batch: Tensor) -> Tensor:
    """The second half before the first."""
    return batch.roll(len(batch) // 2, 0)


def first_block(threshold: float) -> Peer:
    """FirstBlockCache; 0.05 is its default, 0.2 the example of its documentation."""

    def apply(pipe: Any, _name: budget.Name) -> None:
        keep_text(pipe)
        hooks.apply_first_block_cache(pipe.transformer, hooks.FirstBlockCacheConfig(threshold))

    return apply


def taylor_seer(interval: int) -> Peer:
    """TaylorSeer of the first order, in the transformer's own dtype; 5 is its default."""
    config = hooks.TaylorSeerCacheConfig(interval, max_order=1, taylor_factors_dtype=torch.float32, cache_identifiers=FEATURES)
    return lambda pipe, _name: hooks.apply_taylorseer_cache(pipe.transformer, config)


def taylor_seer_lite(interval: int) -> Peer:
    """TaylorSeer of the output alone, all blocks skipped; it looks for a module `proj_out`, and a model without is refused."""
    config = hooks.TaylorSeerCacheConfig(interval, taylor_factors_dtype=torch.float32, use_lite_mode=True)

    def apply(pipe: Any, _name: budget.Name) -> None:
        if not hasattr(pipe.transformer, "proj_out"):  # it would go on with zeros for every block's output
            raise LookupError(f"lite mode forecasts `proj_out`, which {type(pipe.transformer).__name__} does not have")
        keep_text(pipe)
        hooks.apply_taylorseer_cache(pipe.transformer, config)

    return apply


def broadcast(skip: int) -> Peer:
    """PyramidAttentionBroadcast, between the timesteps 100 and 800, its default."""

    def apply(pipe: Any, _name: budget.Name) -> None:
        name_arguments(pipe)
        config = hooks.PyramidAttentionBroadcastConfig(skip, current_timestep_callback=current_timestep(pipe))
        hooks.apply_pyramid_attention_broadcast(pipe.transformer, config)

    return apply


def faster_cache(until: int, attention: int = 2) -> Peer:
    """FasterCache below a timestep; its defaults are 681 for attention and 641 for the unconditional branch.

    A higher one lets it begin sooner: at 28 even steps the default leaves the first third alone.
    """

    def apply(pipe: Any, name: budget.Name) -> None:
        name_arguments(pipe)
        if name is budget.Name.DIT:
            uncond_first(pipe)
        config = hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=attention,
            spatial_attention_timestep_skip_range=(-1, until),
            unconditional_batch_timestep_skip_range=(-1, until - 40),
            current_timestep_callback=current_timestep(pipe),
            tensor_format="BCHW",
            _unconditional_conditional_input_kwargs_identifiers=[
                *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "class_labels")
            ],
        )
        hooks.apply_faster_cache(pipe.transformer, config)

    return apply


@cache
def magnitude_ratios(name: budget.Name) -> tuple[float, ...]:
    """MagCache's own calibration, on the calibration's inputs; it prints what it finds."""
    pipe, case, printed = ah.tiny.load(name), budget.CASES[name], StringIO()
    config = hooks.MagCacheConfig(num_inference_steps=case.common["num_inference_steps"], calibrate=True)
    hooks.apply_mag_cache(pipe.transformer, config)
    with redirect_stdout(printed), CacheMixin.cache_context(pipe.transformer, "cond_uncond"):
        pipe(**budget.calibration(case))
    return tuple(json.loads(next(line for line in printed.getvalue().splitlines() if line.startswith("[1"))))


def mag_cache(threshold: float, most: int, retention: float) -> Peer:
    """MagCache; 0.06, 3 and 0.2 are its defaults, its authors' fast setting for Flux is 0.24, 5 and 0.1."""

    def apply(pipe: Any, name: budget.Name) -> None:
        ratios = list(magnitude_ratios(name))
        config = hooks.MagCacheConfig(threshold, most, retention, num_inference_steps=len(ratios), mag_ratios=ratios)
        hooks.apply_mag_cache(pipe.transformer, config)

    return apply


def sea_cache(threshold: float, most: int = 2) -> Peer:
    """SeaCache, made for video: a picture is a video of one frame; 0.25 and 2 are its defaults.

    It asks the pipeline for the step and its noise level, which ours, as most, do not tell it.
    """

    def frames(_module: Any, args: Any, kwargs: Any) -> list[Tensor]:
        latents: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return list(latents.chunk(2)[0].unsqueeze(2))  # both halves of the CFG batch are the same

    def apply(pipe: Any, _name: budget.Name) -> None:
        keep_text(pipe)
        config = hooks.SeaCacheConfig(threshold, max_consecutive_cached=most, raw_vision_callback=frames)
        hooks.apply_sea_cache(pipe.transformer, config)
        tell_steps(pipe)

    return apply


def tell_steps(pipe: Any) -> None:
    """Enter diffusers' cache context anew for each call, with the step and its sigma."""
    forward, calls = pipe.transformer.forward, iter(range(10**9))

    def told(*args: Any, **kwargs: Any) -> Any:
        step, sigmas = next(calls), pipe.scheduler.sigmas
        where = {"step_index": step, "sigma": float(sigmas[step]), "num_inference_steps": len(sigmas) - 1}
        with CacheMixin.cache_context(pipe.transformer, "cond_uncond", **where):
            return forward(*args, **kwargs)

    pipe.transformer.forward = told


def dual_block(threshold: float, warmup: int, *, taylor: bool = False) -> Peer:
    """cache-dit's DBCache; 0.08 and 8 are its defaults, and it may forecast by its TaylorSeer calibrator of the first order.

    One block is computed always rather than eight, its default: ours have six and eight blocks, so nothing would be left.
    """

    def apply(pipe: Any, name: budget.Name) -> None:
        cache_dit = import_module("cache_dit")
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup,
            num_inference_steps=budget.CASES[name].common["num_inference_steps"],
        )
        keep = name is not budget.Name.DIT  # text that SD3's last block does not give cannot be forecast, but need not be
        told = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1, enable_encoder_calibrator=not keep)
        calibrator = told if taylor else None
        cache_dit.enable_cache(adapter(cache_dit, pipe, name), cache_config=config, calibrator_config=calibrator)

    return apply


def adapter(cache_dit: Any, pipe: Any, name: budget.Name) -> Any:
    """What cache-dit registers for pipelines of SD3; the transformer alone for a DiT, which it knows by its name."""
    if name is budget.Name.DIT:
        return pipe.transformer
    blocks, pattern = pipe.transformer.transformer_blocks, cache_dit.ForwardPattern.Pattern_1
    return cache_dit.BlockAdapter(transformer=pipe.transformer, blocks=blocks, forward_pattern=pattern)


def merged_tokens(ratio: float) -> Peer:
    """tomesd, for U-Nets: it takes pixels for tokens, so that patches of 2 × 2 are a level of downsampling to it."""

    def apply(pipe: Any, _name: budget.Name) -> None:
        import_module("tomesd").apply_patch(pipe.transformer, ratio=ratio, max_downsample=2)

    return apply


DUAL = ((0.04, 8), (0.08, 8), (0.16, 8), (0.3, 4))
"""Thresholds and steps of warm-up of DBCache, from light to strong."""
PEERS: dict[str, Peer] = {
    **{f"TaylorSeer {i}": taylor_seer(i) for i in (2, 3, 5)},
    **{f"TaylorSeer, lite {i}": taylor_seer_lite(i) for i in (2, 3, 5)},
    **{f"FirstBlockCache {t}": first_block(t) for t in (0.03, 0.05, 0.1, 0.2, 0.3)},
    **{f"MagCache {t}": mag_cache(t, most, r) for t, most, r in ((0.06, 3, 0.2), (0.12, 4, 0.2), (0.24, 5, 0.1))},
    **{f"SeaCache {t}": sea_cache(t, most) for t, most in ((0.1, 2), (0.25, 2), (0.5, 4))},
    **{f"FasterCache {u}": faster_cache(u, skip) for u, skip in ((681, 2), (801, 2), (901, 3))},
    **{f"PyramidAttentionBroadcast {s}": broadcast(s) for s in (2, 3, 5)},
    **{f"DBCache {t}": dual_block(t, warmup) for t, warmup in DUAL},
    **{f"DBCache + TaylorSeer {t}": dual_block(t, warmup, taylor=True) for t, warmup in DUAL},
    **{f"tomesd {r}": merged_tokens(r) for r in (0.25, 0.5, 0.75)},
}
