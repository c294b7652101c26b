"""How many bytes the caches of a plan hold, in closed form."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, cast, get_args

from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import Attend, Cell, Reuse
from arrowhead.plans.flops import computed_samples, count_heads
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import EntryKind, Writes, lifetimes_of_all

CacheDtype = Literal["native", "int8", "fp8"]
"""How entries are encoded: in the pipeline's own dtype, as whole numbers from −127 to 127, or as float8_e4m3fn.

The two encodings in 8 bits have float32 scales: one for each token and head (see `groups`).
"""
SCALE_BYTES = 4


def require_cache_dtype(name: str) -> CacheDtype:
    """Returns `name`, checked to be a cache dtype.

    Raises:
        InputsInvalid: there is no such cache dtype.
    """
    if not isinstance(name, str) or name not in get_args(CacheDtype):
        raise InputsInvalid(
            f"got cache_dtype={name!r}, wanted one of {', '.join(get_args(CacheDtype))}; leave it out for native"
        )
    return cast(CacheDtype, name)


def groups(channels: int, head_dim: int) -> int:
    """The number of scales for one token: one for each `head_dim` channels, or one where they do not divide the channels."""
    return 1 if channels % head_dim else channels // head_dim


@dataclass(frozen=True)
class Memory:
    """How many bytes the caches hold, and when they hold the most.

    Attributes:
        peak: the most bytes at any moment of the generation.
        step: the first step in which the caches hold `peak` bytes.
        of: the bytes of each kind of entry at that moment; they sum to `peak`.
        steps: the most bytes at any moment of each step.
    """

    peak: int
    step: int
    of: Mapping[EntryKind, int]
    steps: tuple[int, ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {size / 2**20:.2f}" for kind, size in self.of.items())
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
    """The bytes that the caches hold under steps × sites of cells, while `images` are generated at once.

    Activations have `itemsize` bytes an element. The sites run in order in each of a step's `calls`, and a site pass frees what
    it reads for the last time before it writes. A moment is the end of a site pass.
    """
    passes = calls * len(sites)  # in a step
    change = [0] * (len(cells) * passes + 1)  # of the bytes per image, by each site pass
    held: list[_Lifetime] = []
    columns = zip(sites, zip(*cells, strict=True), lifetimes_of_all(cells, sites), strict=True)
    # a stack ends, and stores, after the sites within it
    for place, (site, column, stored) in enumerate(sorted(columns, key=lambda each: each[0].kind == "stack")):
        sizes = _EntryBytes(site, tokens, itemsize, cache_dtype)
        for life in _lifetimes_of(sizes, column, stored, samples, calls):
            written, freed = life.written * len(sites) + place, life.freed * len(sites) + place
            change[written] += life.size
            change[freed] -= life.size
            held.append(replace(life, written=written, freed=freed))
    after = [0, *accumulate(change)]
    steps = tuple(max(after[step * passes : (step + 1) * passes + 1]) * images for step in range(len(cells)))
    fullest = after.index(max(after)) - 1  # the site pass at whose end the caches hold most
    of: Counter[EntryKind] = Counter()
    for life in held:
        if life.written <= fullest < life.freed:
            of[life.kind] += life.size * images
    return Memory(max(steps), steps.index(max(steps)), dict(of.most_common()), steps)


@dataclass(frozen=True)
class _EntryBytes:
    """The bytes that one sample's entries take at one site.

    Activations have `itemsize` bytes an element. Encoded in 8 bits, an element has one byte, and a share of a scale.
    """

    site: Site
    tokens: Tokens
    itemsize: int
    dtype: CacheDtype

    def _token(self, channels: int) -> int:
        """Bytes of one token of `channels` channels."""
        if self.dtype == "native":
            return channels * self.itemsize
        return channels + SCALE_BYTES * groups(channels, self.site.head_dim)

    def output(self) -> int:
        """Bytes of the site's output, and of its slope."""
        site, own = self.site, self.site.tokens(self.tokens)
        heads_width = site.heads * site.head_dim  # of tokens that the site does not project
        image_width = heads_width if site.projects_out == "none" else site.channels
        text_width = (site.text_channels or site.channels) if site.projects_out in ("all", "outside") else heads_width
        return own.visual * site.sequences(self.tokens) * self._token(image_width) + own.text * self._token(text_width)

    def heads(self, heads: tuple[int, ...] | None) -> int:
        """Bytes of the outputs of some heads, or of all (None)."""
        length = self.site.tokens(self.tokens).total * self.site.sequences(self.tokens)
        return length * count_heads(heads, self.site) * self._token(self.site.head_dim)

    def residual(self, heads: tuple[int, ...] | None) -> int:
        """Bytes of the residuals of some heads, or of all (None): those of the visual tokens alone."""
        return self.tokens.visual * count_heads(heads, self.site) * self._token(self.site.head_dim)


@dataclass(frozen=True)
class _Entry:
    """An entry that a site writes in one step; `size` is in bytes for one sample.

    `in_both_calls`: where a step has two calls, the last reader reads the entry in both of them.
    """

    kind: EntryKind
    size: int
    last_reader: int
    conditional_only: bool = False
    in_both_calls: bool = True


@dataclass(frozen=True)
class _Lifetime:
    """Bytes per image that are held from when they are written to when they are freed.

    `_lifetimes_of` counts the transformer's calls, `memory` the site passes, each through all steps.
    """

    kind: EntryKind
    size: int
    written: int
    freed: int


def _entries(sizes: _EntryBytes, column: Sequence[Cell], writes: Writes) -> Iterator[_Entry]:
    """The entries that a site writes in one step."""
    for residual in writes.residuals:
        yield _Entry("residual", sizes.residual(residual.heads), residual.last_reader, residual.conditional_only)
    for output in writes.head_outputs:
        yield _Entry("heads", sizes.heads(output.heads), output.last_reader, output.conditional_only)
    if (until := writes.output_until) is not None:
        reader = column[until]  # a cell that shares replaces the outputs of both calls in the first one
        yield _Entry("output", sizes.output(), until, in_both_calls=isinstance(reader, Reuse) or not reader.share_cfg)
    if writes.slope_until is not None:
        yield _Entry("slope", sizes.output(), writes.slope_until)


def _lifetimes_of(
    sizes: _EntryBytes, column: Sequence[Cell], stored: Sequence[Writes], samples: int, calls: int
) -> Iterator[_Lifetime]:
    """The lifetimes of all that one site writes under its column, in calls of the transformer."""
    for step, (cell, writes) in enumerate(zip(column, stored, strict=True)):
        if isinstance(cell, Reuse):
            continue
        for entry in _entries(sizes, column, writes):
            if calls == 1:
                rows = 1 if entry.conditional_only else computed_samples(cell, samples)
                yield _Lifetime(entry.kind, entry.size * rows, step, entry.last_reader)
            else:
                yield from _in_two_calls(entry, cell, step)
        if calls == 2 and cell.share_cfg and (writes.output_until is None or sizes.dtype != "native"):
            # where a native output is stored, that entry is handed over
            yield _Lifetime("handed over", replace(sizes, dtype="native").output(), 2 * step, 2 * step + 1)


def _in_two_calls(entry: _Entry, cell: Attend, step: int) -> Iterator[_Lifetime]:
    """The lifetimes of an entry where a step has two calls: the conditional branch's is 2 · step, the other's 2 · step + 1."""
    last_call = 2 * entry.last_reader + (entry.in_both_calls and not entry.conditional_only)
    if cell.share_cfg:  # one tensor serves both calls
        yield _Lifetime(entry.kind, entry.size, 2 * step, last_call)
        return
    yield _Lifetime(entry.kind, entry.size, 2 * step, 2 * entry.last_reader)
    if not entry.conditional_only:
        yield _Lifetime(entry.kind, entry.size, 2 * step + 1, last_call)
