"""How much of a site's change reaches the output, without gradients: tried site by site, and fitted."""

import math

import torch
from torch import Tensor

LEAST = 4
"""Trials in each step: a pass has one for each image."""
STEADY, SMALL = 1.0, 0.1
"""What a difference between two steps, and one of a site from all sites, costs beside a trial's misfit, all squared."""


class SiteProbes:
    """Trials of single sites, and the weights that fit them: log w = a_step + b_site, a changing slowly with the steps.

    A weight is the relative change of the guided output over that of what the site gave.
    """

    def __init__(self, sites: int) -> None:
        self._sites = sites
        self._draw = torch.Generator().manual_seed(0)
        self._trials: list[tuple[int, int, float]] = []  # step, site, log of the weight

    def chosen(self, count: int) -> list[int]:
        """Sites to try next, in an order of their own each time, so that steps can be told from sites."""
        rounds = -(-count // self._sites)
        drawn = torch.cat([torch.randperm(self._sites, generator=self._draw) for _ in range(rounds)])
        return [int(site) for site in drawn[:count]]

    def note(self, step: int, site: int, weight: float) -> None:
        """A trial's outcome; one of 0, or not finite, says nothing."""
        if 0 < weight < math.inf:
            self._trials.append((step, site, math.log(weight)))

    def fitted(self, steps: int) -> Tensor:
        """The weight of every site in every step, (S, sites), float64; 1 where nothing was learnt at all."""
        rows: list[tuple[dict[int, float], float]] = []
        mean = sum(value for *_, value in self._trials) / max(len(self._trials), 1)
        for step, site, value in self._trials:
            rows.append(({step: 1.0, steps + site: 1.0}, value - mean))
        rows += [({step: STEADY, step + 1: -STEADY}, 0.0) for step in range(steps - 1)]
        rows += [({unknown: SMALL}, 0.0) for unknown in range(steps + self._sites)]
        matrix = torch.zeros(len(rows), steps + self._sites, dtype=torch.float64)
        for row, (entries, _) in enumerate(rows):
            for column, entry in entries.items():
                matrix[row, column] = entry
        found = torch.linalg.lstsq(matrix, torch.tensor([[value] for _, value in rows], dtype=torch.float64)).solution[:, 0]
        return (mean + found[:steps, None] + found[None, steps:]).exp()
