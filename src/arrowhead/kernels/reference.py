"""The reference kernel: dense attention in float32, under the whole mask. All other kernels have to agree with it."""

import torch
from torch import Tensor

from arrowhead.kernels import int8
from arrowhead.kernels.call import Call
from arrowhead.plans import masks


def attend(call: Call) -> Tensor:
    """Arrow attention of a call, (B, H, N, D): computed in float32, returned in the dtype of `q`.

    For heads in int8, queries and keys are encoded as whole numbers, and their products decoded (see `int8.py`).
    """
    q, k, v, mask = call.q, call.k, call.v, call.mask
    products = q.float() @ k.float().mT  # (B, H, N, N)
    if in_int8 := [head for head, policy in enumerate(call.policies) if policy.precision == "int8"]:
        products[:, in_int8] = int8.products(q[:, in_int8], k[:, in_int8])
    scores = products * call.scale
    for head, policy in enumerate(call.policies):
        if policy.radius is not None:
            scores[:, head].masked_fill_(~masks.arrow(call.tokens, policy.radius, q.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return (scores.softmax(-1) @ v.float()).to(q.dtype)  # (B, H, N, D)
