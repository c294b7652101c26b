"""The oracle: dense float32 attention under the whole mask. Every other kernel has to agree with it."""

import torch
from torch import Tensor

from arrowhead.kernels import int8
from arrowhead.kernels.call import Call
from arrowhead.plans import masks


def attend(call: Call) -> Tensor:
    """Arrow attention, (B, H, N, D) each, computed in float32 and returned in the dtype of `q`.

    Of heads in int8 queries and keys are quantised, multiplied as whole numbers, and the product dequantised.
    """
    q, k, v, mask = call.q, call.k, call.v, call.mask
    products = q.float() @ k.float().mT  # (B, H, N, N)
    if rounded := [head for head, policy in enumerate(call.policies) if policy.precision == "int8"]:
        products[:, rounded] = int8.products(q[:, rounded], k[:, rounded])
    scores = products * call.scale
    for head, policy in enumerate(call.policies):
        if policy.radius is not None:
            scores[:, head].masked_fill_(~masks.arrow(call.tokens, policy.radius, q.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return (scores.softmax(-1) @ v.float()).to(q.dtype)  # (B, H, N, D)
