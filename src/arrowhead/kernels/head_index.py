"""Where some heads are along a tensor's dimension: to read them, and to write to them."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=2**14)  # a plan head by head has others for every site and step
def places(heads: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """An index of heads, for tensors on a device: a slice where they follow one another, else a tensor that is kept there.

    A list would be copied to the device whenever it is used, and waited for. What a slice gives is no copy.
    """
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    with torch.inference_mode(False):  # it is kept, and is not always read in inference mode
        made = torch.tensor(heads, pin_memory=device.type == "cuda")
        return made.to(device, non_blocking=device.type == "cuda")  # from other memory it may be read before it is there


def select_heads(tensor: Tensor, heads: tuple[int, ...]) -> Tensor:
    """These places in the second dimension, in this order: a view where they follow one another, else a copy."""
    where = places(heads, tensor.device)
    return tensor[:, where] if isinstance(where, slice) else tensor.index_select(1, where)


def put_heads(out: Tensor, heads: tuple[int, ...], values: Tensor) -> None:
    """Write `values`, (B, len(heads), …), to these places in the second dimension of `out`."""
    where = places(heads, out.device)
    if isinstance(where, slice):
        out[:, where] = values
    else:
        out.index_copy_(1, where, values)


@lru_cache
def serving(heads: tuple[int, ...], kv_heads: int, of: int) -> tuple[int, ...]:
    """Which of `kv_heads` heads of keys and values serve these heads, out of `of` heads of queries."""
    return tuple(head * kv_heads // of for head in heads)
