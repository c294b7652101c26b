"""Other caches and a plan, diffusers' own and others': either is refused where the other is, in every order."""

import copy
import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from diffusers import hooks
from matrix import combines
from subjects import MECHANISMS, subject
from torch import nn
from untouched import parts

import arrowhead as ah
from arrowhead.errors import NotIntercepted, UnsupportedPipeline

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
    for strategy in ("greedy", "headwise", "budget", None):
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


class ContextManager:
    """A stand-in of cache-dit's, by its module."""


ContextManager.__module__ = "cache_dit.caching.cache_contexts.context_manager"


class EverySecondStep(nn.Module):
    """In place of a list of blocks, as cache-dit puts it there: repeats in every second step what the blocks added."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.calls, self.added = blocks, 0, None

    def forward(self, hidden_states, encoder_hidden_states=None, **kwargs):
        self.calls += 1
        before = hidden_states
        if self.calls % 2:
            for block in self.blocks:
                text, hidden_states = block(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
                encoder_hidden_states = encoder_hidden_states if text is None else text
            self.added = hidden_states - before
        return encoder_hidden_states, before + self.added


def enable_cache_dit(transformer, named=True):
    """What cache-dit does to a transformer, by the attributes that it sets; without them where it is not `named`."""
    own, blocks = transformer.forward, nn.ModuleList([EverySecondStep(transformer.transformer_blocks)])

    def new_forward(*args, **kwargs):
        with mock.patch.object(transformer, "transformer_blocks", blocks):
            return own(*args, **kwargs)

    transformer.forward = functools.update_wrapper(functools.partial(new_forward), new_forward)
    if named:
        transformer._context_manager = ContextManager()
        transformer._original_forward, transformer._is_cached = own, True


def disable_cache_dit(transformer):
    del transformer.forward
    for name in ("_context_manager", "_original_forward", "_is_cached"):
        vars(transformer).pop(name, None)


def enable_teacache(transformer):
    """As TeaCache's scripts do it: on the class, for all of its transformers."""
    own = type(transformer).forward

    def teacache_forward(self, *args, **kwargs):
        return own(self, *args, **kwargs)

    wrapped = functools.wraps(own, assigned=())(teacache_forward)
    return mock.patch.multiple(type(transformer), forward=wrapped, create=True, enable_teacache=True)


OTHERS = {
    "a cache of cache-dit": r"cache_dit\.disable_cache\(pipe\)",
    "TeaCache": "put the class's own forward back",
}
EVERY_SEARCH = ("greedy", "headwise", "budget")


@combines("diffusers' caches", "cache-dit, or TeaCache by a patched class, beside a plan", REFUSED)
@pytest.mark.parametrize("cache", OTHERS)
def test_a_cache_of_others_is_known(mechanism, outcome, cache):
    """By what cache-dit sets on a transformer, and TeaCache on its class; before the plan, after it, and in searches."""
    here = subject(mechanism)
    plan, transformer, said = here.plan(), here.transformer, f"with {cache}, .*wanted one of them.*{OTHERS[cache]}"
    wanted = here.compressed(plan, 1)

    @contextmanager
    def enabled():
        if cache == "TeaCache":
            with enable_teacache(transformer):
                yield
            return
        forward = vars(transformer).get("forward")
        transformer._context_manager, transformer._is_cached = ContextManager(), True
        yield
        disable_cache_dit_names(transformer)
        assert vars(transformer).get("forward") is forward

    with here.applied(plan):
        with enabled(), pytest.raises(UnsupportedPipeline, match=said):
            here.generate(1)
        assert torch.equal(here.generate(1), wanted)
    with enabled():
        with pytest.raises(UnsupportedPipeline, match=said):
            ah.apply(here.pipe, plan, here.adapter)
        for strategy in EVERY_SEARCH:
            with pytest.raises(UnsupportedPipeline, match=said):
                here.search(strategy=strategy)


def disable_cache_dit_names(transformer):
    del transformer._context_manager, transformer._is_cached


@pytest.mark.parametrize("named", [True, False])
def test_blocks_that_a_cache_leaves_out(named):
    """cache-dit's way on SD3: named; and by somebody unknown, refused when the first step without the blocks is over."""
    here = subject("sd3")
    plan = here.plan()
    wanted = here.compressed(plan, 1)
    with here.applied(plan):
        enable_cache_dit(here.transformer, named)
        error, said = (UnsupportedPipeline, "cache-dit") if named else (NotIntercepted, "no call of it in 1 of the first 2")
        with pytest.raises(error, match=said):
            here.generate(1)
        disable_cache_dit(here.transformer)
        assert torch.equal(here.generate(1), wanted)


def test_a_teacache_that_is_switched_off():
    """Its forward is there, and computes everything."""
    here = subject("sd3")
    plan = here.plan()
    wanted = here.compressed(plan, 1)
    with enable_teacache(here.transformer):
        type(here.transformer).enable_teacache = False
        assert torch.equal(here.compressed(plan, 1), wanted)
