"""Stand around every site's module of a model: its processor becomes one of a subclass, which asks before it runs.

The subclass is made on the spot, with the original signature. What lies between Q, K, V and attention is in `route`.
"""

import copy
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from arrowhead.cache import Output
from arrowhead.errors import AlreadyApplied, NotIntercepted, ProcessorReplaced
from arrowhead.layout import Site
from arrowhead.project import SomeHeads
from arrowhead.route import Answer, AttentionCall, answered_by, route, unroute


@dataclass(frozen=True)
class SiteCall:
    """One call of a site's module: projections, attention, output projection."""

    site: Site
    processor: types.MethodType
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def module(self) -> Any:
        """The site's module, as the processor gets it."""
        return self.args[0]

    @property
    def batch(self) -> int:
        """Rows of the module's input (B, N, C)."""
        return self._hidden_states.shape[0]

    def run(self, answer: Answer, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:
        """Run the module on `rows` of its input, its attention computed by `answer`: (rows, N, C).

        With `heads`, Q, K and V of these alone are projected; `answer` gives the output of all heads just the same.

        Raises:
            NotIntercepted: the processor computed attention in a way that is not routed.
        """
        args, kwargs = self.args, self.kwargs
        if rows is not None:
            args = tuple(self._of_rows(value, rows) for value in args)
            kwargs = {name: self._of_rows(value, rows) for name, value in kwargs.items()}
        some = None if heads is None else SomeHeads(args[0], heads)
        if some is not None:
            args = (some, *args[1:])
        reached = False

        def once(call: AttentionCall) -> Tensor:
            nonlocal reached
            if reached:
                raise NotIntercepted(
                    f"{self.site.path}: {type(self.processor.__self__).__name__} computes attention twice, as for an "
                    "IP-Adapter; wanted a processor that does once; unload the adapter, or remove the plan"
                )
            reached = True
            attended = answer(call)
            if some is not None:
                some.heads = self.site.heads  # from here on the processor handles the output of all heads
            return attended

        with answered_by(once):
            out: Output = self.processor(*args, **kwargs)
        if not reached:
            raise NotIntercepted(
                f"{self.site.path}: {type(self.processor.__self__).__name__} did not call F.scaled_dot_product_attention or "
                "dispatch_attention_fn; "
                "wanted a processor that does, such as diffusers' AttnProcessor2_0"
            )
        return out

    @property
    def _hidden_states(self) -> Tensor:
        return self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[1]  # args[0] is the module

    def _of_rows(self, value: Any, rows: slice) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.shape[0] == self.batch else value


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
        """Put every processor and every name back. A processor that somebody else has set since stays, with a warning."""
        replaced = []
        for site, original in self._originals.items():
            module = self._modules[site]
            if module.processor is self._wrapped.get(site):
                module.processor = original
            else:
                replaced.append(f"{site.path} by a {type(module.processor).__name__}")
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
        return self.arrowhead_around(SiteCall(self.arrowhead_site, original, args, kwargs))

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
