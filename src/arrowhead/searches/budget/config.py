"""What a budget search is asked for: `Budget` says what may be spent, `Extent` how far to look."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, get_args

from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import Precision, Radius
from arrowhead.plans.layout import ALL_KINDS, Kind, Site, Tokens
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.costs import FlopCosts, Measure, SecondCosts
from arrowhead.searches.budget.solver.problem import Granularity, InStep, Problem
from arrowhead.searches.budget.solver.states import SLOPES, Choices
from arrowhead.searches.radii import fewest, narrower, require_radii
from arrowhead.searches.settings import is_number, require_flags

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
EXTENT_RANGES = {"ages": (1, 2**12), "vectors": (1, 2**12), "regions": (1, 2**26), "seed": (0, 2**64 - 1)}
"""Steps and tokens are no more than that (`files`), vectors are as many passes; the seed is a generator's."""


@dataclass(frozen=True)
class Extent:
    """How far a calibration looks: arrows of which radii, outputs and residuals of how many steps ago, by how many vectors.

    `radii` are in tokens, or boxes in the grid; None: an eighth and a 32nd of the visual tokens (of a frame's, where a site
    sees one frame). `kinds` of sites, None: all, but of blocks only those that compute what no other site does, as FLUX's
    single-stream blocks. `checkpoint`: blocks run again on the way back rather than keep what they need for it (diffusers'
    gradient checkpointing): half as long again, in a fraction of the memory. `feedback`: from 0, where an error counts for
    what the sampler makes of it, to 1, where it counts for what the model makes of that in the steps that follow, too (the
    estimate's power). `regions`: parts of the sequence of tokens that are looked at on their own, None: as many as make 64
    products of each kind. The vectors follow from `seed`.

    `gradients`: False for none, where a model or its memory does not allow them. What a change of a site does to the output is
    then one number for each step and site, from passes in which each image has a site changed, see `weights`.

    `precisions`: other ones than native that heads may have, none unless asked for; each takes one more attention per site and
    step, and memory for its difference to native attention.
    """

    radii: tuple[Radius, ...] | None = None
    ages: int = 8
    vectors: int = 1
    kinds: tuple[Kind, ...] | None = None
    checkpoint: bool = False
    gradients: bool = True
    feedback: float = 0.75
    regions: int | None = None
    seed: int = 0
    precisions: tuple[Precision, ...] = ()

    def __post_init__(self) -> None:
        require_radii(self.radii)
        require_flags(self, "checkpoint", "gradients")
        if self.kinds is not None and (not _words(self.kinds) or not set() < set(self.kinds) <= ALL_KINDS):
            raise InputsInvalid(f"got kinds={self.kinds!r}, wanted a tuple of some of {', '.join(sorted(ALL_KINDS))}, or None")
        others = [precision for precision in get_args(Precision) if precision != "native"]
        if not _words(self.precisions) or sorted(self.precisions) != sorted(set(self.precisions) & {*others}):
            raise InputsInvalid(f"got precisions={self.precisions!r}, wanted a tuple of some of {', '.join(others)}, each once")
        if not is_number(self.feedback) or not 0 <= self.feedback <= 1:
            raise InputsInvalid(f"got feedback={self.feedback!r}, wanted a number from 0 to 1")
        if self.checkpoint and not self.gradients:
            raise InputsInvalid("got checkpoint=True without gradients, wanted one of the two: nothing is kept for a way back")
        for name, (least, most) in EXTENT_RANGES.items():
            value = getattr(self, name)
            if value is None and name == "regions":
                continue
            if type(value) is not int or not least <= value <= most:
                raise InputsInvalid(f"got {name}={value!r}, wanted a whole number of {least} or more, {most} at most")

    def held(self, sites: Iterable[Site], tokens: Tokens) -> int:
        """Elements of one sample that are held at most from step to step: of the last steps outputs, residuals, roundings."""
        found, sites = 0, tuple(sites)
        bands = len(self.bands(sites, tokens))
        for site in sites:
            own, attends = site.tokens(tokens), site.kind == "self_attention"
            of_attention = own.visual * bands + own.total * len(self.precisions)
            found += site.heads * site.head_dim * (own.total + of_attention * attends) * site.sequences(tokens)
        return found * (self.ages + 1)

    def bands(self, sites: Iterable[Site], tokens: Tokens) -> tuple[Radius, ...]:
        """The radii, widest first; bands that would cover everything that some site attends over are left out."""
        least = fewest(sites, tokens)
        wanted = (least.visual // 8, least.visual // 32) if self.radii is None else self.radii
        return narrower(wanted, least)


def _words(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(word, str) for word in value)
