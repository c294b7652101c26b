"""The arguments of a kernel: queries, keys and values, and a policy for each head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from arrowhead.kernels.head_index import head_index
from arrowhead.plans import masks
from arrowhead.plans.cells import Precision, Radius
from arrowhead.plans.layout import Tokens


@dataclass(frozen=True)
class Policy:
    """What a kernel computes for one head: a band of `radius`, or full attention (None), and the precision of scores."""

    radius: Radius | None = None
    precision: Precision = "native"


@dataclass(frozen=True)
class Call:
    """One call of a kernel: arrow attention of B samples and H heads, with D channels each.

    Attributes:
        q, k, v: queries, keys and values, (B, H, N, D) each, where N = `tokens.total`.
        tokens: the sequence, of which V tokens are visual.
        policies: one for each head.
        scale: multiplies the scores.
        mask: the model's own mask, with four dimensions, which broadcasts to (B, H, N, N): boolean (True: the query sees the
            key), or a bias that is added to the scores.
        residual: (B, H, V, D), added to the visual rows of the heads in `adds`; those of other heads are not read.
        adds: the heads that a residual is added to.
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

    def of_heads(self, heads: Sequence[int]) -> "Call":
        """The call for some of the heads, without residuals."""
        index = head_index(tuple(heads), self.q.device)
        q, k, v = self.q[:, index], self.k[:, index], self.v[:, index]
        mask = None if self.mask is None else masks.part(self.mask, 1, index)
        policies = tuple(self.policies[head] for head in heads)
        return Call(q, k, v, self.tokens, policies, self.scale, mask)


Kernel = Callable[[Call], Tensor]
"""Computes a call: (B, H, N, D), in the dtype of `q`. Residuals are added by the kernels in `dispatch.ADD_RESIDUALS` alone."""
