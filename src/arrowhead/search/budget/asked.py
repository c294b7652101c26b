"""What a search may spend or lose, and what that leaves to be solved."""

import sys
from dataclasses import dataclass, fields

from arrowhead.errors import InputsInvalid
from arrowhead.search.budget.costs import FlopCosts, Measure, SecondCosts
from arrowhead.search.budget.given import SLOPES, Choices
from arrowhead.search.budget.problem import Granularity, InStep, Problem
from arrowhead.search.budget.table import Table
from arrowhead.search.settings import is_number, require_flags

PRESETS = {"light": 0.03, "balanced": 0.07, "strong": 0.15}
"""Relative errors of the final latents."""


@dataclass(frozen=True)
class Budget:
    """What a generation may cost, or how far it may stray: one of the first five.

    Args:
        attention_flops: what may remain of the FLOPs of attention's two matmuls, in (0, 1]; feed-forwards are left alone.
        module_flops: of the attention modules' FLOPs, with the Q, K, V and output projections, in (0, 1]; likewise.
        transformer_flops: of all FLOPs of the transformer, in (0, 1].
        speedup: of the transformer, above 1, by the seconds that cells take on this device for the calibration's inputs.
        error: norm of the change of the final latents over their norm, on the calibration's inputs; the fewest FLOPs of the
            transformer are sought that keep to it.
        cache_bytes: what the caches may hold at most, for as many images as the calibration has at once; beside one of the
            five, but for an error.
        granularity: what does the same in a step: `step` for all sites, `site` for all heads of a site, `head`, or groups of so
            many heads. None: `step` and `head`, for a speedup `step` and `site`, whatever errs less in a real generation; for a
            table alone the former.
        share_cfg: whether a site may compute the conditional branch alone.
        residual: whether arrows may add a residual.
        reuse: whether outputs may be repeated.
        precision: whether heads may multiply with less precision, of those that the table has (`Extent(precisions=…)`).
        extrapolate: whether whole sites' outputs may be continued along a line.
        slopes: what of a line's slope may be taken, above 0 and at most 1; less than all is better where outputs are noisy.
        corrections: beside FLOPs or a speedup, how many more plans may be tried on the calibration's inputs, 2 at most, of
            which the one that errs least in detail is kept. They take the model's answer to an error, an estimate, for another.
    """

    attention_flops: float | None = None
    module_flops: float | None = None
    transformer_flops: float | None = None
    speedup: float | None = None
    error: float | None = None
    cache_bytes: int | None = None
    granularity: Granularity | None = None
    share_cfg: bool = True
    residual: bool = True
    reuse: bool = True
    extrapolate: bool = True
    slopes: tuple[float, ...] = SLOPES
    precision: bool = True
    corrections: int = 2

    def __post_init__(self) -> None:
        asked = {name: value for name in ASKED if (value := getattr(self, name)) is not None}
        if len(asked) != 1:
            raise InputsInvalid(
                f"got a budget of {asked or 'nothing'}, wanted one of {', '.join(ASKED)}, such as module_flops=0.4"
            )
        ((name, value),) = asked.items()
        above, highest = RANGES.get(name, (0, 1))
        if not is_number(value) or not above < value <= highest:
            raise InputsInvalid(f"got {name}={value!r}, wanted a number above {above}, at most {highest:g}")
        require_flags(self, "share_cfg", "residual", "reuse", "extrapolate", "precision")
        of_groups = type(self.granularity) is int and self.granularity > 0
        named = self.granularity is None or (isinstance(self.granularity, str) and self.granularity in ("step", "site", "head"))
        if not named and not of_groups:
            raise InputsInvalid(
                f"got granularity={self.granularity!r}, wanted 'step', 'site', 'head', or a number of heads, 1 or more"
            )
        if self.cache_bytes is not None and (type(self.cache_bytes) is not int or self.cache_bytes < 0 or name == "error"):
            raise InputsInvalid(
                f"got cache_bytes={self.cache_bytes!r} with a budget of {name}, wanted a whole number of 0 or more, beside "
                "FLOPs or a speedup; leave it out, or ask for one of these"
            )
        if not isinstance(self.slopes, tuple) or not all(is_number(slope) and 0 < slope <= 1 for slope in self.slopes):
            raise InputsInvalid(f"got slopes={self.slopes!r}, wanted a tuple of numbers above 0 and at most 1; () for no lines")
        if type(self.corrections) is not int or not 0 <= self.corrections < 3:
            raise InputsInvalid(f"got corrections={self.corrections!r}, wanted 0, 1 or 2")
        if self.speedup is not None and self.granularity not in (None, "step", "site"):
            raise InputsInvalid(
                f"got a speedup with granularity={self.granularity!r}, wanted whole sites: seconds of heads do not add up; "
                "leave it out, or ask for FLOPs"
            )

    @property
    def asked(self) -> tuple[str, float]:
        """Which of the five, and its value."""
        return next((name, value) for name in ASKED if (value := getattr(self, name)) is not None)

    @property
    def fraction(self) -> float:
        """What may remain of the cost."""
        name, value = self.asked
        return 1 / value if name == "speedup" else value

    def choices(self, table: Table) -> Choices:
        """What a table and this budget leave open."""
        share_cfg, precisions = self.share_cfg and table.branches.guided, table.precisions if self.precision else ()
        slopes = self.slopes if self.extrapolate else ()
        return Choices(table.radii, table.ages, share_cfg, self.residual, self.reuse, slopes, precisions)

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Those that come into question, where the pipeline can show which is better."""
        finest: Granularity = "head" if self.speedup is None else "site"  # seconds of heads do not add up
        return ("step", finest) if self.granularity is None else (self.granularity,)

    def problem(self, table: Table, seconds: SecondCosts | None = None) -> Problem:
        """What has to be solved with a table, and, for a speedup, with what was timed."""
        granularity = self.granularities[0]
        kind = InStep if granularity == "step" else Problem
        if seconds is not None:
            return kind(table, self.choices(table), seconds, granularity)
        measure: Measure = "transformer"
        if self.attention_flops is not None or self.module_flops is not None:
            table, measure = table.attention_alone(), "module" if self.attention_flops is None else "attention"
        samples = table.branches.samples * table.branches.calls
        costs = FlopCosts(measure, table.tokens, samples, table.other_flops)
        return kind(table, self.choices(table), costs, granularity)


ASKED = tuple(field.name for field in fields(Budget)[:5])
RANGES = {"speedup": (1, sys.float_info.max), "error": (0, sys.float_info.max)}
