"""What an evaluation found, as a value: a row for the untouched pipeline and for each plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from arrowhead.evaluation.figures import Figure, as_dict
from arrowhead.evaluation.work_folder import WorkFolder
from arrowhead.plans.plan import Plan


@dataclass(frozen=True)
class Cost:
    """What generating took. `flops` are what is left of attention's matmuls and of modules; bytes are of a batch.

    `time_ratio` is the median over batches of the time by the untouched pipeline's beside it, `pairs` how many there were;
    without any it is None, as are bytes that the system does not tell.
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
    def of(cls, kept: WorkFolder, raw: WorkFolder, batches: Sequence[range]) -> "Cost":
        """From the records of all batches."""
        own, untouched = ([setting.record(images) for images in batches] for setting in (kept, raw))
        peaks = [record["peak_memory_bytes"] for record in own]
        beside = [
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
            median(beside) if beside else None,
            len(beside),
            summary,
        )


@dataclass(frozen=True)
class Row:
    """One setting: its plan, None for the untouched pipeline, its cost and its figures by name."""

    name: str
    plan: Plan | None
    cost: Cost
    figures: Mapping[str, Figure]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        cost = {
            name: value for name, value in vars(self.cost).items() if name not in ("summary", "attention_flops", "module_flops")
        }
        search = {} if self.plan is None else {"search": self.plan.about.get("search")}
        return {**search, **self.cost.summary, **cost, **as_dict(self.figures)}


@dataclass(frozen=True)
class Measured:
    """The table: the untouched pipeline's row, one for each plan, how it was measured, and what was not, and why."""

    raw: Row
    rows: tuple[Row, ...]
    images: int
    setting: Mapping[str, Any]
    not_measured: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plans = {row.name: row.as_dict() for row in self.rows}
        about = {**self.setting, "images": self.images, "not_measured": dict(self.not_measured)}
        return {**about, "raw": self.raw.as_dict(), "plans": plans}
