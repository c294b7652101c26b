"""Where a model's attention is intercepted: a call with queries, keys and values goes to the handler of the running site.

A processor runs as a twin, whose class has clones of the processor's functions (`function_clones`): they find stand-ins under
the names by which they call attention (`F`, diffusers' `dispatch_attention_fn`). No module and no class of the model's changes.
Attention that is called in another way is caught by a mode of torch (`HookedAttention`), which is slower: it sees every call of
a torch function.
"""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from arrowhead.engine.compile_boundary import compiling
from arrowhead.engine.function_clones import uses_attribute, with_stand_ins
from arrowhead.upstream import TORCH_ATTENTION


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of scaled dot-product attention: q, k, v, (B, H, N, D) each.

    k and v may have fewer heads, each for as many heads of q that follow one another. `mask` is the model's own, (B or 1, H or
    1, N or 1, N), or None. `causal`: the call asks for a causal mask, or for dropout, which no mask can express. `native()`
    computes the attention as the model would, (B, H, N, D). `padding`, (B, N), is true for tokens that no call of the model
    has, where calls of several lengths are one batch: the output is 0 there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    mask: Tensor | None
    causal: bool
    native: Callable[[], Tensor]
    padding: Tensor | None = None


def batch_calls(calls: Sequence[AttentionCall], length: int) -> AttentionCall:
    """One call for several calls of one sample each, without masks: padded at the end to `length` tokens, and masked there."""

    def joined(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, 0, length - part.shape[2])) for part in parts])  # (1, H, n, D) -> (B, H, N, D)

    lengths = torch.tensor([call.k.shape[2] for call in calls], device=calls[0].k.device)
    seen = torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, N)
    return AttentionCall(
        joined(call.q for call in calls),
        joined(call.k for call in calls),
        joined(call.v for call in calls),
        calls[0].scale,
        None if bool(seen.all()) else seen[:, None, None],
        any(call.causal for call in calls),
        lambda: joined(call.native() for call in calls),
    )


AttentionHandler = Callable[[AttentionCall], Tensor]  # gives (B, H, N, D)
_handler: ContextVar[AttentionHandler | None] = ContextVar("arrowhead_attention_handler", default=None)


class NativeAttention:
    """A handler that lets the model compute its attention, and counts how often it does."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, attention: AttentionCall) -> Tensor:
        """What the model computes, (B, H, N, D)."""
        self.calls += 1
        return attention.native()


class attention_handler:  # noqa: N801 - used as a function, in a with statement
    """Within the block, hooked attention is computed by `handler`."""

    __slots__ = ("_before", "_own")

    _before: Token[AttentionHandler | None]

    def __init__(self, handler: AttentionHandler) -> None:
        self._own = handler

    def __enter__(self) -> None:
        self._before = _handler.set(self._own)

    def __exit__(self, *_: object) -> None:
        _handler.reset(self._before)


def hooked_attention(*args: Any, **kwargs: Any) -> Tensor:
    """The stand-in for `torch.nn.functional.scaled_dot_product_attention`, or for what a user has put in its place by now."""
    return _answered(F.scaled_dot_product_attention, args, kwargs)


def asked_handler() -> AttentionHandler | None:
    """The handler that a call of attention is described to; None where the model's own function runs, which is counted."""
    # a graph of torch.compile holds torch's attention: handlers change from step to step
    if compiling() or (handler := _handler.get()) is None:
        return None
    if type(handler) is NativeAttention:  # the call's description would cost more than it is worth
        handler.calls += 1
        return None
    return handler


def _answered(own: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The handler's answer to a call of `own`, which takes what torch's function takes; without a handler, what `own` gives."""
    if (handler := asked_handler()) is None:
        return own(*args, **kwargs)
    return handler(_described(partial(own, *args, **kwargs), *args, **kwargs))


def _described(
    native: Callable[[], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> AttentionCall:
    """The call of a function with these arguments; other arguments are left to `native`."""
    return AttentionCall(query, key, value, scale, attn_mask, is_causal or dropout_p > 0, native)


def _hooked_function(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The stand-in for a function that a module has imported: torch's own, or a user's in place of it."""

    @wraps(own)
    def hooked(*args: Any, **kwargs: Any) -> Tensor:
        return _answered(own, args, kwargs)

    return hooked


def _hooked_dispatch(dispatch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The stand-in for diffusers' `dispatch_attention_fn`, whose tensors are (B, N, H, D)."""

    @wraps(dispatch)
    def hooked(*args: Any, **kwargs: Any) -> Tensor:
        if (handler := asked_handler()) is None:
            return dispatch(*args, **kwargs)
        return handler(_transposed_dispatch(_described(partial(dispatch, *args, **kwargs), *args, **kwargs))).transpose(1, 2)

    return hooked


def transposed(call: AttentionCall) -> AttentionCall:
    """The call with tokens and heads exchanged in every tensor but the mask: (B, N, H, D) -> (B, H, N, D)."""
    q, k, v = call.q.transpose(1, 2), call.k.transpose(1, 2), call.v.transpose(1, 2)
    return AttentionCall(q, k, v, call.scale, call.mask, call.causal, lambda: call.native().transpose(1, 2))


def _transposed_dispatch(call: AttentionCall) -> AttentionCall:
    """`transposed` for a call of diffusers' dispatch, which takes a mask of two dimensions for one of the keys, (B, N)."""
    mask = call.mask
    if mask is not None and mask.shape == (call.k.shape[0], call.k.shape[1]):
        call = replace(call, mask=mask[:, None, None])
    return transposed(call)


class StandInModule(types.ModuleType):
    """A module with some members exchanged. All others are looked up in the module when they are used."""

    def __init__(self, module: types.ModuleType, **members: Any) -> None:
        super().__init__(module.__name__)
        vars(self).update(members, arrowhead_original=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.arrowhead_original, name)


SDPA = "scaled_dot_product_attention"
_functional = StandInModule(F, **{SDPA: hooked_attention})
_nn = StandInModule(nn, functional=_functional)
_MODULES = (F, _functional), (nn, _nn), (torch, StandInModule(torch, nn=_nn))


def _stand_in(name: str, value: Any, function: types.FunctionType) -> Any:
    """What the clone of a processor's function finds under a global name; None: what the function finds."""
    for module, stand_in in _MODULES:
        if value is module:  # other functions of torch are no reason for a clone
            return stand_in if uses_attribute(function.__code__, SDPA) else None
    if is_attention(value):
        return _hooked_function(value)
    return _hooked_dispatch(value) if name == "dispatch_attention_fn" and callable(value) else None


def is_attention(function: Any) -> bool:
    """Whether a function is torch's scaled_dot_product_attention, or what a user has put in its place."""
    return function is TORCH_ATTENTION or function is F.scaled_dot_product_attention


def replaced_attention() -> str | None:
    """The name of what a user has put in the place of torch's attention, if anything."""
    now = F.scaled_dot_product_attention
    return None if now is TORCH_ATTENTION else getattr(now, "__qualname__", f"a {type(now).__name__}")


class HookedAttention(TorchFunctionMode):
    """Within a `with` block, torch's scaled_dot_product_attention is hooked, by whatever name it is called."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_attention(function):
            return _answered(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def under_mode(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward, or processor, under `HookedAttention`.

    The mode does not see a function of Python that a user has put in the place of torch's attention. While there is one, a
    clone of a module's forward runs, which finds stand-ins.
    """
    module = getattr(forward, "__self__", None)
    clones: list[Callable[..., Any] | None] = []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if replaced_attention() is not None and isinstance(module, nn.Module):
            if not clones:
                cls: Any = with_stand_ins(type(module), _stand_in)
                own = cls is not None and getattr(forward, "__func__", None) is type(module).forward
                clones.append(partial(cls.forward, twin(module, cls)) if own else None)
            if clones[0] is not None:
                return clones[0](*args, **kwargs)
        with HookedAttention():
            return forward(*args, **kwargs)

    return hooked


class HookedProcessors:
    """Makes the hooked calls of a model's processors. A class of processors is looked into once."""

    def __init__(self) -> None:
        self._classes: dict[type, type | None] = {}

    def call_of(self, processor: Any) -> Callable[..., Any]:
        """A callable that does what the processor does, with its attention hooked.

        It is the twin's call: an object of another class that shares the processor's attributes, those that are set later
        included. Where clones do not do, it is the processor's own call under the mode.
        """
        base = type(processor)
        if base not in self._classes:
            self._classes[base] = with_stand_ins(base, _stand_in)
        hooked = self._classes[base]
        return under_mode(processor) if hooked is None else twin(processor, hooked)


def twin(processor: Any, cls: type) -> Any:
    """An object of class `cls` whose attributes are the processor's, and stay so: both have one `__dict__`."""
    other: Any = object.__new__(cls)
    object.__setattr__(other, "__dict__", vars(processor))
    return other
