"""What a plan is bound to, and what of a pipeline that is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pydantic

from arrowhead.plans.layout import Site

NO_SCHEDULER = "a loop of one's own"
"""What a plan has in place of a scheduler's name."""


@dataclass(frozen=True)
class Target:
    """What a plan was made for. Everything here has to match where it is applied."""

    transformer: str
    scheduler: str
    scheduler_config: Mapping[str, Any]
    sites: tuple[Site, ...]

    def as_json(self) -> dict[str, Any]:
        """The target as files have it."""
        return pydantic.TypeAdapter(Target).dump_python(self, by_alias=True)

    def common(self, other: "Target") -> "Target":
        """This target without the scheduler's settings in which `other` differs: some schedulers set them as they run."""
        theirs = other.scheduler_config
        config = {key: value for key, value in self.scheduler_config.items() if key in theirs and theirs[key] == value}
        return replace(self, scheduler_config=config)

    def differences(self, other: "Target") -> list[str]:
        """Where `other` differs, each as 'what: plan's value, pipeline's value'."""
        found = [
            f"{name}: plan {mine}, pipeline {theirs}"
            for name, mine, theirs in (
                ("transformer", self.transformer, other.transformer),
                ("scheduler", self.scheduler, other.scheduler),
                ("number of sites", len(self.sites), len(other.sites)),
            )
            if mine != theirs
        ]
        if self.scheduler == other.scheduler:
            for key, mine in sorted(self.scheduler_config.items()):
                theirs = other.scheduler_config.get(key, "not set")
                if mine != theirs:
                    found.append(f"scheduler's {key}: plan {mine}, pipeline {theirs}")
        if len(self.sites) == len(other.sites):
            place = {site.path: i for i, site in enumerate(self.sites)}  # where torch lists modules says nothing
            mine, theirs = ({*self.sites} - {*other.sites}, {*other.sites} - {*self.sites})
            by_path = [sorted(sites, key=lambda site: place.get(site.path, len(place))) for sites in (mine, theirs)]
            wrong = list(zip(*by_path, strict=True))
            found += [f"site: plan {a}, pipeline {b}" for a, b in wrong[:3]]
            found += [f"and {len(wrong) - 3} more sites"] if len(wrong) > 3 else []
        return found


def plain(value: Any) -> Any:
    """A setting as JSON can hold it and read it back: lists for arrays, text for what is not finite or not a value."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value if isinstance(value, str | int | float | bool | None) else str(value)
