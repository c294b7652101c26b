"""How a tensor is kept until it is read again: as it is or in 8 bits, where the model is or on another device."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.kernels.head_index import head_index
from arrowhead.plans.memory import CacheDtype, groups, require_cache_dtype

EIGHT_BITS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""What values are kept in, and the largest of them."""


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor (..., C) as it is kept: `values`, with `scales` (..., groups) in float32 where these are in 8 bits.

    `dtype` and `device` are those of the tensor that was written, and of the one that is read.
    """

    values: Tensor
    scales: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What takes memory."""
        return (self.values,) if self.scales is None else (self.values, self.scales)

    def read(self) -> Tensor:
        """The tensor again: itself, if it was kept as it was and where it was."""
        values = to_device(self.values, self.device)
        if self.scales is None:
            return values
        wide = torch.promote_types(self.dtype, torch.float32)
        scales = to_device(self.scales, self.device).to(wide)
        return (_grouped(values.to(wide), scales.shape[-1]) * scales[..., None]).flatten(-2).to(self.dtype)

    def rows(self, rows: slice) -> "EncodedTensor":
        """These rows of the batch; nothing is copied."""
        return replace(self, values=self.values[rows], scales=None if self.scales is None else self.scales[rows])

    def heads(self, heads: tuple[int, ...]) -> "EncodedTensor":
        """These places in the second dimension, keeping no other's memory alive.

        They are picked where the tensor is read, since what is on its way to the CPU may not have arrived there.
        """
        where = head_index(heads, self.device)
        picked = [own_storage(to_device(tensor, self.device)[:, where]) for tensor in self.tensors]
        values, *scales = (to_device(tensor, self.values.device) for tensor in picked)
        return replace(self, values=values, scales=scales[0] if scales else None)


@dataclass(frozen=True)
class CacheEncoding:
    """In what tensors are kept, and on which device; None: on their own.

    In 8 bits the largest of a token's numbers in a head, or in as many channels of a module's output, is the largest value of
    the dtype. A scale of 0, as of padding, gives zeros; numbers that are not finite make all that share their scale so.
    """

    dtype: CacheDtype = "native"
    device: torch.device | None = None

    @classmethod
    def of(cls, cache_dtype: CacheDtype, cache_device: str | torch.device | None) -> "CacheEncoding":
        """What was asked for by name.

        Raises:
            InputsInvalid: there is no such dtype, or device.
        """
        dtype = require_cache_dtype(cache_dtype)
        if cache_device is None:
            return cls(dtype)
        wanted = (
            f"got cache_device={cache_device!r}, wanted one that torch has here and that holds values, such as cpu; or None"
        )
        try:
            device = torch.empty(0, device=cache_device).device  # with its number
        except (RuntimeError, AssertionError, TypeError) as error:  # torch raises any of them, by device
            raise InputsInvalid(f"{wanted}. {error}") from error
        if device.type == "meta":
            raise InputsInvalid(wanted)
        return cls(dtype, device)

    def stored(self, tensor: Tensor, head_dim: int) -> EncodedTensor:
        """A tensor (..., C) as it is to be kept; the tensor itself where nothing is asked for."""
        device = self.device or tensor.device
        if self.dtype == "native":
            return EncodedTensor(to_device(tensor, device), None, tensor.dtype, tensor.device)
        dtype, most = EIGHT_BITS[self.dtype]
        numbers = _grouped(tensor.float(), groups(tensor.shape[-1], head_dim))
        scales = numbers.abs().amax(-1) / most
        values = (numbers / torch.where(scales > 0, scales, 1.0)[..., None]).clamp(-most, most)
        values = (values.round() if self.dtype == "int8" else values).to(dtype).flatten(-2)
        return EncodedTensor(to_device(values, device), to_device(scales, device), tensor.dtype, tensor.device)


NATIVE = CacheEncoding()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; itself if it is there.

    Between a GPU and the CPU by pinned memory, without waiting: the ways there and back are work of one stream, one after the
    other. The CPU must not look at what was sent to it.
    """
    if tensor.device == device:
        return tensor
    if tensor.is_cuda and device.type == "cpu":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())


def _grouped(tensor: Tensor, count: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:-1], count, -1)


def own_storage(tensor: Tensor) -> Tensor:
    """The same values, keeping no more memory alive than their own."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
