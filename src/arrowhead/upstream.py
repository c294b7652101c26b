"""The private names of torch, diffusers and accelerate that arrowhead touches."""

from collections.abc import Iterator
from typing import Any

from torch import nn

COMPILED = "_compiled_call_impl"
"""What torch calls in place of a module's own call, where it is set: `Module.compile` sets it."""


def uncompiled(module: Any) -> Any:
    """The module that torch.compile(module) hides."""
    return module._orig_mod if "_orig_mod" in getattr(module, "_modules", ()) else module


def named_modules(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules by their paths, which are what they are where torch.compile hides one."""
    for path, module in root.named_modules():
        if uncompiled(module) is module:
            yield ".".join(part for part in path.split(".") if part != "_orig_mod"), module
