"""What a budget search is asked for: `Budget` says what a plan may cost, `Extent` what the calibration run records."""

import sys
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from arrowhead.engine.cache_encoding import CacheEncoding
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import Precision, Radius
from arrowhead.plans.layout import ALL_KINDS, Kind
from arrowhead.plans.memory import CacheDtype
from arrowhead.searches.radii import require_radii
from arrowhead.searches.settings import is_number, require_flags

Granularity = Literal["step", "site", "head"] | int
"""What does the same in a step: all sites, all heads of a site, each head alone, or groups of that many heads."""
SLOPES = (0.5, 0.75, 1.0)
"""Parts of the slope that an output may be extrapolated by. Less than 1 is better where outputs are noisy, as in a run's first
steps."""
PRESETS = {"light": 0.03, "balanced": 0.07, "strong": 0.15}
"""Relative errors of the final latents."""


@dataclass(frozen=True)
class Budget:
    """What a generation may cost, or how far its result may be from the uncompressed one. One of the first five is given.

    Args:
        attention_flops: fraction of the FLOPs of attention's two matmuls that may remain, in (0, 1]. Feed-forwards stay as they
            are.
        module_flops: fraction of the attention modules' FLOPs that may remain, in (0, 1]: attention_flops, and the Q, K, V and
            output projections. Feed-forwards stay as they are.
        transformer_flops: fraction of all FLOPs of the transformer that may remain, in (0, 1].
        speedup: how much faster the transformer has to be, above 1. It is predicted from the seconds that cells take on this
            device with the calibration's inputs.
        error: norm of the change of the final latents over their norm, above 0, on the calibration's inputs. The search looks
            for the plan with the fewest transformer FLOPs that keeps to it.
        cache_bytes: bytes that the caches may hold at most, for as many images as the calibration has at once. It goes with
            FLOPs or a speedup, not with an error.
        granularity: what does the same in a step: all sites (`step`), all heads of a site (`site`), each head alone (`head`),
            or groups of that many heads. None tries `step` and `head` (for a speedup `step` and `site`), and takes the one with
            the smaller error in a real generation; `arrowhead.solve`, which generates nothing, takes `step`.
        share_cfg: whether a site may compute the conditional branch alone (ASC).
        residual: whether arrows may add a residual (WA-RS).
        reuse: whether outputs may be repeated (AST).
        extrapolate: whether whole sites' outputs may be extrapolated from the two that were computed last.
        precision: whether heads may multiply with less precision, if the table has any (`Extent(precisions=…)`).
        corrections: how many more plans may be tried in real generations on the calibration's inputs, 0 to 2, with FLOPs or a
            speedup. They differ in the slopes, and in the power of the model's feedback, which is an estimate. The plan with
            the smallest error in detail is kept.
        slopes: parts of the slope that an output may be extrapolated by, above 0 and at most 1. Less than 1 is better where
            outputs are noisy.

    Raises:
        InputsInvalid: not one of the first five is given, or a value is out of range; the message says what is wanted.

    Examples:
        >>> ah.search(pipe, inputs, budget=ah.Budget(transformer_flops=0.4))
        >>> ah.search(pipe, inputs, budget=ah.Budget(error=0.07, granularity="site"))
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
        _require_one_asked(self)
        require_flags(self, "share_cfg", "residual", "reuse", "extrapolate", "precision")
        _require_granularity(self.granularity)
        _require_cache_bytes(self)
        if not isinstance(self.slopes, tuple) or not all(is_number(slope) and 0 < slope <= 1 for slope in self.slopes):
            raise InputsInvalid(f"got slopes={self.slopes!r}, wanted a tuple of numbers above 0 and at most 1; () for none")
        if type(self.corrections) is not int or not 0 <= self.corrections < 3:
            raise InputsInvalid(f"got corrections={self.corrections!r}, wanted 0, 1 or 2")
        if self.speedup is not None and self.granularity not in (None, "step", "site"):
            raise InputsInvalid(
                f"got a speedup with granularity={self.granularity!r}, wanted whole sites: seconds of heads do not add up; "
                "leave it out, or ask for FLOPs"
            )

    @property
    def asked(self) -> tuple[str, float]:
        """The name of the one of the first five that was given, and its value."""
        ((name, value),) = _given(self).items()
        return name, value

    @property
    def fraction(self) -> float:
        """The fraction of the cost that may remain."""
        name, value = self.asked
        return 1 / value if name == "speedup" else value

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """The granularities to try, where a real generation can show which is better."""
        finest: Granularity = "head" if self.speedup is None else "site"  # seconds of heads do not add up
        return ("step", finest) if self.granularity is None else (self.granularity,)


ASKED = tuple(field.name for field in fields(Budget)[:5])
RANGES = {"speedup": (1, sys.float_info.max), "error": (0, sys.float_info.max)}


def _given(budget: Budget) -> dict[str, float]:
    """Those of the first five that are not None."""
    return {name: value for name in ASKED if (value := getattr(budget, name)) is not None}


def _require_one_asked(budget: Budget) -> None:
    asked = _given(budget)
    if len(asked) != 1:
        raise InputsInvalid(f"got a budget of {asked or 'nothing'}, wanted one of {', '.join(ASKED)}, such as module_flops=0.4")
    ((name, value),) = asked.items()
    above, highest = RANGES.get(name, (0, 1))
    if not is_number(value) or not above < value <= highest:
        raise InputsInvalid(f"got {name}={value!r}, wanted a number above {above}, at most {highest:g}")


def _require_granularity(value: Any) -> None:
    named = value is None or (isinstance(value, str) and value in ("step", "site", "head"))
    of_groups = type(value) is int and value > 0
    if not named and not of_groups:
        raise InputsInvalid(f"got granularity={value!r}, wanted 'step', 'site', 'head', or a number of heads, 1 or more")


def _require_cache_bytes(budget: Budget) -> None:
    value = budget.cache_bytes
    if value is not None and (type(value) is not int or value < 0 or budget.error is not None):
        raise InputsInvalid(
            f"got cache_bytes={value!r} with a budget of {budget.asked[0]}, wanted a whole number of 0 or more, beside "
            "FLOPs or a speedup; leave it out, or ask for one of these"
        )


@dataclass(frozen=True)
class Extent:
    """What a calibration run records: which arrows, how old outputs and residuals, and by how many random vectors.

    Args:
        radii: of the arrows, in tokens, or `Box`es in the grid. None: an eighth and a 32nd of the visual tokens (of a frame's,
            where a site sees one frame).
        ages: how many steps old what a step builds on may be. The run holds the tensors of that many steps.
        precisions: other precisions than native that heads may have. Each takes one more attention per site and step, and
            memory for its difference to native attention.
        kinds: the kinds of sites. None: all; but of blocks only those that compute what no other site does, as FLUX's
            single-stream blocks.
        checkpoint: whether blocks run again on the way back instead of keeping their activations (diffusers' gradient
            checkpointing). The run takes half as long again, and a fraction of the memory.
        one_by_one: whether prompts run one after another. Memory then holds what one of them needs, and the table is that of
            all. Wanted then: one picture for each prompt, and a list of generators, or latents, with an entry for each. Images
            among the inputs are refused, and so is any other argument with as many entries as there are prompts.
        cache_dtype: how what sites gave in the last steps is kept: `native`, the dtype in which it was computed, or `int8` or
            `fp8`, with one scale for each token and head.
        cache_device: the device on which that is kept, such as `cpu`. None: the one on which it was computed.
        gradients: False where a model or its memory does not allow gradients. What a change of a site does to the output is
            then one number for each step and site, measured in passes in which each image has one site changed.
        vectors: random vectors that are sent back through the transformer in each step.
        feedback: the power of the model's feedback, from 0 to 1. With 0 the predicted error is what the sampler alone makes of
            a step's error. With 1, what the model makes of that in the steps that follow counts in full.
        regions: parts of the sequence of tokens that are recorded apart. None: as many as give 64 products of each kind.
        seed: of the random vectors.

    Raises:
        InputsInvalid: a value is out of range; the message says what is wanted.

    Examples:
        >>> table = ah.calibrate(pipe, inputs, extent=ah.Extent(ages=4, precisions=("int8",)))
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
    one_by_one: bool = False
    cache_dtype: CacheDtype = "native"
    cache_device: str | None = None

    def __post_init__(self) -> None:
        require_radii(self.radii)
        require_flags(self, "checkpoint", "gradients", "one_by_one")
        if self.kinds is not None and (not _are_words(self.kinds) or not set() < set(self.kinds) <= ALL_KINDS):
            raise InputsInvalid(f"got kinds={self.kinds!r}, wanted a tuple of some of {', '.join(sorted(ALL_KINDS))}, or None")
        others = [precision for precision in get_args(Precision) if precision != "native"]
        if not _are_words(self.precisions) or sorted(self.precisions) != sorted(set(self.precisions) & {*others}):
            raise InputsInvalid(f"got precisions={self.precisions!r}, wanted a tuple of some of {', '.join(others)}, each once")
        if not is_number(self.feedback) or not 0 <= self.feedback <= 1:
            raise InputsInvalid(f"got feedback={self.feedback!r}, wanted a number from 0 to 1")
        if self.checkpoint and not self.gradients:
            raise InputsInvalid("got checkpoint=True without gradients, wanted one of the two: nothing is kept for a way back")
        if self.one_by_one and not self.gradients:
            raise InputsInvalid("got one_by_one=True without gradients, wanted one of the two: trials need all images at once")
        if self.cache_device is not None and not isinstance(self.cache_device, str):
            raise InputsInvalid(f"got cache_device={self.cache_device!r}, wanted the name of a device, such as 'cpu', or None")
        _ = self.encoding
        _require_whole_numbers(self)

    @property
    def encoding(self) -> CacheEncoding:
        """How what sites gave is kept."""
        return CacheEncoding.of(self.cache_dtype, self.cache_device)


WHOLE_NUMBERS = {"ages": (1, 2**12), "vectors": (1, 2**12), "regions": (1, 2**26), "seed": (0, 2**64 - 1)}
"""The least and the most: there are no more steps and tokens (`limits`), each vector is a pass, the seed is a generator's."""


def _require_whole_numbers(extent: Extent) -> None:
    for name, (least, most) in WHOLE_NUMBERS.items():
        value = getattr(extent, name)
        if value is None and name == "regions":
            continue
        if type(value) is not int or not least <= value <= most:
            raise InputsInvalid(f"got {name}={value!r}, wanted a whole number of {least} or more, {most} at most")


def _are_words(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(word, str) for word in value)
