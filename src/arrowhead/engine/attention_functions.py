"""Attention that a model calls by a function of another name: what its calls ask for, and the modules that call it."""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from arrowhead.engine.attention_hook import (
    AttentionCall,
    StandInModule,
    asked_handler,
    transposed,
    twin,
    under_mode,
)
from arrowhead.engine.function_clones import uses_attribute, with_stand_ins
from arrowhead.errors import NotIntercepted
from arrowhead.models.custom_attention import CalledFunction

MASKS, SCALES, LENGTHS = {"attn_mask"}, {"scale", "softmax_scale"}, {"k_lens"}
"""Parameters of attention functions that are understood: a mask, the scale of the scores, the number of keys of a sample."""
WITHOUT_EFFECT = {"dtype", "deterministic", "version", "fa_version", "op", "backend"}
"""Parameters that do not change what is computed."""
NEUTRAL: tuple[Any, ...] = (None, False, 0, 0.0, (-1, -1), [-1, -1])
"""Values by which a function is not told to do anything else: no bias, no dropout, no window."""


def calling_class(module: nn.Module, name: str, instead: Callable[[Callable[..., Any]], Callable[..., Any]]) -> type:
    """A subclass of a module's class, whose code finds `instead(function)` in place of the function `name`.

    Raises:
        NotIntercepted: no code of the class calls such a function, or the code cannot be cloned.
    """
    base, found = type(module), list[Any]()

    def exchanged(function: Any) -> Any:
        found.append(function)
        return instead(function)

    def stand_in(global_name: str, value: Any, code: types.FunctionType) -> Any:
        if global_name == name and callable(value):
            return exchanged(value)
        used = isinstance(value, types.ModuleType) and uses_attribute(code.__code__, name)
        return _module_with(value, name, code.__code__, exchanged) if used else None

    made = with_stand_ins(base, stand_in)
    if made is None or not found:
        raise NotIntercepted(
            f"got a {base.__name__} whose code does not call a function {name!r} by a name of its file"
            f"{', or could not be cloned' if found else ''}; wanted a module whose forward calls it, or calls a function of "
            "the same file that does; look for the call in the model's source, and name the module that it is in"
        )
    return made


def _module_with(
    module: types.ModuleType, name: str, code: types.CodeType, exchanged: Callable[[Any], Any], depth: int = 3
) -> Any:
    """A stand-in for a module in which the function `name` is exchanged, or that of a module in it; None without one."""
    if callable(function := getattr(module, name, None)):
        return StandInModule(module, **{name: exchanged(function)})
    inner = {each: value for each, value in vars(module).items() if isinstance(value, types.ModuleType)}
    for each, value in inner.items():
        if depth and uses_attribute(code, each) and (found := _module_with(value, name, code, exchanged, depth - 1)):
            return StandInModule(module, **{each: found})
    return None


def forward_calling(module: nn.Module, forward: Callable[..., Any], function: CalledFunction) -> Callable[..., Any]:
    """The forward of an attention module whose attention is a function, with that function hooked.

    Raises:
        NotIntercepted: the module's forward is not its class's, or does not call the function.
    """
    if getattr(forward, "__func__", None) is not type(module).forward:
        raise NotIntercepted(
            f"got a {type(module).__name__} whose forward was replaced on the instance, so that its calls of {function.name!r} "
            "cannot be seen; wanted its class's forward; apply the plan before hooks are added"
        )
    cls: Any = calling_class(module, function.name, lambda own: hooked_function(own, function))
    return partial(cls.forward, twin(module, cls))


def hooked_function(own: Callable[..., Any], function: CalledFunction) -> Callable[..., Any]:
    """The function with its attention hooked: that within it, or, where it has a layout, itself."""
    if function.layout is None:
        return under_mode(own)
    parameters = _parameters(own)

    @wraps(own)
    def hooked(*args: Any, **kwargs: Any) -> Tensor:
        if (handler := asked_handler()) is None:
            return own(*args, **kwargs)
        named = parameters | dict(zip(parameters, args, strict=False)) | kwargs
        call = _described(partial(own, *args, **kwargs), function, named)
        out = handler(_of_one_dtype(call)).to(call.q.dtype)
        return out.transpose(1, 2) if function.layout == "BNHD" else out

    return hooked


def _parameters(own: Callable[..., Any]) -> dict[str, Any]:
    """The names of a function's parameters with their defaults."""
    try:
        found = inspect.signature(own).parameters
    except (TypeError, ValueError):  # compiled code may have no signature
        return dict.fromkeys(("q", "k", "v"))
    return {name: None if each.default is inspect.Parameter.empty else each.default for name, each in found.items()}


def _described(native: Callable[[], Tensor], function: CalledFunction, named: Mapping[str, Any]) -> AttentionCall:
    """The call of an attention function with these arguments by name, in the order of its parameters.

    Raises:
        NotIntercepted: the arguments ask for more than queries, keys, values, a mask and a scale.
    """
    first = [*named][:3]
    if missing := [name for name in first if not isinstance(named[name], Tensor)]:
        raise NotIntercepted(
            f"got a call of {function.name} without tensors for {', '.join(missing)}; wanted queries, keys and values first"
        )
    q, k, v = (named[name] for name in first)
    rest = {name: value for name, value in named.items() if name not in first and name not in WITHOUT_EFFECT}
    mask, scale, lengths = (next((rest.pop(name) for name in known & rest.keys()), None) for known in (MASKS, SCALES, LENGTHS))
    if more := {name: value for name, value in rest.items() if not _is_neutral(value)}:
        raise NotIntercepted(
            f"got a call of {function.name} with {', '.join(f'{name}={value!r:.60}' for name, value in more.items())}; wanted "
            f"queries, keys, values, a mask ({', '.join(sorted(MASKS | LENGTHS))}) and a scale at most; leave these modules "
            "out of the adapter, or give arrowhead.Attention a forward"
        )
    call = AttentionCall(q, k, v, scale, mask, False, native)
    call = transposed(call) if function.layout == "BNHD" else call
    if lengths is None:
        return call
    seen = torch.arange(call.k.shape[2], device=k.device) < torch.as_tensor(lengths, device=k.device)[:, None]  # (B, N)
    return replace(call, mask=None if bool(seen.all()) else seen[:, None, None])


def _is_neutral(value: Any) -> bool:
    return not isinstance(value, Tensor) and any(type(value) is type(each) and value == each for each in NEUTRAL)


def _of_one_dtype(call: AttentionCall) -> AttentionCall:
    """The call with queries and keys in the dtype of the values: rotary embeddings may have made them wider."""
    if call.q.dtype == call.k.dtype == call.v.dtype:
        return call
    return replace(call, q=call.q.to(call.v.dtype), k=call.k.to(call.v.dtype))
