"""A stand-in for Apple's MPS on any machine: tensors that say they lie there, computed on the CPU; what MPS refuses is refused.

It knows no float64, and mixes no devices but for numbers. What its kernels compute nobody sees here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("apple")
DEVICE = torch.device("apple")


class There(Tensor):
    """A tensor on the device; `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "There":
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {inner.dtype}: the MPS framework doesn't support it")
        where = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=DEVICE, **where)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, There) else value


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator: on the device where its tensors or its `device` say so."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, There)]
    wanted = kwargs.get("device")
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    here = [value for value in tensors if not isinstance(value, There) and value.ndim > 0]
    if there and here and not moves and not func.__name__.startswith("index"):  # indices may lie on the CPU
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found at least two, mps and cpu")
    on_device = (wanted is not None and torch.device(wanted).type == DEVICE.type) or (wanted is None and bool(there))
    inside = {name: torch.device("cpu") if name == "device" and value is not None else value for name, value in kwargs.items()}
    if inside.get("pin_memory"):
        raise RuntimeError("pinned memory is CUDA's")
    out = func(*tree_map(_inner, args), **tree_map(_inner, inside))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if func is torch.ops.aten._to_copy.default and any(out is value.inner for value in there):
        out = out.clone()
    if not on_device:
        return out
    own = {id(value.inner): value for value in there}  # in place: the same tensor comes back
    return tree_map(
        lambda value: (own[id(value)] if id(value) in own else There(value)) if isinstance(value, Tensor) else value, out
    )


class _Dispatch(TorchDispatchMode):
    """Factories have no tensors to ask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch decides by the device before any operator: how to attend (here from the definition), and moves there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._nn.scaled_dot_product_attention and isinstance(args[0], There):
            return _attention(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # a list of places becomes a tensor of them
            own, index, *rest = args
            whole = index if isinstance(index, tuple) else (index,)
            places = tuple(torch.tensor(part) if isinstance(part, list) else part for part in whole)
            return func(own, places if isinstance(index, tuple) else places[0], *rest)
        if func is Tensor.to and not isinstance(args[0], There):
            own, *where = args
            targets = [value.device if isinstance(value, Tensor) else value for value in (*where, *kwargs.values())]
            if any(isinstance(value, str | torch.device) and torch.device(value).type == DEVICE.type for value in targets):
                dtypes = [value.dtype if isinstance(value, Tensor) else value for value in (*where, *kwargs.values())]
                dtype = next((value for value in dtypes if isinstance(value, torch.dtype)), own.dtype)
                return There(func(own, dtype).clone())
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return There(func(*args, **{name: value for name, value in kwargs.items() if name != "device"}))
        return func(*args, **kwargs)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **how: Any,
) -> Tensor:
    assert not is_causal
    assert not dropout_p
    scale = how.get("scale")
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


@contextmanager
def machine() -> Iterator[None]:
    """Within the block there is such a device."""
    with _Dispatch(), _Functions():
        yield


def moved(module: nn.Module) -> nn.Module:
    """A module whose weights lie there."""
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                part._parameters[name] = nn.Parameter(There(weight.data), requires_grad=weight.requires_grad)
        for name, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[name] = There(value)
    return module


def back(value: Any) -> Any:
    """What a tensor holds, here."""
    return _inner(value)
