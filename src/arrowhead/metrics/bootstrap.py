"""Intervals around figures that are functions of means over images, by drawing images again (Efron's percentile bootstrap)."""

from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
WEIGHTS_AT_ONCE = 2**22


def resampled_means(values: Tensor, resamples: int = RESAMPLES, seed: int = SEED) -> Tensor:
    """Means of as many rows of values (n, d), drawn with repetition: (resamples, d) in float64.

    Values of equal length are drawn the same rows for one seed.
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
    """The range that holds the middle share `level` of resampled figures (resamples,); infinite ones sort like others."""
    ordered, tail = figures.double().sort().values, (1 - level) / 2 * (len(figures) - 1) + 1e-9  # 0.05 × 100 may be less than 5
    return ordered[int(tail)].item(), ordered[-1 - int(tail)].item()


def jackknife_error(without: Tensor) -> float:
    """Standard error of a figure, from what it is without each of (groups,) equal parts of the data."""
    return (without.var(correction=0) * (len(without) - 1)).sqrt().item()


def bootstrap(values: Tensor, of: Callable[[Tensor], Tensor] = lambda means: means[..., 0]) -> tuple[float, float]:
    """Interval of `of`, a function of means (…, d) that gives (…,), from values (n, d)."""
    return interval(of(resampled_means(values)))


__all__ = ["LEVEL", "RESAMPLES", "SEED", "bootstrap", "interval", "jackknife_error", "resampled_means"]
