"""diffusers' own caches and a plan: either is refused where the other is, in every order."""

import copy

import pytest
import torch
from diffusers import hooks
from matrix import combines
from subjects import MECHANISMS, subject
from untouched import parts

import arrowhead as ah
from arrowhead.errors import UnsupportedPipeline

EVER = (-1, 1001)
GUIDANCE = {"unconditional_batch_skip_range": 5, "unconditional_batch_timestep_skip_range": EVER}
CACHES = {  # name as errors have it: how to apply one, and what it takes
    "FirstBlockCache": (hooks.apply_first_block_cache, lambda: hooks.FirstBlockCacheConfig(threshold=0.2)),
    "MagCache": (hooks.apply_mag_cache, lambda: hooks.MagCacheConfig(calibrate=True, num_inference_steps=5)),
    "PyramidAttentionBroadcast": (
        hooks.apply_pyramid_attention_broadcast,
        lambda: hooks.PyramidAttentionBroadcastConfig(2, EVER, current_timestep_callback=lambda: 500),
    ),
    "FasterCache": (
        hooks.apply_faster_cache,
        lambda: hooks.FasterCacheConfig(2, EVER, current_timestep_callback=lambda: 500, **GUIDANCE),
    ),
    "TaylorSeerCache": (
        hooks.apply_taylorseer_cache,
        lambda: hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    ),
    "SeaCache": (None, hooks.SeaCacheConfig),
    "TextKVCache": (None, hooks.TextKVCacheConfig),
}
REFUSED = "refused: neither knows what the other computed"
ON = {  # those that can be put on each
    "sd3": ["FirstBlockCache", "MagCache", "PyramidAttentionBroadcast", "FasterCache", "TaylorSeerCache"],
    "flux": [*CACHES],
    "own": ["FasterCache", "TaylorSeerCache"],
}
CASES = [(name, cache) for name in MECHANISMS for cache in ON[name]]


def enable(transformer, cache):
    apply, config = CACHES[cache]
    if hasattr(transformer, "enable_cache"):
        transformer.enable_cache(config())
    else:
        apply(transformer, config())


@pytest.mark.parametrize(("name", "cache"), CASES)
def test_a_cache_is_known_by_its_hooks(name, cache):
    """Before the plan, and after it; the pipeline generates again once the cache is off, where that can be done."""
    here = subject(name)
    plan = here.plan()
    wanted = here.compressed(plan, 1)
    with here.applied(plan):
        enable(here.transformer, cache)
        with pytest.raises(UnsupportedPipeline, match=f"diffusers' {cache}.*wanted one of them.*disable_cache"):
            here.generate(1)
        if hasattr(here.transformer, "disable_cache"):
            here.transformer.disable_cache()
            assert torch.equal(here.generate(1), wanted)
            enable(here.transformer, cache)
    before = parts(here.pipe) if here.adapter is None else None
    with pytest.raises(UnsupportedPipeline, match=f"diffusers' {cache}"):
        ah.apply(here.pipe, plan, here.adapter)
    assert before is None or parts(here.pipe) == before


@combines("diffusers' caches", "FirstBlockCache, MagCache, PAB, FasterCache, TaylorSeer, SeaCache beside a plan", REFUSED)
def test_searches_refuse_it_as_well(mechanism, outcome):
    """By all strategies, before anything runs: whatever the cache does, it would be taken for full attention."""
    here = subject(mechanism)
    inputs = here.inputs(0) if here.adapter is None else lambda: here.generate(0)
    enable(here.transformer, "TaylorSeerCache")
    before = copy.copy(vars(here.pipe))
    for strategy in ("greedy", "headwise", "budget"):
        with pytest.raises(UnsupportedPipeline, match="diffusers' TaylorSeerCache"):
            here.search(strategy=strategy)
    for look in (ah.calibrate, ah.calibration_bytes):
        with pytest.raises(UnsupportedPipeline, match="diffusers' TaylorSeerCache"):
            look(here.pipe, inputs, adapter=here.adapter)
    if here.adapter is None:
        with pytest.raises(UnsupportedPipeline, match="diffusers' TaylorSeerCache"):
            ah.analyze(here.pipe, inputs, progress=False)
    assert vars(here.pipe) == before


@combines("diffusers' caches", "one that was on and is off again")
def test_hooks_of_another_kind_are_left_alone(mechanism, outcome):
    """An empty registry, as a cache leaves behind, and a hook of nobody known, are no cache."""
    here = subject(mechanism)
    plan = here.plan()
    wanted = here.compressed(plan, 1)
    registry = hooks.HookRegistry.check_if_exists_or_initialize(here.transformer)
    registry.register_hook(hooks.ModelHook(), "somebody's")
    assert torch.equal(here.compressed(plan, 1), wanted)
    registry.remove_hook("somebody's")
    assert torch.equal(here.compressed(plan, 1), wanted)
