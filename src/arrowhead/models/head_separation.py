"""Checks whether an attention module can project Q, K and V of single heads."""

from typing import Any

from torch import Tensor, nn

from arrowhead.models.image_prompts import has_ip_adapter
from arrowhead.upstream import has_hooks

QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def heads_of(module: Any) -> int:
    """The number of heads (of queries) of an attention module of diffusers."""
    return int(module.heads if hasattr(module, "heads") else module.num_heads)


def can_project_heads_separately(module: Any) -> bool:
    """Whether Q, K and V of single heads can be projected alone: by plain linear layers, without norms across heads.

    Where several heads of queries share keys and values, this is about Q: K and V are projected whole. An IP-Adapter needs
    the queries of all heads.
    """
    # without to_q it is fused: one layer for Q, K and V, and in FLUX.2 for the feed-forward
    if not hasattr(module, "to_q") or has_ip_adapter(module):
        return False
    linears = [linear for name in QKV if (linear := getattr(module, name, None)) is not None]
    norms = [norm for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k") if (norm := getattr(module, name, None))]
    heads = heads_of(module)
    width = module.to_q.out_features // heads
    own_width = all(w.numel() == width for norm in norms for w in norm.parameters())
    known = all(map(is_plain, linears)) and not getattr(module, "fused_projections", False)
    return known and own_width and all(heads * width % linear.out_features == 0 for linear in linears)


def is_plain(linear: Any) -> bool:
    """Whether a layer is `nn.Linear` with a plain weight: no LoRA, no quantisation, no hook, no replaced forward."""
    if type(linear) is not nn.Linear or type(linear.weight.data) is not Tensor:
        return False
    return not (has_hooks(linear) or "forward" in vars(linear))
