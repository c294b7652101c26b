"""Keeps sites out of the graphs of torch.compile: in a graph, a site is one operator that runs the site eagerly.

The compiler does not look into the operator, so no cell, step or plan is in a graph. Whatever lies around sites is compiled,
and blocks of one form share a graph, as they do without a plan. Calls of the transformer, and of sites that are compiled on
their own, are wrapped outside of their graphs.
"""

import ast
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from arrowhead.engine.changes import Changes
from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.plans.layout import Site
from arrowhead.upstream import COMPILED, compiler_is_loaded, graph_break, uncompiled_call


@dataclass(frozen=True)
class OutputSpec:
    """The outputs of a site, which the compiler has to know before the site runs. Sites of one form have the same.

    `image` and `text` are channels. `text` is 0 where the site gives the image alone, and None where it gives None for the
    text. `text_position` is the position of the text among the arguments; None if the text is passed by name alone. `third`:
    besides these two an IP-Adapter gives one like the image's.
    """

    image: int
    text: int | None
    text_first: bool
    text_position: int | None
    third: bool = False


@dataclass(frozen=True)
class SiteHandle:
    """What a graph holds of a site: its number in the registry, and its outputs.

    The number is a tensor, as a constant would make another graph for each site.
    """

    number: Tensor
    outputs: OutputSpec

    @classmethod
    def of(cls, site: Site, parameters: Sequence[str], *, third: bool = False) -> "SiteHandle":
        """A new handle. `parameters` are the names of the arguments with which a graph calls the site."""
        return cls(torch.tensor(next(_numbers), device="cpu"), replace(_output_spec(site, parameters), third=third))


@dataclass(frozen=True)
class RegistryEntry:
    """Makes a site callable by the number in its handle, until `close`, or until nothing refers to the entry.

    `call` is the wrapper of the site's module.
    """

    handle: SiteHandle
    site: Site
    call: Callable[..., Any]

    def __post_init__(self) -> None:
        _registry[int(self.handle.number)] = self

    def close(self) -> None:
        """Take the entry out of the registry: a graph that calls the site from now on is refused."""
        _registry.pop(int(self.handle.number), None)


_registry: WeakValueDictionary[int, RegistryEntry] = WeakValueDictionary()
_numbers = itertools.count()


def _output_spec(site: Site, parameters: Sequence[str]) -> OutputSpec:
    text = "encoder_hidden_states"
    position = parameters.index(text) if text in parameters else None
    if site.kind == "block":
        joint = any(own.joint for own in site.within)
        return OutputSpec(site.channels, (site.channels if site.joint else None) if joint else 0, True, position)
    if site.kind != "self_attention":
        return OutputSpec(site.channels, 0, False, position)
    width = site.heads * site.head_dim
    of_text = (site.text_channels or site.channels) if site.projects_out in ("all", "outside") else width
    return OutputSpec(width if site.projects_out == "none" else site.channels, of_text if site.joint else 0, False, position)


def compiling() -> bool:
    """Whether torch's compiler is reading this code, rather than Python running it."""
    return torch.compiler.is_compiling()


def call_operator(handle: SiteHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outputs of a site that is called within a graph. The compiler reads this function, which calls the operator.

    Raises:
        NotIntercepted: arguments that are neither tensors nor plain values.
    """
    tensors: list[Tensor] = []
    sizes: list[int] = []
    scalars: list[float] = []
    spec, form = handle.outputs, _encode_argument((args, kwargs), tensors, sizes, scalars)
    image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else next(iter(kwargs.values()))
    text = kwargs.get("encoder_hidden_states")
    if text is None and spec.text_position is not None and spec.text_position < len(args):
        text = args[spec.text_position]
    parts = [(image, spec.image)]
    if text is image:  # Lumina 2 passes one tensor for both
        text = None
    if text is not None and spec.text:
        parts.insert(0 if spec.text_first else 1, (text, spec.text))
    pair = text is not None and spec.text != 0
    if pair and spec.third:
        parts.append((image, spec.image))
    device = image.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    likes, channels = [like for like, _ in parts], [width for _, width in parts]
    outs = torch.ops.arrowhead.site(handle.number, tensors, sizes, scalars, form, likes, channels, pair, cast)
    if not pair:
        return outs[0]
    if spec.text is None:
        return (None, outs[0]) if spec.text_first else (outs[0], None)
    return tuple(outs)


def _encode_argument(value: Any, tensors: list[Tensor], sizes: list[int], scalars: list[float]) -> str:
    """The form of an argument, as the text of a Python literal.

    Values that may change from call to call are appended to the three lists, and the form holds their indices.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"('tensor', {len(tensors) - 1})"
    if value is None or isinstance(value, bool | str):
        return f"('plain', {value!r})"
    if isinstance(value, int):
        sizes.append(value)
        return f"('size', {len(sizes) - 1})"
    if isinstance(value, float):
        scalars.append(value)
        return f"('scalar', {len(scalars) - 1})"
    if isinstance(value, tuple | list):
        items = [_encode_argument(item, tensors, sizes, scalars) + ", " for item in value]
        return f"('{'tuple' if isinstance(value, tuple) else 'list'}', [{''.join(items)}])"
    if isinstance(value, dict):
        items = [f"({name!r}, {_encode_argument(item, tensors, sizes, scalars)}), " for name, item in value.items()]
        return f"('dict', [{''.join(items)}])"
    raise NotIntercepted(
        f"got a {type(value).__name__} among the arguments of a module under torch.compile; wanted tensors, plain values, and "
        "tuples, lists and dicts of these; run the model uncompiled"
    )


def _decode_argument(form: Any, values: dict[str, Sequence[Any]]) -> Any:
    """The argument of which `_encode_argument` gave this form, with the lists of values by their kind."""
    kind, content = form
    if kind == "dict":
        return {name: _decode_argument(item, values) for name, item in content}
    if kind in ("tuple", "list"):
        items = [_decode_argument(item, values) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content if kind == "plain" else values[kind][content]


_literal = lru_cache(maxsize=256)(ast.literal_eval)  # there is one text for each form of a call


@torch.library.custom_op("arrowhead::site", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _site(
    number: Tensor,
    tensors: list[Tensor],
    sizes: list[int],
    scalars: list[float],
    form: str,
    likes: list[Tensor],
    channels: list[int],
    pair: bool,
    cast: torch.dtype | None,
) -> list[Tensor]:
    """Run the site with this number on the arguments of this form. Returns its outputs, without those that are None.

    `likes` are inputs with the shapes of the outputs, but for their last dimensions, which are `channels`. `pair`: the site
    gives a tuple of image and text. `cast` is the dtype of the autocast around the graph, which torch switches off in a graph.

    Raises:
        NotIntercepted: the outputs are others, or the site's plan has been taken off.
    """
    entry = _registry.get(int(number))
    if entry is None:
        raise NotIntercepted(
            "a compiled graph called a site from which the plan has been taken off; wanted the model as it is without; put "
            "back whatever was replaced while the plan was applied"
        )
    args, kwargs = _decode_argument(_literal(form), {"tensor": tensors, "size": sizes, "scalar": scalars})
    with nullcontext() if cast is None else torch.autocast(likes[0].device.type, cast):
        out = entry.call(*args, **kwargs)
    found = [part for part in (out if isinstance(out, tuple) else (out,)) if part is not None]
    wanted = _expected_outputs(likes, channels, cast)
    got = [(tuple(part.shape), part.dtype) for part in found]
    if got != wanted or isinstance(out, tuple) != pair:
        raise NotIntercepted(
            f"{entry.site.path}: got {got} {'in' if isinstance(out, tuple) else 'without'} a tuple, wanted {wanted} "
            f"{'in' if pair else 'without'} one, of which torch.compile made a graph; run the model uncompiled"
        )
    # the cache may hold the outputs, and the graph may write into what an operator returns
    return [part.clone(memory_format=torch.contiguous_format) for part in found]


def _expected_outputs(
    likes: Sequence[Tensor], channels: Sequence[int], cast: torch.dtype | None
) -> list[tuple[Any, torch.dtype]]:
    """Shapes and dtypes of a site's outputs."""
    dtypes = (like.dtype if cast is None or like.dtype == torch.float64 else cast for like in likes)
    return [((*like.shape[:-1], width), dtype) for like, width, dtype in zip(likes, channels, dtypes, strict=True)]


def _fake(*inputs: Any) -> list[Tensor]:
    *_, likes, channels, _, cast = inputs
    return [likes[0].new_empty(shape, dtype=dtype) for shape, dtype in _expected_outputs(likes, channels, cast)]


_site.register_fake(_fake)


@torch.library.custom_op("arrowhead::no_gradient", mutates_args=())
def _no_gradient(tensors: list[Tensor]) -> list[Tensor]:  # noqa: ARG001
    """The gradients of a site's arguments, which are refused as the backward pass runs, and not as the graph is made.

    Raises:
        InputsInvalid: always.
    """
    raise InputsInvalid(
        "got a gradient through a site under torch.compile, wanted none; call the model uncompiled, or under torch.no_grad"
    )


_no_gradient.register_fake(lambda tensors: [torch.empty_like(tensor) for tensor in tensors])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001  # torch names them
    _, tensors, sizes, scalars, _, likes, _, _, _ = inputs
    ctx.save_for_backward(*tensors)
    numbers: list[Any] = [[] if not values else None for values in (sizes, scalars)]  # torch takes empty lists for tensors
    ctx.lists = *numbers, [None] * len(likes)


def _backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(_no_gradient([tensor for tensor in tensors if tensor.is_floating_point()]))
    gradients = [next(found) if tensor.is_floating_point() else None for tensor in tensors]
    sizes, scalars, likes = ctx.lists
    return None, gradients, sizes, scalars, None, likes, None, None, None


_site.register_autograd(_backward, setup_context=_setup_context)


class CallWrapper:
    """Puts a function around a module's calls, outside of the module's graph where the module is compiled."""

    def __init__(self, module: nn.Module, around: Callable[..., Any]) -> None:
        """`around(call, *args, **kwargs)` is called in place of `call(*args, **kwargs)`."""
        self._module, self._before = module, vars(module).get(COMPILED)
        call = uncompiled_call(module) if self._before is None else self._before

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return (outside_graph(around) if compiling() else around)(call, *args, **kwargs)

        self._wrapped = wrapped

    def install(self) -> None:
        """Put the function there, until `remove`."""
        setattr(self._module, COMPILED, self._wrapped)

    def remove(self) -> None:
        """Put back what was there before. A module that was compiled since stays as it is."""
        if vars(self._module).get(COMPILED) is not self._wrapped:
            return
        if self._before is None:
            delattr(self._module, COMPILED)
        else:
            setattr(self._module, COMPILED, self._before)


BREAK_REASON = "arrowhead counts calls of the model, which a graph cannot; compile the model itself, before the plan is applied"
"""Why a graph ends where a model with a plan is called in it. Where the graph has to be whole, this is the error."""


def outside_graph(function: Callable[..., Any], recursive: bool = False) -> Callable[..., Any]:
    """End the graph that is being made. Returns the function for eager calls.

    What the function calls may have graphs, unless `recursive`.
    """
    graph_break(BREAK_REASON)
    return torch.compiler.disable(function, recursive=recursive, reason=BREAK_REASON)  # type: ignore[no-untyped-call]


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for torch's compiler to leave alone, and what it calls: a compiled loop calls it in every step."""
    return torch.compiler.disable(function, recursive=True) if compiler_is_loaded() else function  # type: ignore[no-untyped-call]


def force_eager() -> AbstractContextManager[Any]:
    """Within the block torch.compile makes no graph and runs none."""
    if not compiler_is_loaded():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def run_eagerly(changes: Changes) -> None:
    """As within `force_eager`, until the changes are undone."""
    changes.record(force_eager().__exit__, None, None, None)
