"""What a pipeline gets for the first of two calls of a step, and what it computes with that before the second call.

The output is known when the second call has come. Until then the pipeline has a placeholder. Most pipelines keep it; some
compute with it at once, as Cosmos does for its preconditioning, and as a copy does. These operations are recorded and done
again when the placeholder is filled, so that what the pipeline holds follows from the output.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from arrowhead.errors import NotIntercepted

READS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "equal", "allclose"}
"""Functions that give values of a tensor to Python, by which the pipeline may decide what it does."""
OF_SHAPE = r"(zeros|ones|empty|full|rand|randn|randint)_like|new_(zeros|ones|empty|full|tensor)"
"""Functions whose results depend on a tensor's shape alone."""
OVERWRITES = {"copy_", "__setitem__", "fill_", "zero_"}
"""Functions that change a tensor and give the same when they are done again."""


class Placeholder(TorchFunctionMode):
    """A copy of an example output, for the pipeline; and, as a mode of torch, what is computed with it until it is filled.

    Attributes:
        output: what the pipeline gets.
    """

    def __init__(self, example: Any) -> None:
        super().__init__()
        self.output = _copied(example)
        self._tape: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._derived = {id(tensor): tensor for tensor in _tensors(self.output)}  # kept alive, so that ids stay theirs

    def watch(self) -> Any:
        """Record from now on what the pipeline computes with the output; gives the output."""
        self.__enter__()  # type: ignore[no-untyped-call]
        return self.output

    def end(self) -> None:
        """Record no longer."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation of the pipeline's, and record it where it uses the placeholder, or what was computed with it.

        Raises:
            NotIntercepted: it cannot be done again when the output is known.
        """
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        used = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) in self._derived]
        name = getattr(function, "__name__", "")
        if not used or re.fullmatch(OF_SHAPE, name):
            return result
        first = next(_tensors(args), None)
        changes_first = re.fullmatch(r".*[^_]_|__i(add|sub|mul|truediv|floordiv|pow|mod)__", name) is not None
        changed = "out" in kwargs or (changes_first and id(first) not in self._derived and name not in OVERWRITES)
        if name in READS or changed:
            raise NotIntercepted(
                f"the pipeline calls {name} with the output of a step's first call before it makes the second call, and the "
                "search knows that output afterwards; wanted a pipeline that keeps the output until then, or computes new "
                "tensors of it"
            )
        made = [*_tensors(result)] if name != "__setitem__" or first is None else [first]
        if made:
            self._derived |= {id(tensor): tensor for tensor in made}
            self._tape.append((function, args, kwargs, result))
        return result

    def fill(self, output: Any) -> None:
        """Copy an output into the placeholder, and do again what was computed with it."""
        with torch.no_grad():
            _fill(self.output, output)
            for function, args, kwargs, result in self._tape:
                for place, value in zip(_tensors(result), _tensors(function(*args, **kwargs)), strict=True):
                    if place is not value:
                        place.copy_(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple | list):
        return type(output)(map(_copied, output))
    if isinstance(output, Mapping):
        return type(output)(**{name: _copied(value) for name, value in output.items()})
    return output


def _fill(placeholder: Any, output: Any) -> None:
    for place, value in zip(_tensors(placeholder), _tensors(output), strict=True):
        place.copy_(value)
