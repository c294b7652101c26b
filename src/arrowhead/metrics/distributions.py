"""Distances between sets of images, and their diversity, computed from a network's features. All in float64.

Fréchet distance: Heusel et al., arXiv:1706.08500. Kernel distance: Bińkowski et al., arXiv:1801.01401. Inception score:
Salimans et al., arXiv:1606.03498.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

AT_ONCE = 4096
"""Rows of features that are converted to float64 at a time, to bound memory."""


@dataclass(frozen=True)
class Moments:
    """The number of features, their mean (d,) and their unbiased covariance (d, d)."""

    count: int
    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """The moments of features (n, d); n is at least 2."""
    mean = torch.stack([part.double().sum(0) for part in features.split(AT_ONCE)]).sum(0) / len(features)  # type: ignore[no-untyped-call]
    squares = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in features.split(AT_ONCE):  # type: ignore[no-untyped-call]
        centred = part.double() - mean
        squares += centred.T @ centred
    return Moments(len(features), mean, squares / (len(features) - 1))


def root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance (d, d)."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(made: Moments, real: Moments, real_root: Tensor | None = None) -> float:
    """The Fréchet distance between two normal distributions. `real_root` is `root(real.covariance)`, if it is known already.

    The trace of √(Σ Σ') equals that of √(√Σ' Σ √Σ'). The second matrix is symmetric, so its eigenvalues are real.
    """
    half = root(real.covariance) if real_root is None else real_root
    cross = torch.linalg.eigvalsh(half @ made.covariance @ half).clamp(min=0).sqrt().sum()
    apart = (made.mean - real.mean).square().sum()
    return float(apart + made.covariance.trace() + real.covariance.trace() - 2 * cross)


def moments_without_each(features: Tensor, groups: Tensor) -> Iterator[Moments]:
    """Moments of features (n, d) with one group left out, for each group in turn. `groups` (n,) numbers them from 0."""
    whole = moments(features)
    for group in range(int(groups.max()) + 1):
        left_out = features[groups == group].double() - whole.mean
        count = whole.count - len(left_out)
        shift = -left_out.sum(0) / count  # of the mean
        squares = whole.covariance * (whole.count - 1) - left_out.T @ left_out - count * shift.outer(shift)
        yield Moments(count, whole.mean + shift, squares / (count - 1))


def kernel_distances(made: Tensor, real: Tensor, subsets: int, size: int, seed: int = 0) -> Tensor:
    """Unbiased MMD² with the kernel (x·y / d + 1)³ between random subsets of features (n, d) and (m, d): (subsets,).

    A subset has `size` rows of each, drawn without repetition. For one seed, the same rows are drawn of all sets of one length.
    """
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(subsets):
        a, b = (f[torch.randperm(len(f), generator=generator)[:size]].double() for f in (made, real))
        distances.append(poly_mmd(b, a))
    return torch.stack(distances)


def inception_score_of_means(means: Tensor) -> Tensor:
    """The inception score (…,) from means over images of `inception_score_terms`, (…, classes + 1)."""
    marginal, conditional = means[..., :-1], means[..., -1]
    return (conditional - torch.special.xlogy(marginal, marginal).sum(-1)).exp()


def inception_score_terms(logits: Tensor) -> Tensor:
    """For each image the class probabilities and Σ p log p: (n, classes + 1) from logits (n, classes).

    The inception score is a function of their means over images, so they can be resampled.
    """
    log = logits.double().log_softmax(-1)
    return torch.cat([log.exp(), (log.exp() * log).sum(-1, keepdim=True)], -1)
