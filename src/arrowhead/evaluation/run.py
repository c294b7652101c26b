"""One evaluation's work: what decides it, what each measure makes of each batch, and the table of all that is kept."""

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
from arrowhead.evaluation.figures import GROUPS, SPLIT, SUBSETS, Figure, Reference, distributions, figures, subset_size
from arrowhead.evaluation.measures import Batch, Measure
from arrowhead.evaluation.memory import SAID
from arrowhead.evaluation.networks import fingerprint
from arrowhead.evaluation.real_images import Pictures
from arrowhead.evaluation.request import Request, Shard, digest
from arrowhead.evaluation.table import Cost, Measured, Row
from arrowhead.evaluation.work_folder import WorkFolder, keep_array, load_array
from arrowhead.metrics.bootstrap import LEVEL, RESAMPLES, SEED
from arrowhead.metrics.distributions import Moments
from arrowhead.models.find import find
from arrowhead.models.model import target_of, transformers_of
from arrowhead.plans.plan import Plan
from arrowhead.versions import versions

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Run:
    """All that one call of `measure` works with."""

    pipe: Any
    asked: Request
    measures: Sequence[Measure]
    real: Pictures | Moments | None
    work: Path
    plans: Mapping[str, Plan]
    progress: bool

    @property
    def raw(self) -> WorkFolder:
        """The untouched pipeline's folder."""
        return WorkFolder.of(self.work, "raw", None)

    @property
    def settings(self) -> list[WorkFolder]:
        """That, and each plan's."""
        return [self.raw, *(WorkFolder.of(self.work, name, plan) for name, plan in self.plans.items())]

    def about(self) -> dict[str, Any]:
        """What decides the images: the model, the inputs, the seeds, where it runs, and with what versions."""
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
        return {"model": model, **self.asked.about(), "device": kind, "dtype": str(transformer.dtype), "versions": versions()}

    def try_measures(self, images: range, pixels: Tensor) -> None:
        """Every measure on a batch as it comes, (n · frames, 3, H, W), and whether there are enough images for it."""
        frames = len(pixels) // len(images)
        for measure in self.measures:
            measure.values(self._batch(images, pixels, pixels, frames))
            if measure.features:
                self._require_enough(measure.features, self.asked.images * frames)

    def require_statistics_of_the_network(self) -> None:
        """That statistics are of as many features.

        Raises:
            InputsInvalid: they are not.
        """
        for measure in self.measures:
            if measure.features and isinstance(self.real, Moments) and len(self.real.mean) != measure.features:
                raise InputsInvalid(
                    f"the real images' statistics have {len(self.real.mean)} features, the network gives {measure.features}; "
                    "wanted those of this network, with its resize mode"
                )

    def _require_enough(self, features: int, count: int) -> None:
        counts = {"generated": count}
        if isinstance(self.real, Pictures):
            counts["real"] = self.real.count
        if self.real is not None and min(counts.values()) < 2:
            raise InputsInvalid(f"got {counts} images, wanted 2 at least of each for FID and KID; ask for more")
        few = {kind: number for kind, number in counts.items() if number <= features}
        if self.real is not None and few:
            warnings.warn(
                f"got {', '.join(f'{number} {kind}' for kind, number in few.items())} images, wanted more than {features} for "
                f"a covariance of {features} features: FID is far too large then, and compares only between equal numbers; ask "
                "for more images, or look at KID",
                TooFewSamples,
                stacklevel=4,
            )

    def _batch(self, images: range, pixels: Tensor, raw: Tensor | None, frames: int) -> Batch:
        each = [image for image in images for _ in range(frames)]
        rows = self.asked.rows
        return Batch(
            pixels,
            raw,
            self.asked.row("prompt", each) if "prompt" in rows else None,
            self.asked.row("class_labels", each) if "class_labels" in rows else None,
        )

    def _wanted(self, kept: WorkFolder) -> list[Measure]:
        return [measure for measure in self.measures if not measure.paired or kept.plan is not None]

    def look(self, shard: Shard) -> None:
        """What the measures make of this process's images."""
        for images in tqdm(shard.of(self.asked.batches), desc="measure", unit="batch", disable=not self.progress):
            raw: Tensor | None = None
            for kept in self.settings:
                todo = [m for m in self._wanted(kept) if not kept.value_path(m.key, images).exists()]
                if not todo:
                    continue
                pixels = kept.pixels(images)
                if raw is None and any(measure.paired for measure in todo):
                    raw = self.raw.pixels(images)
                batch = self._batch(images, pixels, raw, len(pixels) // len(images))
                for measure in todo:
                    keep_array(kept.value_path(measure.key, images), measure.values(batch))

    @property
    def _compared(self) -> list[Measure]:
        """Measures that real images are looked at with."""
        return [m for m in self.measures if m.features] if isinstance(self.real, Pictures) else []

    def _real_path(self, measure: Measure, images: range) -> Path:
        assert isinstance(self.real, Pictures)
        return WorkFolder("real", None, self.work / f"real-{self.real.key}").value_path(measure.key, images)

    def look_at_real(self, shard: Shard) -> None:
        """The same of real images, one at a time where they differ in size."""
        if not isinstance(self.real, Pictures):
            return
        for measure in self._compared:
            for images in tqdm(shard.of(self.real.batches), desc="real images", unit="batch", disable=not self.progress):
                path = self._real_path(measure, images)
                if not path.exists():
                    pixels = [self.real.read(i) for i in images]
                    alike = len({picture.shape for picture in pixels}) == 1
                    groups = [torch.stack(pixels)] if alike else [picture[None] for picture in pixels]
                    keep_array(path, torch.cat([measure.values(Batch(group)) for group in groups]))

    def wait(self) -> None:
        """Until the other processes have made and measured all."""
        left = [*self._paths()]
        with tqdm(total=len(left), desc="wait for the others", unit="file", disable=not self.progress) as bar:
            while left:
                still = [path for path in left if not path.exists()]
                bar.update(len(left) - len(still))
                left = still
                time.sleep(POLL_SECONDS if left else 0)

    def _paths(self) -> Iterator[Path]:
        """All that a table is made of."""
        for measure in self._compared:
            assert isinstance(self.real, Pictures)
            yield from (self._real_path(measure, images) for images in self.real.batches)
        for kept in self.settings:
            for images in self.asked.batches:
                yield kept.record_path(images)
                yield from (kept.value_path(measure.key, images) for measure in self._wanted(kept))

    def merge(self, left_out: Mapping[str, str]) -> Measured:
        """The table, of all that is kept."""
        batches, raw = self.asked.batches, self.raw
        frames = raw.record(batches[0])["frames"]
        references: dict[str, Reference] = {}
        for m in self.measures:
            if m.features and isinstance(self.real, Moments):
                references[m.key] = Reference.of(self.real)
            elif m.features and isinstance(self.real, Pictures):
                values = torch.cat([torch.from_numpy(load_array(self._real_path(m, images))) for images in self.real.batches])
                references[m.key] = Reference.of(values[:, : m.features])
        rows: list[Row] = []
        for kept in self.settings:
            found: dict[str, Figure] = {}
            for m in self._wanted(kept):
                values = kept.values(m.key, batches)
                if m.features:
                    untouched = rows[0].figures.get("fid") if rows else None
                    found |= distributions(m, values, references.get(m.key), untouched, frames)
                else:
                    theirs = None if m.paired or kept.plan is None else raw.values(m.key, batches)
                    found |= figures(m, values, theirs, frames)
            rows.append(Row(kept.name, kept.plan, Cost.of(kept, raw, batches), found))
        unknown = {}
        if any(row.cost.peak_memory_bytes is None for row in rows):
            unknown["peak memory"] = "this system does not tell it"
        if unpaired := [row.name for row in rows if row.cost.time_ratio is None]:
            unknown[f"time of {', '.join(unpaired)}"] = "made in another run than raw's images; begin a work folder of its own"
        return Measured(rows[0], tuple(rows[1:]), self.asked.images, self._setting(frames), {**left_out, **unknown})

    def _setting(self, frames: int) -> dict[str, Any]:
        """How all was measured, for whoever reads the table."""
        asked, transformer = self.asked, transformers_of(self.pipe)[0]
        compared = {}
        if isinstance(self.real, Pictures):
            size = subset_size(asked.images * frames, self.real.count)
            compared = {"real": self.real.about, "kid_subsets": f"{SUBSETS} subsets of {size}"}
        if isinstance(self.real, Moments):
            compared = {"real": f"statistics of {self.real.count or 'an unknown number of'} images"}
        return {
            **self.about(),
            "seeds": {"first": asked.seed, "last": asked.seed + asked.images - 1},
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
            "peak_memory": SAID.get(transformer.device.type, "unknown"),
        }
