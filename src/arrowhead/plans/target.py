"""What a plan is bound to: the transformer class, the scheduler with its settings, and the sites."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

import pydantic

from arrowhead.plans.foreign_text import visible
from arrowhead.plans.layout import Site

NO_SCHEDULER = "a loop of one's own"
"""The scheduler's name in plans for custom models, whose denoising loop is the user's. Plan files have this text."""


@dataclass(frozen=True)
class Target:
    """What a plan was made for. All of this has to match where the plan is applied.

    Attributes:
        transformer: the name of the transformer's class.
        scheduler: the name of the scheduler's class, or `NO_SCHEDULER`.
        scheduler_config: the scheduler's settings, as JSON values (see `to_json_value`).
        sites: the sites that the plan has cells for, in the order in which they run.
        levels: the noise levels of the run that the plan was made in, one for each step: the scheduler's timesteps as parts of
            those of training, from at most 1 down to 0. None in files of older formats, and for a custom model's loop.

        weights: a fingerprint of the weights that the plan was found with, see `models/weights.py`; None where it is not known.

    Targets that differ in nothing but levels and weights are equal: a plan is carried over to other levels, and applying it to
    other weights gives a warning.

    Raises:
        ValueError: levels that are not finite, or below 0; weights that are no hexadecimal digits of 2-byte numbers.
    """

    transformer: str
    scheduler: str
    scheduler_config: Mapping[str, Any]
    sites: tuple[Site, ...]
    levels: tuple[float, ...] | None = field(default=None, compare=False)
    weights: Annotated[str, pydantic.Field(max_length=4096)] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.weights is not None and (len(self.weights) % 4 or not re.fullmatch("[0-9a-f]+", self.weights)):
            raise ValueError(f"got weights={self.weights:.100}, wanted hexadecimal digits, four for each number")
        if not all(math.isfinite(level) and level >= 0 for level in self.levels or ()):
            raise ValueError(f"got levels={self.levels}, wanted finite ones of at least 0")

    def as_json(self) -> dict[str, Any]:
        """The target as plan and table files spell it."""
        return pydantic.TypeAdapter(Target).dump_python(self, by_alias=True)

    def common(self, other: "Target") -> "Target":
        """This target without the scheduler's settings in which `other` differs: some schedulers set them while they run."""
        theirs = other.scheduler_config
        config = {key: value for key, value in self.scheduler_config.items() if key in theirs and theirs[key] == value}
        return replace(self, scheduler_config=config)

    def differences(self, other: "Target") -> list[str]:
        """The differences of `other`, each as "what: plan <value>, pipeline <value>"."""
        return self.model_differences(other) + self.scheduler_differences(other)

    def scheduler_differences(self, other: "Target") -> list[str]:
        """Those of the scheduler."""
        if self.scheduler != other.scheduler:
            return [_difference("scheduler", self.scheduler, other.scheduler)]
        pairs = ((key, mine, other.scheduler_config.get(key, "not set")) for key, mine in sorted(self.scheduler_config.items()))
        return [_difference(f"scheduler's {key}", mine, theirs) for key, mine, theirs in pairs if mine != theirs]

    def model_differences(self, other: "Target") -> list[str]:
        """Those of the transformer and its sites."""
        found = [
            _difference(name, mine, theirs)
            for name, mine, theirs in (
                ("transformer", self.transformer, other.transformer),
                ("number of sites", len(self.sites), len(other.sites)),
            )
            if mine != theirs
        ]
        if len(self.sites) == len(other.sites):
            place = {site.path: i for i, site in enumerate(self.sites)}  # the order of modules is no part of a target
            unlike = [{*self.sites} - {*other.sites}, {*other.sites} - {*self.sites}]
            by_path = [sorted(sites, key=lambda site: place.get(site.path, len(place))) for sites in unlike]
            found += [_site_difference(mine, theirs) for mine, theirs in zip(*by_path, strict=True)]
        return found


def first_of(differences: Sequence[str]) -> str:
    """The first of some differences, and the number of the others."""
    first, *others = differences
    return f"{first}; and {len(others)} more difference{'s' * (len(others) > 1)}" if others else first


def _difference(name: str, mine: Any, theirs: Any) -> str:
    return visible(f"{name:.200}: plan {_short(mine)}, pipeline {_short(theirs)}")


def _site_difference(mine: Site, theirs: Site) -> str:
    """The first size, or the path, in which two sites differ."""
    names = (each.name for each in fields(Site) if each.compare)
    name = next(name for name in names if getattr(mine, name) != getattr(theirs, name))
    where = "site" if name == "path" else f"{name} of site {mine.path}"
    return _difference(where, getattr(mine, name), getattr(theirs, name))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def to_json_value(value: Any) -> Any:
    """A setting as a value that JSON holds and gives back.

    Arrays and tuples become lists; numbers that are not finite, and objects of other types, become text.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value if isinstance(value, str | int | float | bool | None) else str(value)
