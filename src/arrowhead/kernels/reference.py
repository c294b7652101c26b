"""The oracle: dense float32 attention under the whole mask. Every other kernel has to agree with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from arrowhead.kernels import masks, quantise
from arrowhead.layout import Tokens
from arrowhead.methods import Precision


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    radii: Sequence[int | None],
    precisions: Sequence[Precision],
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """Arrow attention, (B, H, N, D) each, computed in float32 and returned in the dtype of `q`.

    Of heads in int8 queries and keys are quantised, multiplied as whole numbers, and the product dequantised.
    """
    products = q.float() @ k.float().mT  # (B, H, N, N)
    if rounded := [head for head, precision in enumerate(precisions) if precision == "int8"]:
        products[:, rounded] = quantise.products(q[:, rounded], k[:, rounded])
    scores = products * scale
    for head, radius in enumerate(radii):
        if radius is not None:
            scores[:, head].masked_fill_(~masks.arrow(tokens, radius, q.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return (scores.softmax(-1) @ v.float()).to(q.dtype)  # (B, H, N, D)
