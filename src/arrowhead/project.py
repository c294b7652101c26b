"""Q, K and V of single heads: which modules can compute them alone, and how."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def heads_apart(module: Any) -> bool:
    """Whether single heads' Q, K and V can be computed alone: plain linear layers, no q/k norm that spans heads."""
    linears = [linear for name in QKV if (linear := getattr(module, name, None)) is not None]
    norms = [norm for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k") if (norm := getattr(module, name, None))]
    width = module.to_q.out_features // module.heads
    own_width = all(w.numel() == width for norm in norms for w in norm.parameters())
    known = all(map(is_plain, linears)) and not getattr(module, "fused_projections", False)
    return known and own_width and all(linear.out_features == width * module.heads for linear in linears)


def is_plain(linear: Any) -> bool:
    """Whether a layer multiplies by a plain weight and does no more: no LoRA, quantisation, hook, or forward put on it."""
    if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor:
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))


class SomeHeads:
    """An attention module as its processor sees it, projecting Q, K and V for some of its heads only.

    Only for modules whose heads are apart.
    """

    def __init__(self, module: Any, heads: Sequence[int]) -> None:
        self.heads = len(heads)
        self._module = module
        self._rows = list(heads)
        self._all: int = module.heads

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
        weight = linear.weight.view(self._all, -1, linear.in_features)[self._rows].flatten(0, 1)  # (H·D, C) -> (h·D, C)
        bias = None if linear.bias is None else linear.bias.view(self._all, -1)[self._rows].flatten()
        return F.linear(x, weight, bias)
