"""Where some heads are along a tensor's dimension."""

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
