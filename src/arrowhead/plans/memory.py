"""How many bytes the caches of a plan hold, in closed form."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, cast, get_args

from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import Cell, Reuse
from arrowhead.plans.flops import (
    computed_samples,
    count_heads,
)
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import What, lifetimes

CacheDtype = Literal["native", "int8", "fp8"]
"""The pipeline's own, whole numbers from −127 to 127, or float8_e4m3fn; the latter two by scales."""
SCALE_BYTES = 4


def require_cache_dtype(name: str) -> CacheDtype:
    """The dtype of that name.

    Raises:
        InputsInvalid: there is none.
    """
    if name not in get_args(CacheDtype):
        raise InputsInvalid(
            f"got cache_dtype={name!r}, wanted one of {', '.join(get_args(CacheDtype))}; leave it out for native"
        )
    return cast(CacheDtype, name)


def groups(channels: int, head_dim: int) -> int:
    """How many scales a token's `channels` have: one for each head's width, or one where they are no multiple of it."""
    return 1 if channels % head_dim else channels // head_dim


@dataclass(frozen=True)
class Memory:
    """What the caches hold, in bytes, and when they hold most.

    The `peak` comes in step `step` first, and is made of what `of` says: outputs, slopes, heads, residuals, or what one call of
    a step hands over to the other. `steps` has the most of each step.
    """

    peak: int
    step: int
    of: Mapping[What, int]
    steps: tuple[int, ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{what} {size / 2**20:.2f}" for what, size in self.of.items())
        return f"{self.peak / 2**20:.2f} MiB in step {self.step}" + f" ({parts})" * bool(parts)


def memory(
    cells: Sequence[Sequence[Cell]],
    sites: Sequence[Site],
    tokens: Tokens,
    samples: int,
    *,
    images: int,
    itemsize: int,
    calls: int = 1,
    cache_dtype: CacheDtype = "native",
) -> Memory:
    """What the caches hold at any moment, for so many `images` at once.

    An element of their activations takes `itemsize` bytes, or one byte in 8 bits, and its share of a scale. In each of a step's
    `calls` sites follow one another in order, and each frees what it has read for the last time before it writes.
    """
    width = calls * len(sites)
    change = [0] * (len(cells) * width + 1)  # at each passage of a site
    held: list[tuple[int, int, _Lifetime]] = []
    for place, (site, column) in enumerate(zip(sites, zip(*cells, strict=True), strict=True)):
        for stored in _lifetimes_of(site, tokens, column, samples, calls, itemsize, cache_dtype):
            written, freed = stored.written * len(sites) + place, stored.freed * len(sites) + place
            change[written] += stored.size
            change[freed] -= stored.size
            held.append((written, freed, stored))
    after = [0, *accumulate(change)]
    steps = tuple(max(after[step * width : (step + 1) * width + 1]) * images for step in range(len(cells)))
    moment = after.index(max(after)) - 1  # the passage that has just been
    of: Counter[What] = Counter()
    for written, freed, stored in held:
        if written <= moment < freed:
            of[stored.what] += stored.size * images
    return Memory(max(steps), steps.index(max(steps)), dict(of.most_common()), steps)


@dataclass(frozen=True)
class _Lifetime:
    """Bytes per image that one site holds from one call of the transformer to another, counted through all steps."""

    what: What
    size: int
    written: int
    freed: int


def _lifetimes_of(
    site: Site, tokens: Tokens, column: Sequence[Cell], samples: int, calls: int, itemsize: int, dtype: CacheDtype
) -> Iterator[_Lifetime]:
    def row(channels: int) -> int:
        return channels * itemsize if dtype == "native" else channels + SCALE_BYTES * groups(channels, site.head_dim)

    exact, output = _outputs(site, tokens, lambda channels: channels * itemsize), _outputs(site, tokens, row)
    length, own = site.tokens(tokens).total * site.sequences(tokens), row(site.head_dim)
    for step, (cell, writes) in enumerate(zip(column, lifetimes(column), strict=True)):
        if isinstance(cell, Reuse):
            continue
        kept: list[tuple[What, int, int, bool, bool]] = [
            ("residual", tokens.visual * count_heads(made.heads, site) * own, made.last_reader, made.conditional_only, True)
            for made in writes.residuals
        ]
        for made in writes.head_outputs:
            kept.append(("heads", length * count_heads(made.heads, site) * own, made.last_reader, made.conditional_only, True))
        if (until := writes.output_until) is not None:
            reader = column[until]  # one that shares writes its own output over both calls' in the first of them
            kept.append(("output", output, until, False, isinstance(reader, Reuse) or not reader.share_cfg))
        if writes.slope_until is not None:
            kept.append(("slope", output, writes.slope_until, False, True))
        if calls == 1:
            rows = computed_samples(cell, samples)
            yield from (_Lifetime(what, size * (1 if half else rows), step, last) for what, size, last, half, _ in kept)
            continue
        for what, size, last, half, twice in kept:
            second = 2 * last + (twice and not half)
            if cell.share_cfg:  # one tensor, which serves both calls
                yield _Lifetime(what, size, 2 * step, second)
                continue
            yield _Lifetime(what, size, 2 * step, 2 * last)
            if not half:
                yield _Lifetime(what, size, 2 * step + 1, second)
        if cell.share_cfg and (writes.output_until is None or dtype != "native"):  # from the first call to the second
            yield _Lifetime("handed over", exact, 2 * step, 2 * step + 1)


def _outputs(site: Site, tokens: Tokens, row: Callable[[int], int]) -> int:
    """Bytes of a module's output of one sample, whose tokens take `row` by their channels."""
    own, width = site.tokens(tokens), site.heads * site.head_dim
    of_text = (site.text_channels or site.channels) if site.projects_out == "all" else width  # the heads', unless projected
    of_image = width if site.projects_out == "none" else site.channels
    return own.visual * site.sequences(tokens) * row(of_image) + own.text * row(of_text)
