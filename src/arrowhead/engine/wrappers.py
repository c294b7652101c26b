"""Stand around every site's module of a model: its processor becomes one of a subclass, which asks before it runs.

The subclass is made on the spot, with the original signature. A module without a processor has its forward replaced, on the
instance. What lies between Q, K, V and attention is in `route`.
"""

import copy
import inspect
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # torch does not offer it otherwise

from arrowhead.engine.attention_hook import HookedAttention, hooked_attention, route, unroute
from arrowhead.engine.cache import Output
from arrowhead.engine.compile_boundary import RegistryEntry, SiteHandle, call_operator, compiling
from arrowhead.engine.forward_hooks import is_reached, replace_forward, restore_forward
from arrowhead.engine.site_calls import AttentionSiteCall, BlockCall, ForwardSiteCall, ModuleCall, SiteCall
from arrowhead.errors import AlreadyApplied, ArrowheadError, NotIntercepted, ProcessorReplaced
from arrowhead.models.custom import Forward
from arrowhead.plans.layout import Site
from arrowhead.upstream import COMPILED, uncompiled

Around = Callable[[SiteCall], Output]
SAME = 2e-3
"""By so much a forward that stands in for a module's own may be off, in float32."""


class Interception:
    """The two places, held for the modules of one model until `remove`. A site has a module in every transformer."""

    def __init__(
        self, modules: Iterable[tuple[Site, nn.Module]], around: Around, forwards: Mapping[str, Forward] | None = None
    ) -> None:
        """`forwards`, by path, are those of attention modules that call no function of torch's."""
        self._sites: dict[nn.Module, Site] = {}
        self._places: dict[nn.Module, str] = {}
        self._originals: dict[nn.Module, Any] = {}
        self._wrapped: dict[Any, Any] = {}
        self._doors: dict[nn.Module, RegistryEntry] = {}
        self._routes: list[str] = []
        self._around = around
        try:
            for site, module in modules:
                instead = (forwards or {}).get(site.path)
                processed = site.kind == "self_attention" and instead is None and hasattr(module, "processor")
                self._sites[module], self._places[module] = site, "processor" if processed else "forward"
                held = getattr(module, self._places[module]), vars(module).get(COMPILED)
                if any(hasattr(function, "arrowhead_around") for function in held):
                    raise AlreadyApplied(f"{site.path} is intercepted already; call arrowhead.remove first")
                if not processed:
                    self._replace_forward(module, instead)
                    continue
                try:
                    self._routes += route(module.processor)
                except NotIntercepted as error:
                    raise NotIntercepted(f"{site.path}: {error}") from None
                self._originals[module] = module.processor
                self._wrapped[module] = module.processor = wrapped = _wrap(module.processor, site, around)
                self._doors[module] = RegistryEntry(wrapped.arrowhead_sign, site, partial(wrapped, module))
        except BaseException:
            self.remove()
            raise

    def _replace_forward(self, module: nn.Module, instead: Forward | None = None) -> None:
        """A forward on the instance; of a site that is compiled by itself, what torch calls in its place."""
        site, compiled = self._sites[module], vars(module).get(COMPILED)
        place = self._places[module] = "forward" if compiled is None or site.kind == "self_attention" else COMPILED
        forward = module.forward if place == "forward" or compiled is None else compiled
        wrapped: Any = _wrap_forward(module, forward, site, self._around, instead)
        self._wrapped[module], self._doors[module] = wrapped, RegistryEntry(wrapped.arrowhead_sign, site, wrapped)
        if place == "forward":
            self._originals[module] = replace_forward(module, wrapped)
        else:
            self._originals[module] = compiled
            setattr(module, COMPILED, wrapped)

    def renew(self) -> None:
        """Stay outside of sites that have been compiled by themselves since, so that no graph decides what they do."""
        for module, wrapped in [*self._wrapped.items()]:
            if self._sites[module].kind == "self_attention" or vars(module).get(COMPILED) in (None, wrapped):
                continue
            if self._places[module] == "forward" and not restore_forward(module, wrapped, self._originals[module]):
                continue
            self._doors[module].close()
            self._replace_forward(module)

    def replaced(self) -> list[str]:
        """Sites whose processor or forward is somebody else's by now, and what it is."""
        return [
            f"{self._sites[module].path} by a {type(getattr(module, self._places[module])).__name__}"
            for module, wrapped in self._wrapped.items()
            if not self._holds(module, wrapped)
        ]

    def _holds(self, module: nn.Module, wrapped: Any) -> bool:
        place = self._places[module]
        return is_reached(module, wrapped) if place == "forward" else getattr(module, place) is wrapped

    def remove(self) -> None:
        """Put every processor, forward and name back. What somebody else has set since stays, with a warning."""
        self.renew()
        replaced = self.replaced()
        for module, wrapped in self._wrapped.items():
            place = self._places[module]
            if place == "forward":
                restore_forward(module, wrapped, self._originals[module])
            elif getattr(module, place) is wrapped:
                setattr(module, place, self._originals[module])
        for door in self._doors.values():
            door.close()
        for name in self._routes:
            unroute(name)
        self._originals, self._wrapped, self._doors, self._routes = {}, {}, {}, []
        if replaced:
            warnings.warn(
                f"processors were replaced while a plan was applied: {', '.join(replaced)}; they are left in place, and their "
                "sites were not compressed since",
                ProcessorReplaced,
                stacklevel=4,
            )


def _wrap_forward(
    module: nn.Module, forward: Callable[..., Output], site: Site, around: Around, instead: Forward | None
) -> Callable[..., Output]:
    routed = _watched(forward) if instead is None else partial(instead, module, hooked_attention)
    unchecked = instead is not None

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Output:
        nonlocal unchecked
        if compiling():
            return call_operator(sign, args, kwargs)
        if site.kind != "self_attention":
            if site.kind == "block":
                return around(BlockCall(site, module, forward, args, kwargs, parameters))
            return around(ModuleCall(site, module, forward, args, kwargs))
        call = ForwardSiteCall(site, module, forward, args, kwargs, routed)
        if unchecked:
            _require_alike(call)
            unchecked = False
        return around(call)

    parameters = _parameters(uncompiled(module).forward)
    sign = SiteHandle.of(site, parameters)
    wrapped.arrowhead_around, wrapped.arrowhead_sign = around, sign  # type: ignore[attr-defined]
    return wrapped


def _watched(forward: Callable[..., Output]) -> Callable[..., Output]:
    def watched(*args: Any, **kwargs: Any) -> Output:
        with HookedAttention():
            return forward(*args, **kwargs)

    return watched


@torch.no_grad()
def _require_alike(call: ForwardSiteCall) -> None:
    """Check, on one row, that a forward in place of the module's own gives what that gives.

    Raises:
        NotIntercepted: it does not.
    """
    one = slice(0, 1)
    call = replace(call, args=tuple(map(_detached, call.args)), kwargs={n: _detached(v) for n, v in call.kwargs.items()})
    with _disable_current_modes():  # no counter of FLOPs counts it
        wanted = call.native(one)
        try:
            got: Any = call.run(lambda attention: attention.native(), one)
        except ArrowheadError:
            raise
        except Exception as error:  # whatever somebody's forward runs into
            got = error
    if isinstance(wanted, Tensor) and isinstance(got, Tensor) and wanted.shape == got.shape:
        off = float((got - wanted).float().norm() / wanted.float().norm().clamp_min(1e-12))
        if off <= max(SAME, 8 * torch.finfo(wanted.dtype).eps) or not wanted.isfinite().all():
            return
        found = f"what is off by {off:.1%}"
    else:
        found = f"{_given(got)} where the module gives {_given(wanted)}"
    raise NotIntercepted(
        f"{call.site.path}: the forward given for a {type(call.module).__name__} gives {found}; wanted what the module itself "
        "gives; look at the order of norms and rotary embeddings, at the scale, and at the order of heads in its projection"
    ) from (got if isinstance(got, Exception) else None)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _given(out: Any) -> str:
    if isinstance(out, Exception):
        return f"{type(out).__name__} ({out})"
    return f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"


def _wrap(processor: Any, site: Site, around: Around) -> Any:
    wrapped = copy.copy(processor)
    wrapped.__class__ = _wrapper_class(type(processor))  # type: ignore[arg-type]
    wrapped.arrowhead_site, wrapped.arrowhead_around = site, around
    wrapped.arrowhead_sign = SiteHandle.of(site, _parameters(type(processor).__call__)[2:])
    return wrapped


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [*inspect.signature(function).parameters]


@cache
def _wrapper_class(base: type) -> type:
    """A subclass of a processor class that hands its calls to `arrowhead_around`.

    The signature has to be the original's: diffusers passes a processor only the arguments that its signature names.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Output:
        if compiling():
            return call_operator(self.arrowhead_sign, args[1:], kwargs)
        original = types.MethodType(base.__call__, self)
        return self.arrowhead_around(AttentionSiteCall(self.arrowhead_site, args[0], original, args, kwargs))

    def __reduce_ex__(_self: Any, _protocol: Any) -> Any:
        raise uncopied(base.__name__)

    __call__.__wrapped__ = base.__call__  # type: ignore[attr-defined]  # inspect.signature follows it, for torch's compiler, too
    members = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "__module__": base.__module__}
    return type(base.__name__, (base,), members)


def uncopied(what: str) -> AlreadyApplied:
    """Why nothing that carries a plan is copied, or pickled: the copy would refer to the original's run."""
    return AlreadyApplied(
        f"got a copy, or a pickle, of a {what} while a plan is applied, wanted one of what carries none; call arrowhead.remove "
        "first, and apply the plan to both afterwards"
    )


@contextmanager
def intercepted(
    modules: Iterable[tuple[Site, nn.Module]], around: Around, forwards: Mapping[str, Forward] | None = None
) -> Iterator[None]:
    """Hold the two places for the length of a `with` block."""
    interception = Interception(modules, around, forwards)
    try:
        yield
    finally:
        interception.remove()
