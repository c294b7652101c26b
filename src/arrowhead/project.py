"""Q, K and V of single heads: which modules can compute them alone, and how."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from arrowhead.heads import places

QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def heads_apart(module: Any) -> bool:
    """Whether single heads' Q, K and V can be computed alone: plain linear layers, no q/k norm that spans heads.

    Where heads share keys and values, it is Q alone that can.
    """
    if not hasattr(module, "to_q"):  # one layer for all of them, and more
        return False
    linears = [linear for name in QKV if (linear := getattr(module, name, None)) is not None]
    norms = [norm for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k") if (norm := getattr(module, name, None))]
    width = module.to_q.out_features // module.heads
    own_width = all(w.numel() == width for norm in norms for w in norm.parameters())
    known = all(map(is_plain, linears)) and not getattr(module, "fused_projections", False)
    return known and own_width and all(module.heads * width % linear.out_features == 0 for linear in linears)


def is_plain(linear: Any) -> bool:
    """Whether a layer multiplies by a plain weight and does no more: no LoRA, quantisation, hook, or forward put on it."""
    if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor:
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))


class SomeHeads:
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

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return partial(self._project, value) if name in QKV and value is not None else value

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        if linear.out_features < self._width:  # they serve several heads each
            shared = linear(x).unflatten(-1, (-1, self._width // self._all))  # (B, N, G, D)
            serving = tuple(row * shared.shape[2] // self._all for row in self._some)
            return shared[:, :, places(serving, x.device)].flatten(2)
        some = places(self._some, linear.weight.device)
        weight = linear.weight.view(self._all, -1, linear.in_features)[some].flatten(0, 1)  # (H·D, C) -> (h·D, C)
        bias = None if linear.bias is None else linear.bias.view(self._all, -1)[some].flatten()
        return F.linear(x, weight, bias)
