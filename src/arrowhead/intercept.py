"""Stand around every site's module of a model: its processor becomes one of a subclass, which asks before it runs.

The subclass is made on the spot, with the original signature. What lies between Q, K, V and attention is in `route`.
"""

import copy
import functools
import inspect
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from arrowhead.cache import Output, along
from arrowhead.errors import AlreadyApplied, NotIntercepted, ProcessorReplaced
from arrowhead.layout import Site
from arrowhead.project import SomeHeads
from arrowhead.route import Answer, AttentionCall, answered_by, route, unroute


@dataclass(frozen=True)
class SiteCall(ABC):
    """One call of a site's module."""

    site: Site
    module: Any
    original: Callable[..., Output]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def batch(self) -> int:
        """Rows of the module's input (B, N, C)."""
        return self._hidden_states.shape[0]

    @abstractmethod
    def run(self, answer: Answer, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:
        """Run the module on `rows` of its input: (rows, N, C)."""

    def kept(self, out: Output, rows: slice | None = None) -> Output:  # noqa: ARG002
        """What of an output, run on `rows`, serves other steps, or the other branch: all of it, where it is no block's."""
        return out

    def restored(self, kept: Output) -> Output:
        """The output, from what `kept` gave in another step, or of one branch, for both."""
        return kept

    @property
    def _hidden_states(self) -> Tensor:
        return self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[self._first]

    _first: ClassVar[int] = 0
    """Where the input stands among the arguments."""

    def _of_rows(self, rows: slice | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for these rows."""
        if rows is None:
            return self.args, dict(self.kwargs)
        args = tuple(_part(value, rows, self.batch) for value in self.args)
        return args, {name: _part(value, rows, self.batch) for name, value in self.kwargs.items()}


def _part(value: Any, rows: slice, batch: int) -> Any:
    """These rows of an argument that has all of the batch; so too in tuples, as of rotary embeddings, (B, N, C) each."""
    if isinstance(value, tuple):  # those of (N, C) are for all samples
        return tuple(_part(item, rows, batch) if isinstance(item, Tensor) and item.ndim > 2 else item for item in value)
    return value[rows] if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch else value


@dataclass(frozen=True)
class ModuleCall(SiteCall):
    """One call of a module that is computed or not; `original` is its forward."""

    def run(self, answer: Answer, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:  # noqa: ARG002
        """There is no attention to answer, and there are no heads to choose from."""
        args, kwargs = self._of_rows(rows)
        return self.original(*args, **kwargs)


@dataclass(frozen=True)
class BlockCall(ModuleCall):
    """One call of a whole block, (text, image) or the image alone: what it adds to its input is what serves elsewhere."""

    def kept(self, out: Output, rows: slice | None = None) -> Output:
        """What the block added to its input."""
        return along(out, self._input(out, rows), -1)

    def restored(self, kept: Output) -> Output:
        """The block's input, with this added."""
        return along(self._input(kept, None), kept, 1)

    def _input(self, like: Output, rows: slice | None) -> Output:
        args, kwargs = self._of_rows(rows)
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        visual = next(iter(given.values()))  # hidden_states, or x
        if isinstance(like, Tensor):
            return visual
        text, _ = like
        return (None if text is None else given["encoder_hidden_states"]), visual


@dataclass(frozen=True)
class AttentionSiteCall(SiteCall):
    """One call of an attention module's processor, whose first argument the module is."""

    _first: ClassVar[int] = 1

    def run(self, answer: Answer, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:
        """Run the module on `rows` of its input, its attention computed by `answer`: (rows, N, C).

        With `heads`, Q, K and V of these alone are projected; `answer` gives the output of all heads just the same.

        Raises:
            NotIntercepted: the processor computed attention in a way that is not routed.
        """
        args, kwargs = self._of_rows(rows)
        some = None if heads is None else SomeHeads(args[0], heads)
        if some is not None:
            args = (some, *args[1:])
        reached = False

        def once(call: AttentionCall) -> Tensor:
            nonlocal reached
            if reached:
                raise NotIntercepted(
                    f"{self.site.path}: {self._processor} computes attention twice, as for an "
                    "IP-Adapter; wanted a processor that does once; unload the adapter, or remove the plan"
                )
            reached = True
            attended = answer(call)
            if some is not None:
                some.heads = self.site.heads  # from here on the processor handles the output of all heads
            return attended

        with answered_by(once):
            out = self.original(*args, **kwargs)
        if not reached:
            raise NotIntercepted(
                f"{self.site.path}: {self._processor} did not call F.scaled_dot_product_attention or "
                "dispatch_attention_fn; "
                "wanted a processor that does, such as diffusers' AttnProcessor2_0"
            )
        return out

    @property
    def _processor(self) -> str:
        return type(self.module.processor).__name__


Around = Callable[[SiteCall], Output]


class Interception:
    """The two places, held for the modules of one model until `remove`."""

    def __init__(self, modules: Mapping[Site, nn.Module], around: Around) -> None:
        self._modules = modules
        self._originals: dict[Site, Any] = {}
        self._wrapped: dict[Site, Any] = {}
        self._routes: list[str] = []
        try:
            for site, module in modules.items():
                if site.kind != "self_attention":
                    self._originals[site] = vars(module).get("forward")  # accelerate, too, sets it on the instance
                    self._wrapped[site] = module.forward = _wrap_forward(module, site, around)
                    continue
                if hasattr(module.processor, "arrowhead_around"):
                    raise AlreadyApplied(f"{site.path} is intercepted already; call arrowhead.remove(pipe) first")
                try:
                    self._routes += route(module.processor)
                except NotIntercepted as error:
                    raise NotIntercepted(f"{site.path}: {error}") from None
                self._originals[site] = module.processor
                self._wrapped[site] = module.processor = _wrap(module.processor, site, around)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put every processor, forward and name back. What somebody else has set since stays, with a warning."""
        replaced = []
        for site, original in self._originals.items():
            module, name = self._modules[site], "processor" if site.kind == "self_attention" else "forward"
            current = vars(module).get(name, getattr(module, name))
            if current is not self._wrapped.get(site):
                replaced.append(f"{site.path} by a {type(current).__name__}")
            elif original is None:
                delattr(module, name)
            else:
                setattr(module, name, original)
        for name in self._routes:
            unroute(name)
        self._originals, self._wrapped, self._routes = {}, {}, []
        if replaced:
            warnings.warn(
                f"processors were replaced while a plan was applied: {', '.join(replaced)}; they are left in place, and their "
                "sites were not compressed since",
                ProcessorReplaced,
                stacklevel=4,
            )


def _wrap_forward(module: nn.Module, site: Site, around: Around) -> Callable[..., Output]:
    forward, call = module.forward, BlockCall if site.kind == "block" else ModuleCall

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Output:
        return around(call(site, module, forward, args, kwargs))

    return wrapped


def _wrap(processor: Any, site: Site, around: Around) -> Any:
    wrapped = copy.copy(processor)
    wrapped.__class__ = _wrapper_class(type(processor))  # type: ignore[arg-type]
    wrapped.arrowhead_site, wrapped.arrowhead_around = site, around
    return wrapped


@cache
def _wrapper_class(base: type) -> type:
    """A subclass of a processor class that hands its calls to `arrowhead_around`.

    The signature has to be the original's: diffusers passes a processor only the arguments that its signature names.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Output:
        original = types.MethodType(base.__call__, self)
        return self.arrowhead_around(AttentionSiteCall(self.arrowhead_site, args[0], original, args, kwargs))

    __call__.__signature__ = inspect.signature(base.__call__)  # type: ignore[attr-defined]
    return type(base.__name__, (base,), {"__call__": __call__, "__module__": base.__module__})


@contextmanager
def intercepted(modules: Mapping[Site, nn.Module], around: Around) -> Iterator[None]:
    """Hold the two places for the length of a `with` block."""
    interception = Interception(modules, around)
    try:
        yield
    finally:
        interception.remove()
