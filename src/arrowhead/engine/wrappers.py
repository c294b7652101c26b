"""Wrappers around the modules of sites: every call of such a module becomes a site call, which the run or the search answers.

A module with a processor of diffusers gets a wrapper of that processor: an object of a subclass, with the same signature, since
diffusers passes a processor only the arguments that its signature names. Any other module has its forward replaced on the
instance. How attention within the call is intercepted is in `attention_hook`.
"""

import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

from torch import nn

from arrowhead.engine.adapter_checks import RowsAlone, require_described
from arrowhead.engine.attention_functions import calling_class, forward_calling, hooked_function
from arrowhead.engine.attention_hook import HookedProcessors, hooked_attention, twin, under_mode
from arrowhead.engine.cache import Output
from arrowhead.engine.changes import Changes
from arrowhead.engine.compile_boundary import RegistryEntry, SiteHandle, call_operator, compiling, outside_graph
from arrowhead.engine.forward_hooks import is_reached, restore_forward
from arrowhead.engine.site_calls import (
    AttentionSiteCall,
    BlockCall,
    CustomBlockCall,
    CustomModuleCall,
    ForwardSiteCall,
    FunctionSiteCall,
    ModuleCall,
    SiteCall,
)
from arrowhead.engine.stack_calls import StackCall, StackMember, members_of
from arrowhead.errors import AlreadyApplied, NotIntercepted, ProcessorReplaced
from arrowhead.models.custom_attention import CalledFunction, Forward
from arrowhead.models.custom_blocks import Block
from arrowhead.models.image_prompts import has_third_output
from arrowhead.models.model import Model
from arrowhead.models.signatures import method_signature, signature_within
from arrowhead.plans.layout import Site
from arrowhead.upstream import COMPILED, uncompiled

Around = Callable[[SiteCall], Output]
"""What answers a site's calls in place of its module."""
SLOTS = ("arrowhead_site", "arrowhead_around", "arrowhead_handle", "arrowhead_original")
"""What the wrapper of a processor has of its own. All its other attributes are the processor's."""


@dataclass
class _Wrapper:
    """What stands in the attribute `place` of a site's module, where `original` was before."""

    site: Site
    module: nn.Module
    place: str
    original: Any
    value: Any
    entry: RegistryEntry | None = None

    @property
    def holds(self) -> bool:
        """Whether calls of the module reach the wrapper."""
        return (
            is_reached(self.module, self.value) if self.place == "forward" else getattr(self.module, self.place) is self.value
        )


class Interception:
    """The wrappers of one model's modules, from `install` on. A site has a module in every transformer."""

    def __init__(self, model: Model, around: Around) -> None:
        """Changes nothing yet. `around` answers the site calls.

        The model's `forwards` replace those of attention modules that call no attention function of torch's.
        """
        self._model, self._answer = model, around
        self._around = self._answered if model.blocks else around
        self._muted = False
        self._wrappers: list[_Wrapper] = []
        self._members: dict[nn.Module, tuple[Site, StackMember]] = {}  # of stacks: each block with its site and its place
        self._replaced: dict[str, str] | None = None  # when it was removed

    def install(self, changes: Changes) -> None:
        """Wrap every module, until the changes are undone.

        Raises:
            AlreadyApplied: a plan or a search has wrapped the model, or a module of it.
            NotIntercepted: a processor cannot be wrapped, or a module does not call the function that the adapter names.
        """
        for transformer in self._model.transformers:
            if not changes.claim(transformer, "_arrowhead_interception", self):
                raise _intercepted_already(type(transformer).__name__)
        changes.record(self._remove)
        processors = HookedProcessors()
        modules = self._model.site_modules
        for stack, blocks in self._model.stacks:
            for (block, module), member in zip(blocks, members_of(len(blocks)), strict=True):
                self._members[module] = block, member
                modules.append((stack, module))
        # functions first: the wrapper of a block calls the forward that its module has then
        for site, module in sorted(modules, key=lambda each: not each[0].is_function):
            custom = self._model.forwards.get(site.path)
            has_processor = site.kind == "self_attention" and custom is None and hasattr(module, "processor")
            has_processor &= site.path not in self._model.functions
            held = type(module) if site.is_function else getattr(module, "processor" if has_processor else "forward")
            if any(hasattr(function, "arrowhead_around") for function in (held, vars(module).get(COMPILED))):
                raise _intercepted_already(site.path)
            if site.is_function:
                self._wrap_function(site, module)
            elif has_processor:
                self._wrap_processor(site, module, processors)
            else:
                self._wrap_forward(site, module, custom)

    def _answered(self, call: SiteCall) -> Output:
        """The answer to a site call; within a block that is checked, the module's own."""
        return call.native() if self._muted else self._answer(call)

    @contextmanager
    def _unanswered(self) -> Iterator[None]:
        """Within the block of code, sites run as without wrappers."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def _wrap_function(self, site: Site, module: nn.Module) -> None:
        wrapped = function_class(module, site, self._model.functions[site.path], self._around)
        self._put(_Wrapper(site, module, "__class__", type(module), wrapped))

    def _wrap_processor(self, site: Site, module: nn.Module, processors: HookedProcessors) -> None:
        wrapped = _wrap_processor(module.processor, site, self._around, processors)
        entry = RegistryEntry(wrapped.arrowhead_handle, site, partial(wrapped, module))
        self._put(_Wrapper(site, module, "processor", module.processor, wrapped, entry))

    def _wrap_forward(self, site: Site, module: nn.Module, custom: Forward | None = None) -> None:
        """Wrap a module's forward; or, of a site that is compiled on its own, what torch calls in its place."""
        compiled = vars(module).get(COMPILED)
        place = "forward" if compiled is None or site.kind == "self_attention" else COMPILED
        forward = module.forward if place == "forward" or compiled is None else compiled
        if (function := self._model.functions.get(site.path)) is not None:
            hooked = forward_calling(module, forward, function)
        else:
            hooked = under_mode(forward) if custom is None else partial(custom, module, hooked_attention)
        wrapped: Any
        if site.kind == "stack":
            wrapped = _wrap_member(*self._members[module], module, forward, site, self._around)
        elif site.path in self._model.blocks or (site.kind == "cross_attention" and self._model.pipe.scheduler is None):
            alone = RowsAlone(self._unanswered)
            wrapped = _wrap_custom(module, forward, site, self._around, self._model.blocks.get(site.path), alone)
        else:
            wrapped = _wrap_forward(module, forward, site, self._around, hooked, custom is not None)
        original = vars(module).get("forward") if place == "forward" else compiled
        self._put(_Wrapper(site, module, place, original, wrapped, RegistryEntry(wrapped.arrowhead_handle, site, wrapped)))

    def _put(self, wrapper: _Wrapper) -> None:
        """Set a wrapper in its place. The list has the wrapper first, so that an interruption leaves none that is not known."""
        self._wrappers.append(wrapper)
        setattr(wrapper.module, wrapper.place, wrapper.value)

    def renew(self) -> None:
        """Wrap anew the sites that were compiled on their own since, so that the wrapper is outside of their graphs."""
        for wrapper in [*self._wrappers]:
            module = wrapper.module
            if wrapper.site.kind == "self_attention" or vars(module).get(COMPILED) in (None, wrapper.value):
                continue
            if wrapper.place == "forward" and not restore_forward(module, wrapper.value, wrapper.original):
                continue
            if wrapper.entry is not None:
                wrapper.entry.close()
            self._wrappers.remove(wrapper)
            self._wrap_forward(wrapper.site, module)

    def replaced(self) -> dict[str, str]:
        """The paths of sites whose wrapper is no longer there, each with the type of what is there now."""
        gone = [wrapper for wrapper in self._wrappers if not wrapper.holds]
        return {wrapper.site.path: type(getattr(wrapper.module, wrapper.place)).__name__ for wrapper in gone}

    def _remove(self) -> None:
        """Put every processor and forward back. What replaced a wrapper stays, see `warn_of_replaced`."""
        if self._replaced is None:
            self.renew()
            self._replaced = self.replaced()
        for wrapper in reversed(self._wrappers):
            if wrapper.place == "forward":
                restore_forward(wrapper.module, wrapper.value, wrapper.original)
            elif getattr(wrapper.module, wrapper.place) is wrapper.value:
                setattr(wrapper.module, wrapper.place, wrapper.original)
            if wrapper.site.is_function:
                wrapper.value.arrowhead_around = None
            if wrapper.entry is not None:
                wrapper.entry.close()

    def warn_of_replaced(self) -> None:
        """Warn, when the wrappers are off, of what had replaced some of them."""
        if replaced := self._replaced:
            self._replaced = {}
            named = ", ".join(f"{path} by a {kind}" for path, kind in replaced.items())
            warnings.warn(
                f"processors were replaced while a plan was applied: {named}; they are left in place, and their sites were not "
                "compressed since",
                ProcessorReplaced,
                stacklevel=4,
            )

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse to copy a model that carries the wrappers."""
        raise uncopied(type(self._model.transformer).__name__)


def _intercepted_already(what: str) -> AlreadyApplied:
    return AlreadyApplied(f"{what} is intercepted already, by a plan or a search; call arrowhead.remove first")


def _wrap_forward(
    module: nn.Module, forward: Callable[..., Output], site: Site, around: Around, hooked: Callable[..., Output], custom: bool
) -> Callable[..., Output]:
    """The wrapper of a forward; `hooked` is that with hooked attention, `custom`: which an adapter has put together."""
    unchecked = True

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Output:
        nonlocal unchecked
        if compiling():
            return call_operator(handle, args, kwargs)
        if site.kind != "self_attention":
            if site.kind == "block":
                return around(BlockCall(site, module, forward, args, kwargs, parameters))
            return around(ModuleCall(site, module, forward, args, kwargs))
        call = ForwardSiteCall(site, module, forward, args, kwargs, hooked)
        if unchecked:
            require_described(call, replaced=custom)
            unchecked = False
        return around(call)

    parameters = _forward_parameters(uncompiled(module), site)
    handle = SiteHandle.of(site, parameters)
    wrapped.arrowhead_around, wrapped.arrowhead_handle = around, handle  # type: ignore[attr-defined]
    return wrapped


def _wrap_custom(
    module: nn.Module,
    forward: Callable[..., Output],
    site: Site,
    around: Around,
    block: Block | None,
    alone: RowsAlone,
) -> Callable[..., Output]:
    """The wrapper of a custom model's block, or of a cross-attention."""

    def answered(*args: Any, **kwargs: Any) -> Output:
        if block is None:
            return around(CustomModuleCall(site, module, forward, args, kwargs, alone))
        return around(CustomBlockCall(site, module, forward, args, kwargs, alone, parameters, block.names))

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Output:
        return (outside_graph(answered, recursive=True) if compiling() else answered)(*args, **kwargs)

    parameters = [*inspect.signature(forward).parameters]
    wrapped.arrowhead_around = around  # type: ignore[attr-defined]
    wrapped.arrowhead_handle = SiteHandle.of(site, parameters)  # type: ignore[attr-defined]
    return wrapped


def function_class(module: nn.Module, site: Site, function: CalledFunction, around: Around) -> type:
    """A class for a module, in which calls of an attention function are site calls, until `arrowhead_around` is None."""
    calls = [0]

    def instead(own: Callable[..., Any]) -> Callable[..., Any]:
        hooked = hooked_function(own, function)

        def answered(*args: Any, **kwargs: Any) -> Any:
            if (answer := cls.arrowhead_around) is None:  # a hook may have kept the method
                return own(*args, **kwargs)
            call, calls[0] = FunctionSiteCall(site, module, own, args, kwargs, hooked), calls[0] + 1
            if calls[0] > 1:
                raise call.attends_twice()
            return answer(call)

        @wraps(own)
        def called(*args: Any, **kwargs: Any) -> Any:
            return (outside_graph(answered, recursive=True) if compiling() else answered)(*args, **kwargs)

        return called

    calling: Any = calling_class(module, function.name, instead)

    @wraps(calling.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] = 0
        return calling.forward(self, *args, **kwargs)

    def __reduce_ex__(self: Any, _: Any) -> Any:
        raise uncopied(type(self).__name__)

    members = {"forward": forward, "__reduce_ex__": __reduce_ex__, "__module__": calling.__module__}
    cls: Any = type(calling.__name__, (calling,), members)
    cls.arrowhead_around = staticmethod(around)
    return cls


def _wrap_member(
    block: Site, member: StackMember, module: nn.Module, forward: Callable[..., Output], stack: Site, around: Around
) -> Callable[..., Output]:
    """The wrapper of the forward of a block of a stack."""

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Output:
        if compiling():
            return call_operator(handle, args, kwargs)
        return around(StackCall(stack, module, forward, args, kwargs, parameters, member))

    parameters = _forward_parameters(uncompiled(module), block)
    handle = SiteHandle.of(block, parameters)
    wrapped.arrowhead_around, wrapped.arrowhead_handle = around, handle  # type: ignore[attr-defined]
    return wrapped


def _wrap_processor(processor: Any, site: Site, around: Around, processors: HookedProcessors) -> Any:
    """The wrapper of a processor for one site. It shares the processor's attributes, so those set on either are set on both."""
    base: Any = type(processor)
    keeps_slots = any(isinstance(member, types.MemberDescriptorType) for cls in base.__mro__ for member in vars(cls).values())
    if keeps_slots or not hasattr(processor, "__dict__"):  # functions have slots, too
        raise NotIntercepted(
            f"{site.path}: got a {base.__name__} for a processor, wanted an object whose class can be derived from, with its "
            "attributes in __dict__; use one of diffusers' processors, such as AttnProcessor2_0"
        )
    wrapped = twin(processor, _wrapper_class(base))
    parameters = [*inspect.signature(base.__call__).parameters][2:]
    handle = SiteHandle.of(site, parameters, third=has_third_output(processor))
    own = site, around, handle, processors.call_of(processor)
    for name, value in zip(SLOTS, own, strict=True):
        object.__setattr__(wrapped, name, value)  # a processor that is a torch module would register what is set
    return wrapped


def _forward_parameters(module: nn.Module, site: Site) -> list[str]:
    """The names of the arguments of a module's forward, which may be wrapped on its class or on the instance.

    Raises:
        UnsupportedPipeline: a wrapper hides them, and the module is a block, whose input is told by its name.
    """
    cls = type(module)
    found = signature_within(module.forward, cls, "forward") or signature_within(cls.forward, cls, "forward")
    if found is None:
        found = method_signature(cls, "forward") if site.kind == "block" else inspect.signature(module.forward)
    return [name for name in found.parameters if name != "self"]


@cache  # one class for every plan: graphs of torch.compile depend on a processor's class
def _wrapper_class(base: type) -> type:
    """A subclass of a processor class whose calls are answered by `arrowhead_around`.

    What belongs to the wrapper alone is in slots, as its `__dict__` is the processor's. diffusers makes processors of the classes
    that it finds, as an IP-Adapter is loaded or unloaded: those are of the base class.
    """

    def __new__(_cls: type, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Output:
        if compiling():
            return call_operator(self.arrowhead_handle, args[1:], kwargs)
        return self.arrowhead_around(AttentionSiteCall(self.arrowhead_site, args[0], self.arrowhead_original, args, kwargs))

    def __reduce_ex__(_self: Any, _protocol: Any) -> Any:
        raise uncopied(base.__name__)

    __call__.__wrapped__ = base.__call__  # type: ignore[attr-defined]  # inspect.signature follows it, for torch's compiler, too
    members = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "__module__": base.__module__, "__slots__": SLOTS}
    return type(base.__name__, (base,), {**members, "__new__": __new__})


def uncopied(what: str) -> AlreadyApplied:
    """The error of copying or pickling what carries a plan: the copy would refer to the original's run."""
    return AlreadyApplied(
        f"got a copy, or a pickle, of a {what} while a plan is applied, wanted one of what carries none; call arrowhead.remove "
        "first, and apply the plan to both afterwards"
    )
