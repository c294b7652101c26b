"""Confidence intervals of functions of means over images, by Efron's percentile bootstrap, and the jackknife error."""

from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
WEIGHTS_AT_ONCE = 2**22
"""Counts of (resamples, rows) that are in memory at once."""


def resampled_means(values: Tensor, resamples: int = RESAMPLES, seed: int = SEED) -> Tensor:
    """Means of values (n, d) over n rows drawn with replacement, for each resample: (resamples, d) in float64.

    For one seed, the same rows are drawn of all values of one length, so differences can be resampled in pairs.
    """
    generator, count = torch.Generator().manual_seed(seed), len(values)
    at_once, means = max(1, WEIGHTS_AT_ONCE // count), []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = torch.randint(count, (rows, count), generator=generator)
        times = torch.zeros(rows, count, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        means.append(times @ values.double() / count)
    return torch.cat(means)


def interval(figures: Tensor, level: float = LEVEL) -> tuple[float, float]:
    """The range that holds the middle share `level` of resampled figures (resamples,), which may be infinite."""
    ordered, tail = figures.double().sort().values, (1 - level) / 2 * (len(figures) - 1) + 1e-9  # 0.05 × 100 may be less than 5
    return ordered[int(tail)].item(), ordered[-1 - int(tail)].item()


def jackknife_error(without: Tensor) -> float:
    """The standard error of a figure, from its values (groups,) with one of equal parts of the data left out."""
    return (without.var(correction=0) * (len(without) - 1)).sqrt().item()


def bootstrap(values: Tensor, of: Callable[[Tensor], Tensor] = lambda means: means[..., 0]) -> tuple[float, float]:
    """The confidence interval of a function of means, (…, d) to (…,), from values (n, d)."""
    return interval(of(resampled_means(values)))


__all__ = ["LEVEL", "RESAMPLES", "SEED", "bootstrap", "interval", "jackknife_error", "resampled_means"]
