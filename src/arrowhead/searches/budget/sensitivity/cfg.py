"""Classifier-free guidance: how the branches of a transformer's output make the guided output that a sampler steps with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead.plans.layout import Branches


@dataclass(frozen=True)
class Guidance:
    """The guided output u + scale · (c − u) of a batch that holds the branches c and u as `branches` says; c without guidance.

    Of an output (B, C, …) only the first `channels` count, where they are given: the others, such as a variance, are no part of
    the sampler's direction.
    """

    branches: Branches
    scale: float
    channels: int | None

    def halves(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """The conditional branch's rows of a batch (B, …), and those of the unconditional branch, where there is one."""
        rows = self.branches.conditional(len(batch))
        if not self.branches.batched:
            return batch[rows], None
        half = len(batch) // 2
        return batch[rows], batch[half:] if rows.start == 0 else batch[:half]

    def guided(self, outputs: Sequence[Tensor]) -> Tensor:
        """The guided output (images, C, …) of the outputs (B, C, …) of a step's calls."""
        conditional, other = self.halves(self.latent(torch.cat(tuple(outputs))))
        return conditional if other is None else other + self.scale * (conditional - other)

    def cotangents(self, outputs: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
        """The gradients of vector·guided(outputs) with respect to each of the outputs (B, C, …)."""
        whole = torch.zeros_like(torch.cat(tuple(outputs)))
        conditional, other = self.halves(self.latent(whole))
        conditional += vector if other is None else self.scale * vector
        if other is not None:
            other += (1 - self.scale) * vector
        return list(whole.chunk(len(outputs)))

    def latent(self, whole: Tensor) -> Tensor:
        """The channels of a batch (B, C, …) that count."""
        return whole if self.channels is None else whole[:, : self.channels]
