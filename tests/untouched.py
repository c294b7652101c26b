"""What has to be as before once a plan is off, or was refused: the pipeline's parts by identity, and what it generates."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.models.attention_processor
import torch
from pipelines import Bench
from replay import assert_identical, trace
from torch import Tensor


def parts(pipe: Any) -> dict[str, Any]:
    """Everything that arrowhead might leave something on; processors and the like compare by identity."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    both = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    modules = {f"{name}.{path}": m for name, t in both.items() if t is not None for path, m in t.named_modules()}
    return {
        "class": type(pipe),
        "attributes": sorted(vars(pipe)),
        "progress bar": dict(getattr(pipe, "_progress_bar_config", {"unset": True})),
        "processors": {name: module.processor for name, module in modules.items() if hasattr(module, "processor")},
        "hooks": {(name, hook): dict(getattr(module, hook)) for name, module in modules.items() for hook in hooks},
        "forwards": [name for name, module in modules.items() if "forward" in vars(module)],
        "module attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "F": diffusers.models.attention_processor.F,
    }


@contextmanager
def left_as_it_was(bench: Bench, **inputs: Any) -> Iterator[None]:
    """After the block the pipeline has the same parts, and generates the same to the last bit."""
    wanted = trace(bench, bench.inputs(**inputs))  # first: some pipelines set attributes of their own when called
    before = parts(bench.pipe)
    yield
    assert parts(bench.pipe) == before
    assert diffusers.models.attention_processor.F is torch.nn.functional
    assert_identical(trace(bench, bench.inputs(**inputs)), wanted)


def tensors_like(*shapes: tuple[int, ...]) -> dict[int, Tensor]:
    """The tensors alive now with one of these shapes after the batch dimension, by their storage."""
    alive = (thing for thing in gc.get_objects() if type(thing) is Tensor)
    return {t.untyped_storage().data_ptr(): t for t in alive if tuple(t.shape[1:]) in shapes}
