"""Indices that select some heads of a tensor, without a copy or a wait where that is possible."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=2**14)  # a head-wise plan needs different heads for every site and step
def head_index(heads: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """An index of heads for tensors on a device: a slice where the heads are consecutive, else a tensor on the device.

    Indexing by a slice copies nothing. A list would be copied to the device in each use, and the CPU would wait for it.
    """
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    with torch.inference_mode(False):  # the cached tensor is also used outside of inference mode
        made = torch.tensor(heads, pin_memory=device.type == "cuda")
        return made.to(device, non_blocking=device.type == "cuda")  # only from pinned memory is that safe


def select_heads(tensor: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of a tensor (B, H, …) in this order: a view where they follow one another, else a copy."""
    where = head_index(heads, tensor.device)
    return tensor[:, where] if isinstance(where, slice) else tensor.index_select(1, where)


def put_heads(out: Tensor, heads: tuple[int, ...], values: Tensor) -> None:
    """Write `values`, (B, len(heads), …), to some heads of `out`, (B, H, …)."""
    where = head_index(heads, out.device)
    if isinstance(where, slice):
        out[:, where] = values
    else:
        out.index_copy_(1, where, values)


@lru_cache
def serving(heads: tuple[int, ...], kv_heads: int, of: int) -> tuple[int, ...]:
    """Which of `kv_heads` heads of keys and values serve these heads, out of `of` heads of queries."""
    return tuple(head * kv_heads // of for head in heads)
