"""One evaluation: what decides its images, the stored values of each measure for each batch, and the table of results."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from arrowhead.errors import InputsInvalid, TooFewSamples
from arrowhead.evaluation.estimates import (
    GROUPS,
    SPLIT,
    SUBSETS,
    Estimate,
    Reference,
    distribution_estimates,
    image_estimates,
    subset_size,
)
from arrowhead.evaluation.measures import Batch, Measure
from arrowhead.evaluation.networks import fingerprint
from arrowhead.evaluation.peak_memory import DESCRIPTIONS
from arrowhead.evaluation.real_images import RealImages
from arrowhead.evaluation.request import Request, Shard, digest
from arrowhead.evaluation.results import Cost, Results, Row
from arrowhead.evaluation.work_folder import SettingFolder, load_array, store_array
from arrowhead.metrics.bootstrap import LEVEL, RESAMPLES, SEED
from arrowhead.metrics.distributions import Moments
from arrowhead.models.find import find
from arrowhead.models.model import target_of, transformers_of
from arrowhead.plans.plan import Plan
from arrowhead.versions import versions

POLL_SECONDS = 0.5
"""Seconds between two looks at the folder, while the first process waits for the others."""


@dataclass(frozen=True)
class MeasurementRun:
    """What one call of `measure` works with."""

    pipe: Any
    request: Request
    measures: Sequence[Measure]
    real: RealImages | Moments | None
    work: Path
    plans: Mapping[str, Plan]
    progress: bool

    @property
    def raw(self) -> SettingFolder:
        """The untouched pipeline's folder."""
        return SettingFolder.of(self.work, "raw", None)

    @property
    def settings(self) -> list[SettingFolder]:
        """The folder of the untouched pipeline, then one for each plan."""
        return [self.raw, *(SettingFolder.of(self.work, name, plan) for name, plan in self.plans.items())]

    def about(self) -> dict[str, Any]:
        """What decides the images, for JSON: model, inputs, seeds, device, dtype and versions."""
        transformer, *_ = transformers_of(self.pipe)
        target = target_of(find(self.pipe))
        parts = getattr(self.pipe, "components", {})
        weights = {name: fingerprint(part) for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}
        model = {
            "pipeline": type(self.pipe).__name__,
            "transformer": target.transformer,
            "weights": weights,
            "scheduler": target.scheduler,
            "scheduler_config": digest(target.scheduler_config),
        }
        device = transformer.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"model": model, **self.request.about(), "device": kind, "dtype": str(transformer.dtype), "versions": versions()}

    def try_measures(self, images: range, pixels: Tensor) -> None:
        """Try every measure on one batch, uint8 (n · frames, 3, H, W), and check that there are enough images.

        Raises:
            InputsInvalid: a measure fails, or there are too few images for FID and KID.

        Warns:
            TooFewSamples: the covariance of the features will not have full rank.
        """
        frames = len(pixels) // len(images)
        for measure in self.measures:
            measure.values(self._batch(images, pixels, pixels, frames))
            if measure.features:
                self._require_enough(measure.features, self.request.images * frames)

    def require_matching_statistics(self) -> None:
        """Check that precomputed moments have as many features as the network gives.

        Raises:
            InputsInvalid: they have another number.
        """
        for measure in self.measures:
            if measure.features and isinstance(self.real, Moments) and len(self.real.mean) != measure.features:
                raise InputsInvalid(
                    f"the real images' statistics have {len(self.real.mean)} features, the network gives {measure.features}; "
                    "wanted those of this network, with its resize mode"
                )

    def _require_enough(self, features: int, count: int) -> None:
        counts = {"generated": count}
        if isinstance(self.real, RealImages):
            counts["real"] = self.real.count
        if self.real is not None and min(counts.values()) < 2:
            raise InputsInvalid(f"got {counts} images, wanted 2 at least of each for FID and KID; ask for more")
        few = {kind: number for kind, number in counts.items() if number <= features}
        if self.real is not None and few:
            warnings.warn(
                f"got {', '.join(f'{number} {kind}' for kind, number in few.items())} images, wanted more than {features} for "
                f"a covariance of {features} features: FID is far too large then, and comparable only for equal numbers of "
                "images; ask for more images, or use KID",
                TooFewSamples,
                stacklevel=4,
            )

    def _batch(self, images: range, pixels: Tensor, raw: Tensor | None, frames: int) -> Batch:
        each = [image for image in images for _ in range(frames)]
        rows = self.request.rows
        return Batch(
            pixels,
            raw,
            self.request.row("prompt", each) if "prompt" in rows else None,
            self.request.row("class_labels", each) if "class_labels" in rows else None,
        )

    def _measures_of(self, setting: SettingFolder) -> list[Measure]:
        """All measures, or for the untouched pipeline those that are not paired."""
        return [measure for measure in self.measures if not measure.paired or setting.plan is not None]

    def measure_images(self, shard: Shard) -> None:
        """Compute and store the missing values of this process's generated images."""
        for images in tqdm(shard.share(self.request.batches), desc="measure", unit="batch", disable=not self.progress):
            raw: Tensor | None = None
            for setting in self.settings:
                todo = [m for m in self._measures_of(setting) if not setting.value_path(m.key, images).exists()]
                if not todo:
                    continue
                pixels = setting.pixels(images)
                if raw is None and any(measure.paired for measure in todo):
                    raw = self.raw.pixels(images)
                batch = self._batch(images, pixels, raw, len(pixels) // len(images))
                for measure in todo:
                    store_array(setting.value_path(measure.key, images), measure.values(batch))

    @property
    def _feature_measures(self) -> list[Measure]:
        """The measures whose values are computed of real images, too; none if there are only precomputed moments."""
        return [m for m in self.measures if m.features] if isinstance(self.real, RealImages) else []

    def _real_path(self, measure: Measure, images: range) -> Path:
        assert isinstance(self.real, RealImages)
        return SettingFolder("real", None, self.work / f"real-{self.real.key}").value_path(measure.key, images)

    def measure_real_images(self, shard: Shard) -> None:
        """Compute and store the missing features of this process's real images, one by one if their sizes differ."""
        if not isinstance(self.real, RealImages):
            return
        for measure in self._feature_measures:
            for images in tqdm(shard.share(self.real.batches), desc="real images", unit="batch", disable=not self.progress):
                path = self._real_path(measure, images)
                if not path.exists():
                    pixels = [self.real.read(i) for i in images]
                    one_size = len({picture.shape for picture in pixels}) == 1
                    groups = [torch.stack(pixels)] if one_size else [picture[None] for picture in pixels]
                    store_array(path, torch.cat([measure.values(Batch(group)) for group in groups]))

    def wait(self) -> None:
        """Wait until the other processes have stored everything that the table needs."""
        left = [*self._required_paths()]
        with tqdm(total=len(left), desc="wait for the others", unit="file", disable=not self.progress) as bar:
            while left:
                still = [path for path in left if not path.exists()]
                bar.update(len(left) - len(still))
                left = still
                time.sleep(POLL_SECONDS if left else 0)

    def _required_paths(self) -> Iterator[Path]:
        """The files that the table is computed from."""
        for measure in self._feature_measures:
            assert isinstance(self.real, RealImages)
            yield from (self._real_path(measure, images) for images in self.real.batches)
        for setting in self.settings:
            for images in self.request.batches:
                yield setting.record_path(images)
                yield from (setting.value_path(measure.key, images) for measure in self._measures_of(setting))

    def results(self, not_measured: Mapping[str, str]) -> Results:
        """Compute the table from the stored values. `not_measured` gives a reason for each measure that is missing."""
        batches, raw = self.request.batches, self.raw
        frames = raw.record(batches[0])["frames"]
        references: dict[str, Reference] = {}
        for m in self.measures:
            if m.features and isinstance(self.real, Moments):
                references[m.key] = Reference.of(self.real)
            elif m.features and isinstance(self.real, RealImages):
                values = torch.cat([torch.from_numpy(load_array(self._real_path(m, images))) for images in self.real.batches])
                references[m.key] = Reference.of(values[:, : m.features])
        rows: list[Row] = []
        for setting in self.settings:
            found: dict[str, Estimate] = {}
            for m in self._measures_of(setting):
                values = setting.values(m.key, batches)
                if m.features:
                    untouched = rows[0].estimates.get("fid") if rows else None
                    found |= distribution_estimates(m, values, references.get(m.key), untouched, frames)
                else:
                    theirs = None if m.paired or setting.plan is None else raw.values(m.key, batches)
                    found |= image_estimates(m, values, theirs, frames)
            rows.append(Row(setting.name, setting.plan, Cost.of(setting, raw, batches), found))
        unknown = {}
        if any(row.cost.peak_memory_bytes is None for row in rows):
            unknown["peak memory"] = "this system does not report it"
        if unpaired := [row.name for row in rows if row.cost.time_ratio is None]:
            unknown[f"time of {', '.join(unpaired)}"] = "generated in another run than raw's; start with an empty work folder"
        return Results(rows[0], tuple(rows[1:]), self.request.images, self._setting(frames), {**not_measured, **unknown})

    def _setting(self, frames: int) -> dict[str, Any]:
        """How the results were measured, for readers of the table."""
        request, transformer = self.request, transformers_of(self.pipe)[0]
        compared = {}
        if isinstance(self.real, RealImages):
            size = subset_size(request.images * frames, self.real.count)
            compared = {"real": self.real.about, "kid_subsets": f"{SUBSETS} subsets of {size}"}
        if isinstance(self.real, Moments):
            compared = {"real": f"statistics of {self.real.count or 'an unknown number of'} images"}
        return {
            **self.about(),
            "seeds": {"first": request.seed, "last": request.seed + request.images - 1},
            "frames": frames,
            "baseline": "the untouched pipeline, each batch in turn with the plans",
            "measures": {measure.name: measure.about for measure in self.measures if measure.about},
            **compared,
            "is_splits_of": SPLIT,
            "fid_intervals": f"jackknife over {GROUPS} groups",
            "intervals": {
                "level": LEVEL,
                "resamples": RESAMPLES,
                "seed": SEED,
                "of": "images drawn again, in pairs with raw's",
            },
            "peak_memory": DESCRIPTIONS.get(transformer.device.type, "unknown"),
        }
