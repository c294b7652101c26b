"""What a kernel is asked for: queries, keys and values, and what each head does with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arrowhead.kernels import masks
from arrowhead.layout import Tokens
from arrowhead.methods import Precision, Radius


@dataclass(frozen=True)
class Policy:
    """What one head does: the radius of its band, None where it is full, and the precision of its product Q·Kᵀ."""

    radius: Radius | None = None
    precision: Precision = "native"


@dataclass(frozen=True)
class Call:
    """Arrow attention of q, k, v, each (B, H, N, D) with N = `tokens.total`, under a policy for each head.

    `scale` multiplies the scores. `mask`, the model's own, is boolean (True: seen) or added to the scores; it has four
    dimensions, and broadcasts to (B, H, N, N).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: Tokens
    policies: tuple[Policy, ...]
    scale: float
    mask: Tensor | None = None

    def of(self, heads: Sequence[int]) -> "Call":
        """The same of some heads, copied together."""
        where = torch.tensor(heads, device=self.q.device)
        q, k, v = self.q[:, where], self.k[:, where], self.v[:, where]
        mask = None if self.mask is None else masks.part(self.mask, 1, where)
        return replace(self, q=q, k=k, v=v, policies=tuple(self.policies[head] for head in heads), mask=mask)


Kernel = Callable[[Call], Tensor]
"""Attention of a call, (B, H, N, D), in the dtype of its queries."""
