"""FLOPs and cache bytes in closed form. One multiply–add counts as two FLOPs, softmax is left out, as in both papers.

A multiply–add of 8-bit integers counts as one, since int8 tensor cores do two in the time of one in half precision: a full head
in int8 counts 3/4 of a native one, half of Q·Kᵀ and all of the weights times V. Quantising is left out as softmax is. This is
weighted work, not time: on the CPU, where int8 is emulated, it is not faster.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from arrowhead.kernels import masks
from arrowhead.layout import Site, Tokens
from arrowhead.lifetimes import What, Writes, lifetimes
from arrowhead.methods import FULL, Arrow, Attend, Cached, Cell, Full, Method, Reuse, precision_of
from arrowhead.stored import SCALE_BYTES, CacheDtype, groups


@dataclass(frozen=True)
class Flops:
    """FLOPs, or fractions of the uncompressed run's: attention's two matmuls, and whole modules, projections included."""

    attention: float
    module: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.attention + other.attention, self.module + other.module)


def pairs(method: Method, tokens: Tokens) -> int:
    """How many query–key pairs the method looks at."""
    if isinstance(method, Cached):
        return 0
    return masks.pairs(tokens, method.radius if isinstance(method, Arrow) else None)


def head_flops(site: Site, tokens: Tokens, method: Method) -> float:
    """The two matmuls of one head of one sample: Q·Kᵀ, half of it where it is int8, and the weights times V.

    `tokens` are those of the call.
    """
    if site.kind != "self_attention":
        return sum(own.heads * head_flops(own, tokens, Full()) for own in site.within)
    of_scores = 1 if precision_of(method) == "int8" else 2
    return (of_scores + 2) * site.head_dim * pairs(method, site.tokens(tokens)) * site.sequences(tokens)


def projection_flops(site: Site, tokens: Tokens, heads: int) -> float:
    """The Q, K, V and output projections of one sample: 8·N·d² where the heads' width is the model's width d.

    Q, K and V are those of `heads` heads, see `computed_heads`; but K and V of all where heads share them. Of other kinds of
    sites, all that they multiply; attention to the text included, which no method says anything of.
    """
    if site.kind != "self_attention":
        own = 2 * (site.weights * site.tokens(tokens).total + site.text_weights * tokens.text)
        if site.kind == "cross_attention":
            own += 4 * site.head_dim * tokens.visual * tokens.text
        return own + sum(projection_flops(inner, tokens, inner.heads) for inner in site.within)
    visual, text = _inputs(site, tokens)
    rows = {"all": visual + text, "visual": visual, "none": 0}[site.projects_out]
    keys = heads if site.kv_heads is None else site.kv_heads
    of_heads = site.head_dim * ((heads + 2 * keys) * (visual + text) + site.heads * rows)
    return 2 * (of_heads + site.weights * site.tokens(tokens).total * site.sequences(tokens))


def _inputs(site: Site, tokens: Tokens) -> tuple[int, int]:
    """Elements of one sample at the site's input: the image's, and the text's where it attends to that, too."""
    own = site.tokens(tokens)
    return own.visual * site.sequences(tokens) * site.channels, own.text * (site.text_channels or site.channels)


def head_projection_flops(site: Site, tokens: Tokens) -> float:
    """What a cached head saves of the projections of one sample."""
    return projection_flops(site, tokens, 1) - projection_flops(site, tokens, 0) if site.heads_apart else 0


def computed_heads(site: Site, cell: Attend) -> tuple[int, ...]:
    """The heads whose Q, K and V are projected under a cell: those that are not cached, where the site can tell them apart.

    At least one, since it is by attention that a processor gets to its output projection.
    """
    if not site.heads_apart:
        return tuple(range(site.heads))
    return tuple(h for h, method in enumerate(cell.methods(site.heads)) if not isinstance(method, Cached)) or (0,)


def site_flops(site: Site, tokens: Tokens, cell: Cell, writes: Writes, samples: int) -> Flops:
    """FLOPs of one site in one step for one image: `samples` is 2 with CFG in the batch, else 1.

    A residual costs one more pass over its band, for as many samples and heads as it is made for.
    """
    if isinstance(cell, Reuse):
        return Flops(0, 0)
    computed = _computed_samples(cell, samples)
    matmuls = sum(head_flops(site, tokens, method) for method in cell.methods(site.heads)) * computed
    for residual in writes.residuals:
        rows = 1 if residual.conditional_only else computed
        matmuls += head_flops(site, tokens, Arrow(residual.radius)) * rows * _count(residual.heads, site)
    return Flops(matmuls, matmuls + projection_flops(site, tokens, len(computed_heads(site, cell))) * computed)


def full_flops(sites: Iterable[Site], tokens: Tokens, samples: int) -> Flops:
    """FLOPs of sites that leave nothing out, in one step for one image."""
    return sum((site_flops(site, tokens, FULL, Writes(), samples) for site in sites), Flops(0, 0))


def remaining_flops(cells: Sequence[Sequence[Cell]], sites: Sequence[Site], tokens: Tokens, samples: int) -> Flops:
    """Fractions of the uncompressed run's FLOPs that steps × sites of cells leave."""
    spent, whole = Flops(0, 0), Flops(0, 0)
    for site, column in zip(sites, zip(*cells, strict=True), strict=True):
        for cell, writes in zip(column, lifetimes(column), strict=True):
            spent += site_flops(site, tokens, cell, writes, samples)
            whole += site_flops(site, tokens, FULL, Writes(), samples)
    return Flops(spent.attention / (whole.attention or 1), spent.module / whole.module)


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
    held: list[tuple[int, int, _Stored]] = []
    for place, (site, column) in enumerate(zip(sites, zip(*cells, strict=True), strict=True)):
        for stored in _stored(site, tokens, column, samples, calls, itemsize, cache_dtype):
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
class _Stored:
    """Bytes per image that one site holds from one call of the transformer to another, counted through all steps."""

    what: What
    size: int
    written: int
    freed: int


def _stored(
    site: Site, tokens: Tokens, column: Sequence[Cell], samples: int, calls: int, itemsize: int, dtype: CacheDtype
) -> Iterator[_Stored]:
    def row(channels: int) -> int:
        return channels * itemsize if dtype == "native" else channels + SCALE_BYTES * groups(channels, site.head_dim)

    exact, output = _outputs(site, tokens, lambda channels: channels * itemsize), _outputs(site, tokens, row)
    length, own = site.tokens(tokens).total * site.sequences(tokens), row(site.head_dim)
    for step, (cell, writes) in enumerate(zip(column, lifetimes(column), strict=True)):
        if isinstance(cell, Reuse):
            continue
        kept: list[tuple[What, int, int, bool, bool]] = [
            ("residual", tokens.visual * _count(made.heads, site) * own, made.last_reader, made.conditional_only, True)
            for made in writes.residuals
        ]
        for made in writes.head_outputs:
            kept.append(("heads", length * _count(made.heads, site) * own, made.last_reader, made.conditional_only, True))
        if (until := writes.output_until) is not None:
            reader = column[until]  # one that shares writes its own output over both calls' in the first of them
            kept.append(("output", output, until, False, isinstance(reader, Reuse) or not reader.share_cfg))
        if writes.slope_until is not None:
            kept.append(("slope", output, writes.slope_until, False, True))
        if calls == 1:
            rows = _computed_samples(cell, samples)
            yield from (_Stored(what, size * (1 if half else rows), step, last) for what, size, last, half, _ in kept)
            continue
        for what, size, last, half, twice in kept:
            second = 2 * last + (twice and not half)
            if cell.share_cfg:  # one tensor, which serves both calls
                yield _Stored(what, size, 2 * step, second)
                continue
            yield _Stored(what, size, 2 * step, 2 * last)
            if not half:
                yield _Stored(what, size, 2 * step + 1, second)
        if cell.share_cfg and (writes.output_until is None or dtype != "native"):  # from the first call to the second
            yield _Stored("handed over", exact, 2 * step, 2 * step + 1)


def _outputs(site: Site, tokens: Tokens, row: Callable[[int], int]) -> int:
    """Bytes of a module's output of one sample, whose tokens take `row` by their channels."""
    own, width = site.tokens(tokens), site.heads * site.head_dim
    of_text = (site.text_channels or site.channels) if site.projects_out == "all" else width  # the heads', unless projected
    of_image = width if site.projects_out == "none" else site.channels
    return own.visual * site.sequences(tokens) * row(of_image) + own.text * row(of_text)


def _count(heads: tuple[int, ...] | None, site: Site) -> int:
    return site.heads if heads is None else len(heads)


def _computed_samples(cell: Attend, samples: int) -> int:
    return 1 if cell.share_cfg else samples
