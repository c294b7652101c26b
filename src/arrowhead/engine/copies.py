"""The class that a pipeline has while it carries a plan, and shallow copies of such a pipeline.

Copies share the pipeline's modules, and so its plan. Each may have a scheduler of its own.
"""

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet


class Owner(Protocol):
    """A plan's run, or a speedup."""

    def copy(self, pipe: Any) -> Any:
        """A shallow copy of the pipeline, or of a copy."""


def carrying_class(base: type, call: Callable[..., Any], owner: Owner) -> type:
    """A subclass with another `__call__`; Python looks it up on the class alone. `owner` copies, or refuses to pickle."""
    call.__wrapped__ = base.__call__  # type: ignore[attr-defined]  # inspect.signature follows it
    members = {"__call__": call, "__copy__": owner.copy, "__module__": base.__module__, "__doc__": base.__doc__}
    members["__reduce_ex__"] = lambda _, protocol: owner.__reduce_ex__(protocol)
    return type(base.__name__, (base,), members)


class Copies:
    """The shallow copies of one pipeline. They lose its class and its mark when the pipeline does."""

    def __init__(self, mark: str) -> None:
        """`mark` is the attribute by which a plan, or a speedup, is found on the pipeline and on each copy."""
        self._mark = mark
        self._alive: WeakSet[Any] = WeakSet()

    def copy(self, pipe: Any, base: Any) -> Any:
        """A shallow copy as `copy.copy` makes it of an object of class `base`; kept track of while it is alive."""
        if hasattr(base, "__copy__"):
            other = base.__copy__(pipe)
        else:
            other = object.__new__(type(pipe))
            vars(other).update(vars(pipe))
        self._alive.add(other)
        return other

    def release(self, pipe: Any, applied: type, before: type) -> None:
        """Give the pipeline and each copy the class from before, and take the mark off the copies."""
        for each in [pipe, *self._alive]:
            if isinstance(each, applied):
                each.__class__ = before
            if each is not pipe:
                vars(each).pop(self._mark, None)
