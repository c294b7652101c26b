"""Every private name of torch, accelerate, diffusers and cache-dit that arrowhead uses: what for, and what breaks without it.

No other file uses such a name (`tests/test_import_law.py`), so that a new version of these packages is checked here.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

COMPILED = "_compiled_call_impl"
"""The attribute of a module that torch calls in place of the module's own call. `Module.compile` sets it.

The step clock and the wrappers of compiled sites stand there, outside of the graph. Without it a graph would be made of them.
"""

HIDDEN = "_orig_mod"
"""The attribute under which `torch.compile(module)` keeps the module. Without it a compiled model would have no known sites."""


def child_modules(module: nn.Module) -> Mapping[str, Any]:
    """A module's children by name. Without it each of them would be looked up by torch's slow `__getattr__`, in every pass."""
    return module._modules


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile(module)` hides, or the module itself."""
    return getattr(module, HIDDEN) if HIDDEN in getattr(module, "_modules", ()) else module


def named_modules(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """All modules by their paths. A module that torch.compile hides has the path that it has without."""
    for path, module in root.named_modules():
        if uncompiled(module) is module:
            yield ".".join(part for part in path.split(".") if part != HIDDEN), module


def uncompiled_call(module: nn.Module) -> Any:
    """The call of a module, its hooks included, past what `Module.compile` made. Without it hooks would be left out."""
    return module._call_impl


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks surround a module's forward. Without it single heads would be projected past such hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def can_checkpoint(module: Any) -> bool:
    """Whether a transformer can run its blocks again on the way back. diffusers' flag says so: every model has the method.

    Without it models that diffusers cannot checkpoint would fail with its ValueError.
    """
    return hasattr(module, "enable_gradient_checkpointing") and bool(getattr(module, "_supports_gradient_checkpointing", True))


def no_dispatch_modes() -> AbstractContextManager[Any]:
    """Within the block no mode, such as a counter of FLOPs, sees the operators that run.

    Without it FlexAttention is not compiled under a counter, and comparing two forwards would be counted.
    """
    return _disable_current_modes()


def dispatch_mode_is_active() -> bool:
    """Whether a mode, such as a counter of FLOPs, sees operators that run. Without it FlexAttention would not be counted."""
    return _get_current_dispatch_mode() is not None


def graph_break(message: str) -> None:
    """End the graph that torch.compile is making, or, with `fullgraph`, raise an error with the message.

    Without it the calls of a model in a compiled loop would not be counted.
    """
    torch._dynamo.graph_break(msg=message)


def compiler_is_loaded() -> bool:
    """Whether anything has imported torch's compiler, which takes seconds. Without it every search would import it."""
    return "torch._dynamo" in sys.modules


def recompile_limit(limit: int) -> AbstractContextManager[Any]:
    """Within the block one function has up to `limit` graphs. Without it FlexAttention runs uncompiled from the ninth on."""
    return torch._dynamo.config.patch(recompile_limit=limit)


def is_compiler_error(error: Exception) -> bool:
    """Whether torch's compiler raised the error. Without it such an error would not name a kernel that works."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values. Without it FLOPs of the fused kernel cannot be counted on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensor  # noqa: PLC0415 - it takes long to import

    return isinstance(tensor, FakeTensor)


TORCH_ATTENTION: Any = torch._C._nn.scaled_dot_product_attention
"""Torch's own `scaled_dot_product_attention`, also where a user has put another function into `torch.nn.functional`.

Kernels call it. Without it they would call the user's function, and many of those, such as SageAttention's, ignore masks.
"""

CPU_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Attention on the CPU: (output, log Σ exp(score)). No public function gives the sums, by which windows and text are merged.

It is also the operator that torch's counter of FLOPs does not know.
"""


def forward_holders(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """The objects and attributes in which accelerate's and diffusers' hooks keep the forward that they call.

    Without it hooks that were added after a plan would go on calling the plan's forward when the plan is off.
    """
    yield module, "_old_forward"  # accelerate's
    for reference in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def diffusers_hooks(module: nn.Module) -> Mapping[str, Any]:
    """The hooks of diffusers on a module, by name. Without it its caches, which leave out sites, would not be noticed."""
    return getattr(vars(module).get("_diffusers_hook"), "hooks", {})


def has_cache_dit(transformer: nn.Module) -> bool:
    """Whether cache-dit has put a cache on a transformer. Without it such a cache, which leaves out blocks, is not named."""
    own = vars(transformer)
    return bool(own.get("_is_cached")) or type(own.get("_context_manager")).__module__.startswith("cache_dit")


def brings_weights(module: nn.Module) -> bool:
    """Whether accelerate's hooks are on a module or within it. Without it offloaded weights would be taken for missing ones."""
    return any("_hf_hook" in vars(inner) for inner in module.modules())


def parallel_config(transformer: nn.Module) -> Any:
    """How diffusers shares the transformer's work among processes, or None. Without it a part would be taken for the whole."""
    return getattr(transformer, "_parallel_config", None)


def execution_device(pipe: Any) -> torch.device:
    """The device on which a pipeline computes, also where its weights are offloaded. Without it the wrong RNG is preserved."""
    return pipe._execution_device


def progress_bars(pipe: Any) -> list[Any]:
    """What shows progress bars: the pipeline, or a modular pipeline's blocks. Without it a search would show their bars."""
    found = [blocks] if (blocks := getattr(pipe, "_blocks", None)) is not None else []
    for block in found:  # which grows
        found.extend(block.sub_blocks.values())
    return [block for block in found or [pipe] if hasattr(block, "set_progress_bar_config")]


def guider_predictions(guider: Any) -> int:
    """How often a guider calls the transformer in a step. Without it one with three calls would be taken for plain guidance."""
    return len(guider._input_predictions)


def progress_bar_config(pipe: Any) -> dict[str, Any] | None:
    """The latest arguments of `set_progress_bar_config`, or None. Without it a search would leave the bar switched off."""
    return getattr(pipe, "_progress_bar_config", None)


def restore_progress_bar_config(pipe: Any, config: dict[str, Any] | None) -> None:
    """Undo `set_progress_bar_config`: the attribute is as `progress_bar_config` gave it."""
    if config is None:
        vars(pipe).pop("_progress_bar_config", None)
    else:
        pipe._progress_bar_config = config


def name_or_path(pipe: Any) -> str:
    """Where a pipeline was loaded from; empty if it was not. Without it provenance would lack the model's name."""
    return str(pipe.config.get("_name_or_path") or "")


class GuiderSettings(NamedTuple):
    """Whether a guider of diffusers is on, and the parts of the steps, between 0 and 1, at which it starts and stops."""

    enabled: bool
    start: float
    stop: float


def guider_settings(guider: Any) -> GuiderSettings:
    """When a guider of diffusers guides. Without it a pipeline with a guider would not be known to have two CFG branches."""
    return GuiderSettings(guider._enabled, guider._start, guider._stop)
