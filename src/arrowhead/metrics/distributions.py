"""How far many images are from many others, and how varied they are, from a network's features of them.

All in float64. Fréchet distance: Heusel et al., arXiv:1706.08500. Kernel distance: Bińkowski et al., arXiv:1801.01401.
Inception score: Salimans et al., arXiv:1606.03498.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

AT_ONCE = 4096
"""Rows of features that are float64 at a time."""


@dataclass(frozen=True)
class Moments:
    """How many features there were, their mean (d,) and their unbiased covariance (d, d)."""

    count: int
    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """Of features (n, d), two at least."""
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
    """Fréchet distance of two normal distributions; `real_root` is the real covariance's root, where it is known already.

    The trace of √(Σ Σ') is that of √(√Σ' Σ √Σ'), which is symmetric: no square root of a matrix that has none is taken.
    """
    half = root(real.covariance) if real_root is None else real_root
    cross = torch.linalg.eigvalsh(half @ made.covariance @ half).clamp(min=0).sqrt().sum()
    apart = (made.mean - real.mean).square().sum()
    return float(apart + made.covariance.trace() + real.covariance.trace() - 2 * cross)


def without_each(features: Tensor, groups: Tensor) -> Iterator[Moments]:
    """Moments of features (n, d) with one group left out, for each in turn; `groups` (n,) numbers them from 0."""
    whole = moments(features)
    for group in range(int(groups.max()) + 1):
        left_out = features[groups == group].double() - whole.mean
        count = whole.count - len(left_out)
        shift = -left_out.sum(0) / count  # of the mean
        squares = whole.covariance * (whole.count - 1) - left_out.T @ left_out - count * shift.outer(shift)
        yield Moments(count, whole.mean + shift, squares / (count - 1))


def kernel_distances(made: Tensor, real: Tensor, subsets: int, size: int, seed: int = 0) -> Tensor:
    """Unbiased MMD² with the kernel (x·y / d + 1)³ of so many random subsets of features (n, d) and (m, d): (subsets,).

    Subsets have `size` of each, drawn without repetition; sets of equal length are drawn the same places for one seed.
    """
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(subsets):
        a, b = (f[torch.randperm(len(f), generator=generator)[:size]].double() for f in (made, real))
        distances.append(poly_mmd(b, a))
    return torch.stack(distances)


def score_of(terms: Tensor) -> Tensor:
    """Inception score of means of `score_terms`, (…, classes + 1): (…,)."""
    marginal, conditional = terms[..., :-1], terms[..., -1]
    return (conditional - torch.special.xlogy(marginal, marginal).sum(-1)).exp()


def score_terms(logits: Tensor) -> Tensor:
    """What the inception score is a function of the means of: probabilities and Σ p log p, (n, classes + 1) of (n, classes)."""
    log = logits.double().log_softmax(-1)
    return torch.cat([log.exp(), (log.exp() * log).sum(-1, keepdim=True)], -1)
