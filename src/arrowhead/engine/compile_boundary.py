"""A site within what torch.compile makes a graph of: one operator, opaque to the compiler, that runs the site as ever.

So what is around sites is compiled, and no cell, step or plan is in the graph: all of them are one graph for each form of a
block, as many as without a plan. Calls that are decided about as a whole (of blocks, of the transformer in a step) are
surrounded outside of what is compiled of them.
"""

import ast
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.plans.layout import Site
from arrowhead.upstream import COMPILED, compiler_is_loaded, graph_break, uncompiled_call


@dataclass(frozen=True)
class OutputSpec:
    """What a site gives, as the compiler has to know beforehand: what blocks of one form have in common.

    `image` and `text` are channels; `text` is 0 where none is given, and None where None is given in its place. `place` is
    where the text stands among the arguments, None if it is always named.
    """

    image: int
    text: int | None
    text_first: bool
    place: int | None


@dataclass(frozen=True)
class SiteHandle:
    """What a graph knows of a site: a number, which is data, since a constant would be compiled, and what the site gives."""

    number: Tensor
    promise: OutputSpec

    @classmethod
    def of(cls, site: Site, parameters: Sequence[str]) -> "SiteHandle":
        """A new one; `parameters` are the names of the arguments that the graph has."""
        return cls(torch.tensor(next(_numbers), device="cpu"), _output_spec(site, parameters))


@dataclass(frozen=True)
class RegistryEntry:
    """The way from a sign to a site, held by whoever intercepts it: what stands in the site's module knows the sign alone."""

    sign: SiteHandle
    site: Site
    behind: Callable[..., Any]

    def __post_init__(self) -> None:
        _registry[int(self.sign.number)] = self

    def close(self) -> None:
        """Nobody comes in by it any more."""
        _registry.pop(int(self.sign.number), None)


_registry: WeakValueDictionary[int, RegistryEntry] = WeakValueDictionary()
_numbers = itertools.count()


def _output_spec(site: Site, parameters: Sequence[str]) -> OutputSpec:
    text = "encoder_hidden_states"
    place = parameters.index(text) if text in parameters else None
    if site.kind == "block":
        joint = any(own.joint for own in site.within)
        return OutputSpec(site.channels, (site.channels if site.joint else None) if joint else 0, True, place)
    if site.kind != "self_attention":
        return OutputSpec(site.channels, 0, False, place)
    width = site.heads * site.head_dim
    of_text = (site.text_channels or site.channels) if site.projects_out == "all" else width
    return OutputSpec(width if site.projects_out == "none" else site.channels, of_text if site.joint else 0, False, place)


def compiling() -> bool:
    """Whether torch's compiler looks on, rather than the code running."""
    return torch.compiler.is_compiling()


def call_operator(sign: SiteHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a site gives, from within a graph: the compiler reads this function.

    Raises:
        NotIntercepted: arguments that are neither tensors nor plain values.
    """
    tensors: list[Tensor] = []
    sizes: list[int] = []
    scalars: list[float] = []
    promise, given = sign.promise, _encode_argument((args, kwargs), tensors, sizes, scalars)
    image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else next(iter(kwargs.values()))
    text = kwargs.get("encoder_hidden_states")
    if text is None and promise.place is not None and promise.place < len(args):
        text = args[promise.place]
    parts = [(image, promise.image)]
    if text is image:  # as Lumina 2 has it
        text = None
    if text is not None and promise.text:
        parts.insert(0 if promise.text_first else 1, (text, promise.text))
    pair = text is not None and promise.text != 0
    device = image.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    likes, channels = [like for like, _ in parts], [width for _, width in parts]
    outs = torch.ops.arrowhead.site(sign.number, tensors, sizes, scalars, given, likes, channels, pair, cast)
    if not pair:
        return outs[0]
    if promise.text is None:
        return (None, outs[0]) if promise.text_first else (outs[0], None)
    return outs[0], outs[1]


def _encode_argument(value: Any, tensors: list[Tensor], sizes: list[int], scalars: list[float]) -> str:
    """An argument as the text of a literal; what may change from call to call is added to these lists, and its place said."""
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


def _decode_argument(given: Any, places: dict[str, Sequence[Any]]) -> Any:
    """What `_form` was of."""
    kind, content = given
    if kind == "dict":
        return {name: _decode_argument(item, places) for name, item in content}
    if kind in ("tuple", "list"):
        items = [_decode_argument(item, places) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content if kind == "plain" else places[kind][content]


_literal = lru_cache(maxsize=256)(ast.literal_eval)  # one for each form of a call


@torch.library.custom_op("arrowhead::site", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _site(
    number: Tensor,
    tensors: list[Tensor],
    sizes: list[int],
    scalars: list[float],
    given: str,
    likes: list[Tensor],
    channels: list[int],
    pair: bool,
    cast: torch.dtype | None,
) -> list[Tensor]:
    """What the site behind a door gives for the arguments that `given` tells of, without what is None.

    `likes` are inputs that these have the shapes of, but for the `channels`; `pair` says whether it gives image and text.
    `cast` is the dtype of the autocast around the graph, which is switched off where a graph runs.

    Raises:
        NotIntercepted: the site gives something else, or is no longer intercepted.
    """
    entered = _registry.get(int(number))
    if entered is None:
        raise NotIntercepted(
            "a compiled graph called a site from which the plan has been taken off; wanted the model as it is without; put "
            "back whatever was replaced while the plan was applied"
        )
    args, kwargs = _decode_argument(_literal(given), {"tensor": tensors, "size": sizes, "scalar": scalars})
    with nullcontext() if cast is None else torch.autocast(likes[0].device.type, cast):
        out = entered.behind(*args, **kwargs)
    found = [part for part in (out if isinstance(out, tuple) else (out,)) if part is not None]
    wanted = _expected_outputs(likes, channels, cast)
    got = [(tuple(part.shape), part.dtype) for part in found]
    if got != wanted or isinstance(out, tuple) != pair:
        raise NotIntercepted(
            f"{entered.site.path}: got {got} {'in' if isinstance(out, tuple) else 'without'} a tuple, wanted {wanted} "
            f"{'in' if pair else 'without'} one, which was promised to torch.compile; run the model uncompiled"
        )
    # the cache may hold them, and the graph may write into what it is given
    return [part.clone(memory_format=torch.contiguous_format) for part in found]


def _expected_outputs(
    likes: Sequence[Tensor], channels: Sequence[int], cast: torch.dtype | None
) -> list[tuple[Any, torch.dtype]]:
    """Shapes and dtypes of what a site gives."""
    dtypes = (like.dtype if cast is None or like.dtype == torch.float64 else cast for like in likes)
    return [((*like.shape[:-1], width), dtype) for like, width, dtype in zip(likes, channels, dtypes, strict=True)]


def _fake(*inputs: Any) -> list[Tensor]:
    *_, likes, channels, _, cast = inputs
    return [likes[0].new_empty(shape, dtype=dtype) for shape, dtype in _expected_outputs(likes, channels, cast)]


_site.register_fake(_fake)


@torch.library.custom_op("arrowhead::no_gradient", mutates_args=())
def _no_gradient(tensors: list[Tensor]) -> list[Tensor]:  # noqa: ARG001
    """Of what a site was called with.

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
    numbers: list[Any] = [[] if not given else None for given in (sizes, scalars)]  # torch takes empty lists for tensors
    ctx.lists = *numbers, [None] * len(likes)


def _backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(_no_gradient([tensor for tensor in tensors if tensor.is_floating_point()]))
    gradients = [next(found) if tensor.is_floating_point() else None for tensor in tensors]
    sizes, scalars, likes = ctx.lists
    return None, gradients, sizes, scalars, None, likes, None, None, None


_site.register_autograd(_backward, setup_context=_setup_context)


class CallWrapper:
    """A function around a module's calls, outside of what torch.compile has made of it, until `remove`."""

    def __init__(self, module: nn.Module, around: Callable[..., Any]) -> None:
        """`around(call, *args, **kwargs)` stands for `call(*args, **kwargs)`."""
        self._module, self._own = module, vars(module).get(COMPILED)
        call = uncompiled_call(module) if self._own is None else self._own

        def surrounded(*args: Any, **kwargs: Any) -> Any:
            return (outside_graph(around) if compiling() else around)(call, *args, **kwargs)

        self._put = surrounded
        setattr(module, COMPILED, surrounded)

    def remove(self) -> None:
        """Leave the module as it was, or as it was compiled since."""
        if vars(self._module).get(COMPILED) is not self._put:
            return
        if self._own is None:
            delattr(self._module, COMPILED)
        else:
            setattr(self._module, COMPILED, self._own)


OUTSIDE = "arrowhead counts calls of the model, which a graph cannot; compile the model itself, before the plan is applied"
"""Why a graph ends where the model is called in it, or is none where it has to be whole."""


def outside_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """From within a graph: end it, run the function, of which none is made, and begin another one with what that calls."""
    graph_break(OUTSIDE)
    return torch.compiler.disable(function, recursive=False, reason=OUTSIDE)  # type: ignore[no-untyped-call]


def force_eager() -> AbstractContextManager[Any]:
    """Within the block nothing is compiled, and nothing compiled is run."""
    if not compiler_is_loaded():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
