"""How the CFG branches of what a transformer gives make the output that a sampler goes by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead.plans.layout import Branches


@dataclass(frozen=True)
class Guidance:
    """Guided output u + scale · (c − u) of a batch that holds the branches c and u as `branches` says.

    Without guidance the output is c. Of (B, C, …) only the first `channels` count, where they are given: what a transformer
    gives beyond them, such as a variance, is no direction to go.
    """

    branches: Branches
    scale: float
    channels: int | None

    def halves(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """The conditional branch's rows of any batch, and the other's where there is one."""
        rows = self.branches.conditional(len(batch))
        if not self.branches.batched:
            return batch[rows], None
        half = len(batch) // 2
        return batch[rows], batch[half:] if rows.start == 0 else batch[:half]

    def guided(self, outputs: Sequence[Tensor]) -> Tensor:
        """Of what each of a step's calls gave."""
        conditional, other = self.halves(self._latent(torch.cat(tuple(outputs))))
        return conditional if other is None else other + self.scale * (conditional - other)

    def cotangents(self, outputs: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
        """The gradient of vector·guided(outputs) with respect to each of the outputs."""
        whole = torch.zeros_like(torch.cat(tuple(outputs)))
        conditional, other = self.halves(self._latent(whole))
        conditional += vector if other is None else self.scale * vector
        if other is not None:
            other += (1 - self.scale) * vector
        return list(whole.chunk(len(outputs)))

    def _latent(self, whole: Tensor) -> Tensor:
        return whole if self.channels is None else whole[:, : self.channels]
