"""Q, K and V of single heads: which modules can compute them alone, and how."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from arrowhead.kernels.head_index import head_index
from arrowhead.models.head_separation import QKV


class ProjectedHeads:
    """An attention module as its processor sees it, projecting Q, K and V for some of its heads only.

    Only for modules whose heads are apart. Of keys that several heads share each of these heads is given its own.
    """

    def __init__(self, module: Any, heads: Sequence[int]) -> None:
        self.heads = len(heads)
        self._module = module
        self._some = tuple(heads)
        self._all: int = module.heads
        self._width: int = module.to_q.out_features

    @property
    def inner_dim(self) -> int:
        """The width of the heads that are projected, from which Qwen's processor takes a head's."""
        return self._module.inner_dim // self._all * self.heads

    def prepare_attention_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, for so many heads."""
        return type(self._module).prepare_attention_mask(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return partial(self._project, value) if name in QKV and value is not None else value

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        if linear.out_features < self._width:  # they serve several heads each
            shared = linear(x).unflatten(-1, (-1, self._width // self._all))  # (B, N, G, D)
            serving = tuple(row * shared.shape[2] // self._all for row in self._some)
            return shared[:, :, head_index(serving, x.device)].flatten(2)
        some = head_index(self._some, linear.weight.device)
        weight = linear.weight.view(self._all, -1, linear.in_features)[some].flatten(0, 1)  # (H·D, C) -> (h·D, C)
        bias = None if linear.bias is None else linear.bias.view(self._all, -1)[some].flatten()
        return F.linear(x, weight, bias)
