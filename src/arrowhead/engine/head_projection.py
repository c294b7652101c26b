"""Q, K and V of single heads: what a processor sees of its attention module, before attention and after."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from arrowhead.kernels.head_index import head_index, serving
from arrowhead.models.head_separation import QKV, heads_of
from arrowhead.upstream import child_modules


class ProjectedHeads:
    """An attention module in two views. The first projects Q, K and V of some heads, and has no others.

    After `attended` it is the module itself, since what attention gives has all heads. Only for modules that can project heads
    separately. Of keys that several heads share, each of these heads is given its own.
    """

    def __init__(self, module: Any, heads: Sequence[int]) -> None:
        layers, every = child_modules(module), heads_of(module)
        width = module.to_q.out_features // every
        some, count = tuple(heads), len(heads)
        view = dict(layers)  # found without a detour over `__getattr__`
        for name in QKV:
            if (linear := layers.get(name)) is not None:
                view[name] = partial(_project, linear, some, every, width)
        view |= dict.fromkeys(("heads", "num_heads", "kv_heads", "num_kv_heads"), count)
        view |= {"inner_dim": width * count, "_module": module}
        self.__dict__ = view

    def prepare_attention_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The module's method, for as many heads as the view has."""
        return type(self._module).prepare_attention_mask(self, *args, **kwargs)

    def attended(self) -> None:
        """From here on, what is asked of the module is the module's."""
        self.__dict__ = {"_module": self._module}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _project(linear: nn.Linear, heads: tuple[int, ...], of: int, width: int, x: Tensor) -> Tensor:
    """What a layer gives for these of its heads, each of a width: (B, N, C) -> (B, N, h·D)."""
    weight, bias = linear.weight, linear.bias
    if weight.shape[0] < of * width:  # keys or values, each for several heads of queries
        shared = linear(x).unflatten(-1, (-1, width))  # (B, N, G, D)
        return shared[:, :, head_index(serving(heads, shared.shape[2], of), x.device)].flatten(2)
    where = head_index(heads, weight.device)
    if isinstance(where, slice):
        rows = slice(where.start * width, where.stop * width)
        return F.linear(x, weight[rows], None if bias is None else bias[rows])
    weight = weight.view(of, width, -1).index_select(0, where).view(len(heads) * width, -1)  # (H·D, C) -> (h·D, C)
    return F.linear(x, weight, None if bias is None else bias.view(of, width).index_select(0, where).view(-1))
