"""Replaces a module's forward on the instance, as hooks of accelerate and diffusers do, and restores it beneath such hooks."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from arrowhead.engine.changes import Changes
from arrowhead.upstream import forward_holders

Forward = Callable[..., Any]
OURS = ("arrowhead_around", "arrowhead_handle", "arrowhead_run")
"""Attributes of our forwards. A hook copies them to its own forward, by functools.update_wrapper."""


class RunForward(functools.partial[Any]):
    """A forward that refers to a run. Copying it copies the run, which refuses; a copy of a function would be the function."""

    arrowhead_run: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What the run gives, or raises."""
        return self.arrowhead_run.__reduce_ex__(protocol)


def replace_forward(module: nn.Module, forward: Forward, changes: Changes) -> None:
    """Set another forward on the instance, until the changes are undone."""
    changes.record(restore_forward, module, forward, vars(module).get("forward"))
    module.forward = forward


def is_reached(module: nn.Module, forward: Forward) -> bool:
    """Whether a call of the module reaches this forward: it is the module's, or hooks around it call it."""
    return any(each is forward for each in _chain(module))


def restore_forward(module: nn.Module, forward: Forward, before: Forward | None) -> bool:
    """Put the forward from before back, also beneath hooks added since. Returns False where `forward` is not found."""
    if vars(module).get("forward") is forward:
        if before is None:
            del module.forward
        else:
            module.forward = before
        return True
    beneath = before or type(module).forward.__get__(module)
    found = [(holder, name) for holder, name in forward_holders(module) if vars(holder).get(name) is forward]
    for each in _chain(module) if found else ():
        for name in OURS:
            if not hasattr(beneath, name):
                vars(each).pop(name, None)
        if getattr(each, "__wrapped__", None) is forward:
            each.__wrapped__ = beneath  # type: ignore[attr-defined]
            break
    for holder, name in found:  # last: by these the forward is found again after an interruption
        setattr(holder, name, beneath)
    return bool(found)


def _chain(module: nn.Module) -> Iterator[Forward]:
    """The forward set on the instance, and each one that it wraps (`__wrapped__`), from the outermost."""
    each = vars(module).get("forward")
    while each is not None:
        yield each
        each = vars(each).get("__wrapped__") if hasattr(each, "__dict__") else None
