"""A module's forward, replaced on the instance as accelerate's and diffusers' hooks do it: put there, looked for, taken off."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]
OURS = ("arrowhead_around", "arrowhead_handle", "arrowhead_run")
"""What our forwards carry; a hook's forward that is made to look like what it wraps has these as well."""


class RunForward(functools.partial[Any]):
    """A forward that carries a run, and is copied as that is, if at all: of a function a copy is the function itself."""

    arrowhead_run: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the run has it."""
        return self.arrowhead_run.__reduce_ex__(protocol)


def replace_forward(module: nn.Module, forward: Forward) -> Forward | None:
    """Set another forward on the instance; gives what was there before, for `take_off`: None where it was the class's."""
    before = vars(module).get("forward")
    module.forward = forward
    return before


def is_reached(module: nn.Module, forward: Forward) -> bool:
    """Whether a call of the module comes to this forward: it is there, or hooks that were added since go on to it."""
    return any(each is forward for each in _chain(module))


def restore_forward(module: nn.Module, forward: Forward, before: Forward | None) -> bool:
    """Take a forward off, from beneath hooks that were added since, too; False, and no change, where it is not found."""
    if vars(module).get("forward") is forward:
        if before is None:
            del module.forward
        else:
            module.forward = before
        return True
    beneath = before or type(module).forward.__get__(module)
    holders = [(module, "_old_forward")]  # accelerate's
    for reference in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()):
        holders += [(reference, "forward"), (reference, "original_forward")]
    found = [(holder, name) for holder, name in holders if vars(holder).get(name) is forward]
    for holder, name in found:
        setattr(holder, name, beneath)
    for each in _chain(module) if found else ():
        for name in OURS:
            if not hasattr(beneath, name):
                vars(each).pop(name, None)
        if getattr(each, "__wrapped__", None) is forward:
            each.__wrapped__ = beneath  # type: ignore[attr-defined]
            break
    return bool(found)


@contextmanager
def forward_replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Another forward on the instance, for the length of a `with` block."""
    before = replace_forward(module, forward)
    try:
        yield
    finally:
        restore_forward(module, forward, before)


def _chain(module: nn.Module) -> Iterator[Forward]:
    """The module's forward, and what that wraps, down to the class's."""
    each = vars(module).get("forward")
    while each is not None:
        yield each
        each = vars(each).get("__wrapped__") if hasattr(each, "__dict__") else None
