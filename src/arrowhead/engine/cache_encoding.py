"""How a tensor is stored until it is read: unchanged or in 8 bits, on the model's device or on another one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.kernels.head_index import head_index
from arrowhead.plans.memory import CacheDtype, groups, require_cache_dtype

EIGHT_BITS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The dtype of the stored values, and the largest value that is used."""


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor (..., C) as it is stored: `values` (..., C), and `scales` (..., groups) in float32 where the values have 8 bits.

    `dtype` and `device` are those of the tensor that was encoded, and of the one that `read` gives.
    """

    values: Tensor
    scales: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are stored."""
        return (self.values,) if self.scales is None else (self.values, self.scales)

    @property
    def unchanged(self) -> bool:
        """Whether the stored tensor is the one that was encoded, on its device."""
        return self.scales is None and self.values.device == self.device

    def read(self) -> Tensor:
        """Decode the tensor (..., C). Stored unchanged on its device, it is the stored tensor itself."""
        if self.scales is None:
            return self.values if self.values.device == self.device else to_device(self.values, self.device)
        values = to_device(self.values, self.device)
        wide = torch.promote_types(self.dtype, torch.float32)
        scales = to_device(self.scales, self.device).to(wide)
        return (_grouped(values.to(wide), scales.shape[-1]) * scales[..., None]).flatten(-2).to(self.dtype)

    def rows(self, rows: slice) -> "EncodedTensor":
        """Some rows of the batch, as a view."""
        scales = None if self.scales is None else self.scales[rows]
        return EncodedTensor(self.values[rows], scales, self.dtype, self.device)

    def heads(self, heads: tuple[int, ...]) -> "EncodedTensor":
        """Some heads of a tensor (B, H, …), in memory that holds no others.

        Heads are selected on the device where the tensor is read: a copy to the CPU may still be under way.
        """
        where = head_index(heads, self.device)
        picked = [own_storage(to_device(tensor, self.device)[:, where]) for tensor in self.tensors]
        values, *scales = (to_device(tensor, self.values.device) for tensor in picked)
        return EncodedTensor(values, scales[0] if scales else None, self.dtype, self.device)


@dataclass(frozen=True)
class CacheEncoding:
    """The dtype and the device that tensors are stored in; device None: the tensor's.

    In 8 bits, each token has a scale for each head, or for each `head_dim` channels of a module's output: the largest number
    there becomes the largest value of the dtype. A scale of 0, as of padding, decodes to zeros. Where a number is not finite,
    all numbers that share its scale are not.
    """

    dtype: CacheDtype = "native"
    device: torch.device | None = None

    @classmethod
    def of(cls, cache_dtype: CacheDtype, cache_device: str | torch.device | None) -> "CacheEncoding":
        """The encoding for the arguments of `apply`.

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

    @property
    def exact(self) -> "CacheEncoding":
        """The same device, without rounding."""
        return CacheEncoding(device=self.device)

    def stored(self, tensor: Tensor, head_dim: int) -> EncodedTensor:
        """Encode a tensor (..., C). A native one on its device is stored as it is."""
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
    """The tensor on a device; the same tensor if it is there.

    Copies between a GPU and the CPU use pinned memory and do not wait: both directions are work of one stream. So the CPU must
    not read what was sent to it.
    """
    if tensor.device == device:
        return tensor
    if tensor.is_cuda and device.type == "cpu":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())


def _grouped(tensor: Tensor, count: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:-1], count, -1)


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of a larger one, which it would keep in memory."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
