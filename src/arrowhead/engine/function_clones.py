"""Clones of a class's functions that find other objects under some of their global names.

The class, its module and everything else that uses them stay as they are: code that torch.compile has read remains valid.
"""

import dis
import functools
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

StandIn = Callable[[str, Any, FunctionType], Any]
"""`stand_in(name, value, function)`: what the function's clone finds under a global name in place of its value, or None."""


def with_stand_ins(base: type, stand_in: StandIn) -> type | None:
    """A subclass of `base` with clones of those functions, its own and inherited, that use a global with a stand-in.

    Functions of the same module that these call, and functions that decorators wrap, are cloned with them. A clone sees its
    module's globals as they are now. Methods call each other, and `super()`, as before, and find the clones.

    Gives None where clones would not do: no function uses such a global, one assigns to a global, or one names a class of the
    hierarchy, whose functions it may call past the clones.
    """
    cloner = _Cloner(stand_in)
    layers = {
        cls: members
        for cls in base.__mro__
        if (members := {name: clone for name, value in vars(cls).items() if (clone := cloner.of_member(value)) is not None})
    }
    named = {value for function in _functions(base) for value in _globals_read(function).values() if isinstance(value, type)}
    if not layers or named & layers.keys() or any(map(_assigns_globals, cloner.originals)):
        return None
    # each class's clones stand right before it in the order of methods, where super() finds them
    cloned = [type(cls.__name__, (cls,), members) for cls, members in layers.items()]
    bases = cloned if base in layers else [base, *cloned]
    return type(base.__name__, tuple(bases), {"__module__": base.__module__, "__qualname__": base.__qualname__})


class _Cloner:
    """Clones functions, each once. `originals` are those of which there is a clone."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self._clones: dict[FunctionType, FunctionType | None] = {}

    @property
    def originals(self) -> list[FunctionType]:
        return [function for function, clone in self._clones.items() if clone is not None]

    def of_member(self, member: Any) -> Any:
        """The clone of a function in a class body; None where there is nothing to clone."""
        if isinstance(member, staticmethod | classmethod):
            clone = self.of_member(member.__func__)
            return clone and type(member)(clone)
        return self.of(member) if isinstance(member, FunctionType) else None

    def of(self, function: FunctionType) -> FunctionType | None:
        """The clone of a function; None where it uses no stand-in, and calls no function that does."""
        if function not in self._clones:
            self._clones[function] = None  # while a function that calls itself is cloned
            self._clones[function] = self._cloned(function)
        return self._clones[function]

    def _cloned(self, function: FunctionType) -> FunctionType | None:
        replaced = {
            name: found
            for name, value in _globals_read(function).items()
            if (found := self._replacement(function, name, value)) is not None
        }
        cells = tuple(map(self._cell, function.__closure__ or ()))
        if not replaced and cells == (function.__closure__ or ()):
            return None
        clone = FunctionType(
            function.__code__, function.__globals__ | replaced, function.__name__, function.__defaults__, cells
        )
        clone.__kwdefaults__ = function.__kwdefaults__
        return functools.update_wrapper(clone, function)  # type: ignore[return-value]

    def _replacement(self, function: FunctionType, name: str, value: Any) -> Any:
        found = self._stand_in(name, value, function)
        if found is None and isinstance(value, FunctionType) and value.__globals__ is function.__globals__:
            return self.of(value)
        return found

    def _cell(self, cell: CellType) -> CellType:
        try:
            clone = self.of_member(cell.cell_contents)
        except ValueError:  # the cell is empty
            return cell
        return cell if clone is None else CellType(clone)


@functools.lru_cache(maxsize=4096)  # a plan that is applied again reads the same code
def _global_names(code: CodeType, *operations: str) -> frozenset[str]:
    """Names of globals on which code, or that of a function within it, does one of these operations."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in operations}
    return frozenset(own.union(*(_global_names(inner, *operations) for inner in code.co_consts if isinstance(inner, CodeType))))


def uses_attribute(code: CodeType, name: str) -> bool:
    """Whether code, or that of a function within it, uses an attribute or a global of this name."""
    return name in code.co_names or any(uses_attribute(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))


def _globals_read(function: FunctionType) -> dict[str, Any]:
    """The globals of its module that a function reads, by name."""
    names = _global_names(function.__code__, "LOAD_GLOBAL")
    return {name: function.__globals__[name] for name in names & function.__globals__.keys()}


def _assigns_globals(function: FunctionType) -> bool:
    return bool(_global_names(function.__code__, "STORE_GLOBAL", "DELETE_GLOBAL"))


def _functions(base: type) -> Iterator[FunctionType]:
    """Functions in the bodies of a class and of those that it inherits from."""
    for cls in base.__mro__:
        yield from (value for value in vars(cls).values() if isinstance(value, FunctionType))
