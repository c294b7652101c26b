"""How much a change of a site's output changes the guided output, measured without gradients: by trials of single sites."""

import math

import torch
from torch import Tensor

LEAST = 4
"""Trials in each step: a pass has one for each image."""
BETWEEN_STEPS, BETWEEN_SITES = 1.0, 0.1
"""In the fit, the weights of differences between two steps, and between a site and all sites; that of a trial's misfit is 1."""


class SiteProbes:
    """Trials of single sites, and the weights that fit them: log w = a_step + b_site, where a changes slowly with the steps.

    A weight is the relative change of the guided output over the relative change of the site's output.
    """

    def __init__(self, sites: int) -> None:
        self._sites = sites
        self._draw = torch.Generator().manual_seed(0)
        self._trials: list[tuple[int, int, float]] = []  # step, site, log of the weight

    def chosen(self, count: int) -> list[int]:
        """The sites to try next, in another random order each time, so that the fit can tell steps from sites."""
        rounds = -(-count // self._sites)
        drawn = torch.cat([torch.randperm(self._sites, generator=self._draw) for _ in range(rounds)])
        return [int(site) for site in drawn[:count]]

    def note(self, step: int, site: int, weight: float) -> None:
        """Note a trial's weight; a weight of 0, or one that is not finite, is left out."""
        if 0 < weight < math.inf:
            self._trials.append((step, site, math.log(weight)))

    def fitted(self, steps: int) -> Tensor:
        """The weight of every site in every step, (S, sites), float64; 1 where there was no trial at all."""
        rows: list[tuple[dict[int, float], float]] = []
        mean = sum(value for *_, value in self._trials) / max(len(self._trials), 1)
        for step, site, value in self._trials:
            rows.append(({step: 1.0, steps + site: 1.0}, value - mean))
        rows += [({step: BETWEEN_STEPS, step + 1: -BETWEEN_STEPS}, 0.0) for step in range(steps - 1)]
        rows += [({unknown: BETWEEN_SITES}, 0.0) for unknown in range(steps + self._sites)]
        matrix = torch.zeros(len(rows), steps + self._sites, dtype=torch.float64)
        for row, (entries, _) in enumerate(rows):
            for column, entry in entries.items():
                matrix[row, column] = entry
        found = torch.linalg.lstsq(matrix, torch.tensor([[value] for _, value in rows], dtype=torch.float64)).solution[:, 0]
        return (mean + found[:steps, None] + found[None, steps:]).exp()
