"""The reference kernel: dense attention under the whole mask, in float32, or in float64 where `q` is.

All other kernels have to agree with it.
"""

import torch
from torch import Tensor

from arrowhead.kernels import int8
from arrowhead.kernels.call import Call
from arrowhead.plans import masks


def attend(call: Call) -> Tensor:
    """Arrow attention of a call, (B, H, N, D): computed in float32 at least, returned in the dtype of `q`.

    A query that sees no key gives 0.

    For heads in int8, queries and keys are encoded as whole numbers, and their products decoded (see `int8.py`).
    """
    q, k, v, mask = call.q, call.k, call.v, call.mask
    dtype = torch.promote_types(q.dtype, torch.float32)
    products = q.to(dtype) @ k.to(dtype).mT  # (B, H, N, N)
    if in_int8 := [head for head, policy in enumerate(call.policies) if policy.precision == "int8"]:
        products[:, in_int8] = int8.products(q[:, in_int8], k[:, in_int8]).to(dtype)
    scores = products * call.scale
    for head, policy in enumerate(call.policies):
        if policy.radius is not None:
            scores[:, head].masked_fill_(~masks.arrow(call.tokens, policy.radius, q.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)  # (B, H, N, N)
    return (weights @ v.to(dtype)).to(q.dtype)  # (B, H, N, D)
