"""The oracle: dense float32 attention under the whole mask. Every other kernel has to agree with it."""

import torch
from torch import Tensor

from arrowhead.kernels import masks
from arrowhead.layout import Tokens


def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, radius: int, scale: float) -> Tensor:
    """Arrow attention, (B, H, N, D) each, computed in float32 and returned in the dtype of `q`."""
    scores = (q.float() @ k.float().mT) * scale  # (B, H, N, N)
    scores = scores.masked_fill(~masks.arrow(tokens, radius, q.device), -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)  # (B, H, N, D)
