"""From values that are kept to figures: one of each kind, its interval, and how far it is from the untouched pipeline's."""

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
    kernel_distances,
    moments,
    root,
    score_of,
    score_terms,
    without_each,
)
from arrowhead.metrics.images import decibels

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the kernel distance, as usual."""
GROUPS = 10
"""Of images, each of which is left out once for FID's interval."""
SPLIT = 5000
"""Images that the inception score is taken over at once: ten splits of 50,000, as usual."""


@dataclass(frozen=True)
class Figure:
    """A value, the interval that images drawn again give it, and the interval of its difference to raw, drawn in pairs.

    `deviation` is the kernel distance's over its subsets. `without` are FIDs without each of `GROUPS` groups of images, the
    same for all settings: images drawn twice make FID larger, so its intervals are the jackknife's.
    """

    value: float
    interval: tuple[float, float] | None = None
    change: tuple[float, float] | None = None
    deviation: float | None = None
    without: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Reference:
    """Real images' moments, the root of their covariance, and their features, (n, d), where those are known."""

    moments: Moments
    root: Tensor
    features: Tensor | None

    @classmethod
    def of(cls, given: Moments | Tensor) -> "Reference":
        """From statistics, or from features."""
        found = given if isinstance(given, Moments) else moments(given)
        return cls(found, root(found.covariance), None if isinstance(given, Moments) else given)


def figures(measure: Measure, values: Tensor, raw: Tensor | None, frames: int) -> dict[str, Figure]:
    """Of values (images · frames, 1) and those of the raw images, None for these themselves, or of a measure that is paired."""
    own, theirs = per_image(values, frames), None if raw is None else per_image(raw, frames)
    if measure.name == "psnr":
        return {"psnr": Figure(decibels(own.mean()).item(), bootstrap(own, lambda means: decibels(means[..., 0])))}
    change = None if theirs is None else bootstrap(own - theirs)
    return {measure.name: Figure(own.mean().item(), bootstrap(own), change)}


def distributions(
    measure: Measure, values: Tensor, real: Reference | None, raw: Figure | None, frames: int
) -> dict[str, Figure]:
    """FID and KID where there is something to compare with, IS where there are logits; `raw` is the raw images' FID."""
    features, found = values[:, : measure.features], {}
    if real is not None:
        found["fid"] = frechet_distance(features, real, raw, frames)
        if real.features is not None:
            size = subset_size(len(features), len(real.features))
            distances = kernel_distances(features, real.features, SUBSETS, size)
            found["kid"] = Figure(distances.mean().item(), deviation=distances.std(correction=0).item())
    if measure.logits:
        found["is"] = inception_score(values[:, measure.features :])
    return found


def frechet_distance(features: Tensor, real: Reference, raw: Figure | None, frames: int) -> Figure:
    """FID, with intervals where there are enough images for a covariance without any group."""
    value = frechet(moments(features), real.moments, real.root)
    images = len(features) // frames
    if len(features) * (GROUPS - 1) // GROUPS <= features.shape[1] or images < 2 * GROUPS:
        return Figure(value)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(SEED))  # since inputs come in turn
    groups = (order % GROUPS).repeat_interleave(frames)
    without = torch.tensor([frechet(made, real.moments, real.root) for made in without_each(features, groups)])
    change = None
    if raw is not None and raw.without is not None:
        change = _around(value - raw.value, jackknife_error(without - torch.tensor(raw.without)))
    return Figure(value, _around(value, jackknife_error(without)), change, without=tuple(without.tolist()))


def _around(value: float, error: float) -> tuple[float, float]:
    """The normal distribution's interval."""
    reach = error * NormalDist().inv_cdf((1 + LEVEL) / 2)
    return value - reach, value + reach


def subset_size(made: int, real: int) -> int:
    """As usual, or half of the images where there are few: subsets that were all of them would not differ."""
    return min(SUBSET_SIZE, max(2, min(made, real) // 2))


def inception_score(logits: Tensor) -> Figure:
    """The mean over splits of `SPLIT` images, and its interval, drawn within each."""
    splits = max(1, round(len(logits) / SPLIT))
    parts = [score_terms(part) for part in logits.tensor_split(splits)]
    drawn = torch.stack([score_of(resampled_means(part)) for part in parts]).mean(0)
    return Figure(torch.stack([score_of(part.mean(0)) for part in parts]).mean().item(), interval(drawn))


def per_image(values: Tensor, frames: int) -> Tensor:
    """(images, 1) in float64 of (images · frames, 1): a video has the mean of its frames, since they are not independent."""
    return values.double().reshape(-1, frames).mean(1, keepdim=True)


def as_dict(found: Mapping[str, Figure]) -> dict[str, Any]:
    """For JSON: values by name, then what is known about them; what is infinite becomes None."""
    about: dict[str, dict[str, Any]] = {
        "intervals": {name: _pair(figure.interval) for name, figure in found.items() if figure.interval},
        "changes_from_raw": {name: _pair(figure.change) for name, figure in found.items() if figure.change},
        "deviations": {name: figure.deviation for name, figure in found.items() if figure.deviation is not None},
    }
    return {name: _finite(figure.value) for name, figure in found.items()} | {key: kept for key, kept in about.items() if kept}


def _pair(bounds: tuple[float, float] | None) -> list[float | None]:
    return [_finite(bound) for bound in bounds or ()]


def _finite(value: float) -> float | None:
    return value if torch.tensor(value).isfinite() else None
