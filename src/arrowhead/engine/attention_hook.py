"""The place between a model's Q, K, V and its attention: two names in the module that defines its processor, routed.

`F` becomes a stand-in for torch.nn.functional whose `scaled_dot_product_attention` asks whoever answers for the site that is
running; `dispatch_attention_fn`, which newer models of diffusers call, becomes a function that does. Routed for the first
model that needs a module, and put back with the last, so that an untouched process stays untouched.

A module without a processor may call attention by any name and from anywhere: while its forward runs, torch itself is asked.
"""

import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from arrowhead.engine.compile_boundary import compiling
from arrowhead.errors import NotIntercepted


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled-dot-product attention: q, k, v (B, H, N, D), and `native` to run it just as the model would.

    k and v may have fewer heads, each for as many heads of queries in a row. `mask` is the model's own, (B or 1, H or 1,
    N or 1, N); `causal`, that it asks for more than a mask can say.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    mask: Tensor | None
    causal: bool
    native: Callable[[], Tensor]


def batch_calls(calls: Sequence[AttentionCall], length: int) -> AttentionCall:
    """Calls of one sample each, without masks, as one of all, padded at the end to `length` tokens: the mask tells which."""

    def whole(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, 0, length - part.shape[2])) for part in parts])

    lengths = torch.tensor([call.k.shape[2] for call in calls], device=calls[0].k.device)
    seen = torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, N)
    return AttentionCall(
        whole(call.q for call in calls),
        whole(call.k for call in calls),
        whole(call.v for call in calls),
        calls[0].scale,
        None if bool(seen.all()) else seen[:, None, None],
        any(call.causal for call in calls),
        lambda: whole(call.native() for call in calls),
    )


AttentionHandler = Callable[[AttentionCall], Tensor]  # (B, H, N, D)
_handler: ContextVar[AttentionHandler | None] = ContextVar("arrowhead_answer", default=None)


@contextmanager
def attention_handler(answer: AttentionHandler) -> Iterator[None]:
    """Routed attention within the block goes to `answer`."""
    token = _handler.set(answer)
    try:
        yield
    finally:
        _handler.reset(token)


def _handle(call: AttentionCall) -> Tensor:
    """What whoever answers says, or, when nobody does, what the model computes itself."""
    answer = _handler.get()
    return call.native() if answer is None else answer(call)


class _RoutedFunctional(types.ModuleType):
    """torch.nn.functional, but for attention."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    @staticmethod
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def native() -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **kwargs
            )

        if compiling():  # a graph that sites are outside of, or within, is not asked
            return native()
        return _handle(AttentionCall(query, key, value, scale, attn_mask, is_causal or dropout_p > 0, native))


hooked_attention = _RoutedFunctional.scaled_dot_product_attention
"""What asks: to be called in place of torch's."""


class HookedAttention(TorchFunctionMode):
    """Within a `with` block every call of torch's scaled_dot_product_attention is routed, whatever name it goes by."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        routed = hooked_attention if function is F.scaled_dot_product_attention else function
        return routed(*args, **(kwargs or {}))


def _routed_dispatch(dispatch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Diffusers' dispatch_attention_fn, whose tensors are (B, N, H, D)."""

    @wraps(dispatch)
    def routed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        def native() -> Tensor:
            return dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, *args, **kwargs).transpose(1, 2)

        if compiling():
            return dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, *args, **kwargs)
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, N, H, D) -> (B, H, N, D)
        return _handle(AttentionCall(q, k, v, scale, attn_mask, is_causal or dropout_p > 0, native)).transpose(1, 2)

    return routed


_functional = _RoutedFunctional("torch.nn.functional")
_originals: dict[str, dict[str, Any]] = {}  # module: what its routed names were
_users: Counter[str] = Counter()
_lock = threading.Lock()  # pipelines in several threads may share a module


def route(processor: Any) -> list[str]:
    """Route the names wherever a processor's class, or one that it inherits from, is defined; gives the modules, for `unroute`.

    Raises:
        NotIntercepted: none of them has either name.
    """
    with _lock:
        modules = [name for name in dict.fromkeys(cls.__module__ for cls in type(processor).__mro__) if _stand_ins(name)]
        for name in modules:
            if name not in _originals:
                namespace, stand_ins = vars(sys.modules[name]), _stand_ins(name)
                _originals[name] = {own: namespace[own] for own in stand_ins}
                namespace.update(stand_ins)
            _users[name] += 1
    if not modules:
        raise NotIntercepted(
            f"{type(processor).__name__} lives in {type(processor).__module__}, which uses neither torch.nn.functional as F "
            "nor dispatch_attention_fn; wanted a processor of diffusers, such as AttnProcessor2_0"
        )
    return modules


def _stand_ins(name: str) -> dict[str, Any]:
    """What to put in place of a module's names, as they are when it is not routed."""
    own = vars(sys.modules[name]) | _originals.get(name, {})
    found: dict[str, Any] = {"F": _functional} if own.get("F") is F else {}
    if callable(dispatch := own.get("dispatch_attention_fn")):
        found["dispatch_attention_fn"] = _routed_dispatch(dispatch)
    return found


def unroute(name: str) -> None:
    """Undo one `route`; the last one puts the module's names back."""
    with _lock:
        _users[name] -= 1
        if not _users[name]:
            vars(sys.modules[name]).update(_originals.pop(name))
            del _users[name]
