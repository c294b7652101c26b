"""The results of an evaluation: one row for the untouched pipeline and one for each plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from arrowhead.evaluation.estimates import Estimate, as_dict
from arrowhead.evaluation.work_folder import SettingFolder
from arrowhead.plans.plan import Plan


@dataclass(frozen=True)
class Cost:
    """What generation cost with one setting.

    `attention_flops` and `module_flops` are fractions of the untouched pipeline's. Bytes are those of one batch; memory is None
    where the system does not report it. `time_ratio` is the median, over the `pairs` batches that were generated in one session
    with the untouched pipeline's, of the time divided by the untouched pipeline's time. It is None if there is no such batch.
    `summary` is the summary of the first batch.
    """

    attention_flops: float
    module_flops: float
    peak_cache_bytes: int
    peak_memory_bytes: int | None
    seconds_per_image: float
    time_ratio: float | None
    pairs: int
    summary: Mapping[str, Any]

    @classmethod
    def of(cls, setting: SettingFolder, raw: SettingFolder, batches: Sequence[range]) -> "Cost":
        """Compute a setting's cost from the records of its batches, with the untouched pipeline's for the time ratio."""
        own, untouched = ([folder.record(images) for images in batches] for folder in (setting, raw))
        peaks = [record["peak_memory_bytes"] for record in own]
        ratios = [
            mine["seconds"] / theirs["seconds"]
            for mine, theirs in zip(own, untouched, strict=True)
            if mine["session"] == theirs["session"]
        ]
        summary = own[0]["summary"] or {"flops": {"attention": 1.0, "module": 1.0}, "peak_cache_bytes": 0}
        return cls(
            summary["flops"]["attention"],
            summary["flops"]["module"],
            max((record["summary"] or summary)["peak_cache_bytes"] for record in own),
            None if None in peaks else max(peaks),
            median(record["seconds"] / len(images) for record, images in zip(own, batches, strict=True)),
            median(ratios) if ratios else None,
            len(ratios),
            summary,
        )


@dataclass(frozen=True)
class Row:
    """One setting: its plan (None for the untouched pipeline), its cost, and its estimates by the names of their measures."""

    name: str
    plan: Plan | None
    cost: Cost
    estimates: Mapping[str, Estimate]

    def as_dict(self) -> dict[str, Any]:
        """The row, for JSON."""
        cost = {
            name: value for name, value in vars(self.cost).items() if name not in ("summary", "attention_flops", "module_flops")
        }
        search = {} if self.plan is None else {"search": self.plan.about.get("search")}
        return {**search, **self.cost.summary, **cost, **as_dict(self.estimates)}


@dataclass(frozen=True)
class Results:
    """The table of an evaluation.

    `raw` is the untouched pipeline's row, `rows` are the plans'. `setting` says how all was measured, and `not_measured` gives
    the reason for each measure that is missing.
    """

    raw: Row
    rows: tuple[Row, ...]
    images: int
    setting: Mapping[str, Any]
    not_measured: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The table, for JSON."""
        plans = {row.name: row.as_dict() for row in self.rows}
        about = {**self.setting, "images": self.images, "not_measured": dict(self.not_measured)}
        return {**about, "raw": self.raw.as_dict(), "plans": plans}
