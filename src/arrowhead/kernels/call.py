"""What a kernel is asked for: queries, keys and values, and what each head does with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from arrowhead.kernels.head_index import places
from arrowhead.plans import masks
from arrowhead.plans.cells import Precision, Radius
from arrowhead.plans.layout import Tokens


@dataclass(frozen=True)
class Policy:
    """What one head does: the radius of its band, None where it is full, and the precision of its product Q·Kᵀ."""

    radius: Radius | None = None
    precision: Precision = "native"


@dataclass(frozen=True)
class Call:
    """Arrow attention of q, k, v, each (B, H, N, D) with N = `tokens.total`, under a policy for each head.

    `scale` multiplies the scores. `mask`, the model's own, is boolean (True: seen) or added to the scores; it has four
    dimensions, and broadcasts to (B, H, N, N). `residual`, (B, H, V, D), is added to the visual rows of the heads in `adds`;
    of others it is not read.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: Tokens
    policies: tuple[Policy, ...]
    scale: float
    mask: Tensor | None = None
    residual: Tensor | None = None
    adds: tuple[int, ...] = ()

    def of(self, heads: Sequence[int]) -> "Call":
        """The same of some heads, without residuals."""
        where = places(tuple(heads), self.q.device)
        q, k, v = self.q[:, where], self.k[:, where], self.v[:, where]
        mask = None if self.mask is None else masks.part(self.mask, 1, where)
        policies = tuple(self.policies[head] for head in heads)
        return Call(q, k, v, self.tokens, policies, self.scale, mask)


Kernel = Callable[[Call], Tensor]
"""Attention of a call, (B, H, N, D), in the dtype of its queries. Whose name is in `dispatch.ADDING` adds residuals, too."""
