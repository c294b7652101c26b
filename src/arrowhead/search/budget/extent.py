"""How far a calibration looks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from arrowhead.errors import InputsInvalid
from arrowhead.layout import Kind, Site, Tokens
from arrowhead.methods import Precision, Radius
from arrowhead.models import EVERYTHING
from arrowhead.search.radii import fewest, narrower, require_radii
from arrowhead.search.settings import is_number, require_flags

RANGES = {"ages": (1, 2**12), "vectors": (1, 2**12), "regions": (1, 2**26), "seed": (0, 2**64 - 1)}
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
        if self.kinds is not None and (not _words(self.kinds) or not set() < set(self.kinds) <= EVERYTHING):
            raise InputsInvalid(f"got kinds={self.kinds!r}, wanted a tuple of some of {', '.join(sorted(EVERYTHING))}, or None")
        others = [precision for precision in get_args(Precision) if precision != "native"]
        if not _words(self.precisions) or sorted(self.precisions) != sorted(set(self.precisions) & {*others}):
            raise InputsInvalid(f"got precisions={self.precisions!r}, wanted a tuple of some of {', '.join(others)}, each once")
        if not is_number(self.feedback) or not 0 <= self.feedback <= 1:
            raise InputsInvalid(f"got feedback={self.feedback!r}, wanted a number from 0 to 1")
        if self.checkpoint and not self.gradients:
            raise InputsInvalid("got checkpoint=True without gradients, wanted one of the two: nothing is kept for a way back")
        for name, (least, most) in RANGES.items():
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
