"""The parameters of a method that somebody may have wrapped, as loggers and profilers do: `T.forward = lambda *a, **k: ...`."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from arrowhead.errors import UnsupportedPipeline


def method_signature(cls: type, name: str) -> inspect.Signature:
    """The signature of a class's method, with `self`. Within a wrapper that takes any arguments, the method itself is found.

    Raises:
        UnsupportedPipeline: the method is wrapped, and is not found within the wrapper.
    """
    if (found := signature_within(getattr(cls, name), cls, name)) is not None:
        return found
    signature = inspect.signature(getattr(cls, name))
    raise UnsupportedPipeline(
        f"got a {cls.__name__} whose {name} was replaced by one that takes {signature}, so that a call's arguments have no "
        f"names; wanted its own parameters; decorate what replaces it with functools.wraps({cls.__name__}.{name}), or put it "
        "back"
    )


def signature_within(function: Callable[..., Any], cls: type, name: str) -> inspect.Signature | None:
    """The signature of a function that is called as a class's method, or of that method where the function wraps it.

    None where the function takes any arguments, and neither is the method nor refers to it.
    """
    signature = inspect.signature(function)
    own = {f"{each.__qualname__}.{name}" for each in cls.__mro__}
    if not _takes_anything(signature) or getattr(function, "__qualname__", "") in own:
        return signature
    return next((inspect.signature(inner) for inner in _functions_within(function) if inner.__qualname__ in own), None)


def _takes_anything(signature: inspect.Signature) -> bool:
    """Whether a signature has `*args` or `**kwargs`, and no position but `self`."""
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items() if name != "self"}
    rest = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return bool(rest & {*kinds.values()}) and not {*kinds.values()} - rest - {inspect.Parameter.KEYWORD_ONLY}


def _functions_within(function: Any) -> Iterator[FunctionType]:
    """The functions that a function wraps, as far as it refers to them: by closures, globals, defaults and partials."""
    waiting, seen = [function], set[int]()
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, partial | MethodType):
            waiting.append(each.func if isinstance(each, partial) else each.__func__)
        if not isinstance(each, FunctionType) or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        cells = [cell.cell_contents for cell in each.__closure__ or () if cell != CellType()]
        named = [each.__globals__[global_] for global_ in each.__code__.co_names if global_ in each.__globals__]
        defaults = *(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values()
        waiting += [getattr(each, "__wrapped__", None), *cells, *named, *defaults]
