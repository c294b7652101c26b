"""Figures of many images, with confidence intervals, computed from the values that are stored for each image."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from arrowhead.evaluation.measures import Measure
from arrowhead.metrics.bootstrap import LEVEL, SEED, bootstrap, interval, jackknife_error, resampled_means
from arrowhead.metrics.distributions import (
    Moments,
    frechet,
    inception_score_of_means,
    inception_score_terms,
    kernel_distances,
    moments,
    moments_without_each,
    root,
)
from arrowhead.metrics.images import decibels

SUBSETS, SUBSET_SIZE = 100, 1000
"""How many subsets the kernel distance is averaged over, and images in each; the usual numbers (torch-fidelity)."""
GROUPS = 10
"""Groups of images for the jackknife interval of FID: each group is left out once."""
SPLIT = 5000
"""Images in one split of the inception score; the usual ten splits of 50,000 images."""


@dataclass(frozen=True)
class Estimate:
    """One figure of a setting, with its uncertainty.

    `interval` is the figure's confidence interval, from images resampled with replacement. `change` is the interval of its
    difference to the untouched pipeline's figure, resampled in pairs. `deviation` is the standard deviation of a kernel
    distance over its subsets. `without` are FIDs with one of `GROUPS` groups of images left out, the same groups in all
    settings: FID is biased upwards when images repeat, as in a bootstrap, so its intervals come from the jackknife.
    """

    value: float
    interval: tuple[float, float] | None = None
    change: tuple[float, float] | None = None
    deviation: float | None = None
    without: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Reference:
    """Features of the real images: moments, the square root of the covariance, and the features (n, d) if they are known."""

    moments: Moments
    root: Tensor
    features: Tensor | None

    @classmethod
    def of(cls, given: Moments | Tensor) -> "Reference":
        """Build a reference from precomputed moments, or from features (n, d)."""
        found = given if isinstance(given, Moments) else moments(given)
        return cls(found, root(found.covariance), None if isinstance(given, Moments) else given)


def image_estimates(measure: Measure, values: Tensor, raw: Tensor | None, frames: int) -> dict[str, Estimate]:
    """The mean of a measure over images, by name, with its intervals.

    `values` are (images · frames, 1). `raw` are the untouched pipeline's values in the same shape, or None where there is
    nothing to compare: for the untouched pipeline itself, and for a paired measure.
    """
    own, theirs = per_image(values, frames), None if raw is None else per_image(raw, frames)
    if measure.name == "psnr":
        return {"psnr": Estimate(decibels(own.mean()).item(), bootstrap(own, lambda means: decibels(means[..., 0])))}
    change = None if theirs is None else bootstrap(own - theirs)
    return {measure.name: Estimate(own.mean().item(), bootstrap(own), change)}


def distribution_estimates(
    measure: Measure, values: Tensor, real: Reference | None, raw: Estimate | None, frames: int
) -> dict[str, Estimate]:
    """FID and KID if there are real images or their moments, and IS if the network gives logits, by name.

    `values` are (images · frames, features + logits). `raw` is the FID of the untouched pipeline.
    """
    features, found = values[:, : measure.features], {}
    if real is not None:
        found["fid"] = frechet_distance(features, real, raw, frames)
        if real.features is not None:
            size = subset_size(len(features), len(real.features))
            distances = kernel_distances(features, real.features, SUBSETS, size)
            found["kid"] = Estimate(distances.mean().item(), deviation=distances.std(correction=0).item())
    if measure.logits:
        found["is"] = inception_score(values[:, measure.features :])
    return found


def frechet_distance(features: Tensor, real: Reference, raw: Estimate | None, frames: int) -> Estimate:
    """FID of features (images · frames, d), with intervals if the covariance has full rank without any one group."""
    value = frechet(moments(features), real.moments, real.root)
    images = len(features) // frames
    if len(features) * (GROUPS - 1) // GROUPS <= features.shape[1] or images < 2 * GROUPS:
        return Estimate(value)
    # shuffled, because the inputs repeat in a fixed order
    order = torch.randperm(images, generator=torch.Generator().manual_seed(SEED))
    groups = (order % GROUPS).repeat_interleave(frames)
    parts = moments_without_each(features, groups)
    without = torch.tensor([frechet(part, real.moments, real.root) for part in parts])
    change = None
    if raw is not None and raw.without is not None:
        change = _normal_interval(value - raw.value, jackknife_error(without - torch.tensor(raw.without)))
    return Estimate(value, _normal_interval(value, jackknife_error(without)), change, without=tuple(without.tolist()))


def _normal_interval(value: float, error: float) -> tuple[float, float]:
    """The interval of a normally distributed estimate with this standard error."""
    half = error * NormalDist().inv_cdf((1 + LEVEL) / 2)
    return value - half, value + half


def subset_size(made: int, real: int) -> int:
    """Images in a subset of the kernel distance: the usual number, or half of the images if there are few.

    Subsets of all images would be equal, and their deviation 0.
    """
    return min(SUBSET_SIZE, max(2, min(made, real) // 2))


def inception_score(logits: Tensor) -> Estimate:
    """The inception score of logits (n, classes): the mean over splits of `SPLIT` images, resampled within each split."""
    splits = max(1, round(len(logits) / SPLIT))
    parts = [inception_score_terms(part) for part in logits.tensor_split(splits)]
    drawn = torch.stack([inception_score_of_means(resampled_means(part)) for part in parts]).mean(0)
    value = torch.stack([inception_score_of_means(part.mean(0)) for part in parts]).mean()
    return Estimate(value.item(), interval(drawn))


def per_image(values: Tensor, frames: int) -> Tensor:
    """One value for each image, (images, 1) in float64, from values (images · frames, 1).

    A video gets the mean over its frames, because its frames are not independent samples.
    """
    return values.double().reshape(-1, frames).mean(1, keepdim=True)


def as_dict(found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates for JSON: values by name, then their intervals and deviations. Infinite values become None."""
    about: dict[str, dict[str, Any]] = {
        "intervals": {name: _pair(one.interval) for name, one in found.items() if one.interval},
        "changes_from_raw": {name: _pair(one.change) for name, one in found.items() if one.change},
        "deviations": {name: one.deviation for name, one in found.items() if one.deviation is not None},
    }
    return {name: _finite(one.value) for name, one in found.items()} | {key: part for key, part in about.items() if part}


def _pair(bounds: tuple[float, float] | None) -> list[float | None]:
    return [_finite(bound) for bound in bounds or ()]


def _finite(value: float) -> float | None:
    return value if torch.tensor(value).isfinite() else None
