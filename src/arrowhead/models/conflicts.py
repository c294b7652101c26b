"""Checks that a transformer has its weights, and nothing that no plan goes with: caches, parallelism."""

import sys
from collections.abc import Iterable, Iterator

from torch import nn

from arrowhead.errors import UnsupportedPipeline
from arrowhead.upstream import brings_weights, diffusers_hooks, has_cache_dit, parallel_config

CACHES = {
    "faster_cache": "FasterCache",
    "first_block_cache": "FirstBlockCache",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "sea_cache": "SeaCache",
    "taylorseer_cache": "TaylorSeerCache",
    "text_kv_cache": "TextKVCache",
}
"""By the module of `diffusers.hooks` that has a hook's class, the cache's name. Other hooks (offloading, casting) may stay."""


def require_no_conflicts(transformers: Iterable[nn.Module]) -> None:
    """Check that each transformer computes all of its output, in every step, in this process.

    Raises:
        UnsupportedPipeline: it carries a cache of diffusers, of cache-dit, or TeaCache, or is shared out among processes.
    """
    for transformer in transformers:
        name = type(transformer).__name__
        if found := next(_caches(transformer), None):
            cache, remedy = found
            raise UnsupportedPipeline(
                f"got a {name} with {cache}, which leaves out blocks or attention by itself, so that neither of the two would "
                f"know what the other computed; wanted one of them; {remedy}, or load the transformer anew, or remove the plan"
            )
        if shared := _shared_out(transformer):
            raise UnsupportedPipeline(
                f"got a {name} {shared}; wanted all heads and tokens in one process; generate with whole transformers, "
                "different prompts in each process, or remove the plan"
            )


def require_weights(transformers: Iterable[nn.Module]) -> None:
    """Check that each transformer has weights, or hooks that bring them.

    Raises:
        UnsupportedPipeline: its weights are on the meta device, where tensors have shapes and no values.
    """
    for transformer in transformers:
        path = next((path for path, weight in transformer.named_parameters() if weight.device.type == "meta"), None)
        if path is not None and not brings_weights(transformer):
            raise UnsupportedPipeline(
                f"got a {type(transformer).__name__} on the meta device, such as {path}, which computes nothing there; wanted "
                "weights; load them with from_pretrained, or make them with to_empty and load_state_dict"
            )


def _caches(transformer: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of caches on the transformer or on its modules, each with how to take it off."""
    for module in transformer.modules():
        for hook in diffusers_hooks(module).values():
            if (cache := CACHES.get(type(hook).__module__.rpartition(".")[2])) is not None:
                yield f"diffusers' {cache}", "call disable_cache() on the transformer"
    if has_cache_dit(transformer):
        yield "a cache of cache-dit", "call cache_dit.disable_cache(pipe)"
    on = getattr(transformer, "enable_teacache", None)  # TeaCache sets it on the class, whose forward it replaces
    if on or (on is None and "teacache" in getattr(transformer.forward, "__name__", "").lower()):
        yield "TeaCache", "put the class's own forward back and set its enable_teacache to False"


def _shared_out(transformer: nn.Module) -> str | None:
    """How its work is shared out among processes; None where it is not."""
    config = parallel_config(transformer)
    if (context := getattr(config, "context_parallel_config", None)) is not None:
        if getattr(context, "ring_degree", 1) not in (None, 1):
            return "with ring context parallelism, which gives a process some of the tokens"
        return "with Ulysses context parallelism, which gives a process some of the heads"
    tensors = sys.modules.get("torch.distributed.tensor")  # without that module there are none
    sharded = tensors is not None and any(isinstance(weight, tensors.DTensor) for weight in transformer.parameters())
    if sharded or getattr(config, "tensor_parallel_config", None) is not None:
        return "whose weights are DTensors, shared out by tensor parallelism or FSDP: a process has some of the heads, or rows"
    return None
