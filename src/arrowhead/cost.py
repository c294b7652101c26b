"""FLOPs and cache bytes in closed form. One multiply–add counts as two FLOPs, softmax is left out, as in both papers."""

from collections.abc import Sequence
from dataclasses import dataclass

from arrowhead.layout import Site, Tokens
from arrowhead.lifetimes import HeadOutput, Residual, Writes, lifetimes
from arrowhead.methods import FULL, Arrow, Attend, Cached, Cell, Full, Method, Reuse


@dataclass(frozen=True)
class Flops:
    """FLOPs, or fractions of the uncompressed run's: the two attention matmuls, and the module with its projections."""

    attention: float
    module: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.attention + other.attention, self.module + other.module)


def pairs(method: Method, tokens: Tokens) -> int:
    """How many query–key pairs the method looks at.

    A band of radius w over V visual tokens keeps V(2w + 1) − w(w + 1) of their V² pairs; text rows and columns are dense.
    """
    if isinstance(method, Cached):
        return 0
    if isinstance(method, Full):
        return tokens.total**2
    visual, text = tokens.visual, tokens.text
    w = min(method.radius, max(visual - 1, 0))
    return visual * (2 * w + 1) - w * (w + 1) + text * tokens.total + visual * text


def head_flops(site: Site, tokens: Tokens, method: Method) -> float:
    """The two matmuls of one head of one sample: Q·Kᵀ, and the weights times V. `tokens` are those of the call."""
    return 4 * site.head_dim * pairs(method, site.tokens(tokens))


def projection_flops(site: Site, tokens: Tokens, cell: Attend) -> float:
    """The Q, K, V and output projections of one sample: 8·N·d² where the heads' width is the model's width d.

    Cached heads need no Q, K and V, see `computed_heads`.
    """
    heads = computed_heads(site, cell)
    rows = {"all": site.tokens(tokens).total, "visual": tokens.visual, "none": 0}[site.projects_out]
    return 2 * site.channels * site.head_dim * (3 * len(heads) * site.tokens(tokens).total + site.heads * rows)


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
    return Flops(matmuls, matmuls + projection_flops(site, tokens, cell) * computed)


def remaining_flops(cells: Sequence[Sequence[Cell]], sites: Sequence[Site], tokens: Tokens, samples: int) -> Flops:
    """Fractions of the uncompressed run's FLOPs that steps × sites of cells leave."""
    spent, whole = Flops(0, 0), Flops(0, 0)
    for site, column in zip(sites, zip(*cells, strict=True), strict=True):
        for cell, writes in zip(column, lifetimes(column), strict=True):
            spent += site_flops(site, tokens, cell, writes, samples)
            whole += site_flops(site, tokens, FULL, Writes(), samples)
    return Flops(spent.attention / whole.attention, spent.module / whole.module)


def cache_bytes(
    cells: Sequence[Sequence[Cell]], sites: Sequence[Site], tokens: Tokens, samples: int, *, images: int, itemsize: int
) -> tuple[int, ...]:
    """The most bytes that the caches hold at any moment of each step.

    `images` are generated at once; an element of their activations takes `itemsize` bytes. Sites follow one another in
    order, and each frees what it has read for the last time before it writes.
    """
    columns = zip(*cells, strict=True)
    held = [_elements_held(site, tokens, column, samples) for site, column in zip(sites, columns, strict=True)]
    peaks, now = [], 0
    for step in range(len(cells)):
        peak = now
        for elements in held:
            now += elements[step] - (elements[step - 1] if step else 0)
            peak = max(peak, now)
        peaks.append(peak * images * itemsize)
    return tuple(peaks)


def _elements_held(site: Site, tokens: Tokens, column: Sequence[Cell], samples: int) -> list[int]:
    """Elements per image that one site holds after each step."""
    held = [0] * len(column)
    for step, (cell, writes) in enumerate(zip(column, lifetimes(column), strict=True)):
        if isinstance(cell, Reuse):
            continue
        rows = _computed_samples(cell, samples)
        if writes.output_until is not None:
            for later in range(step, writes.output_until):
                held[later] += rows * site.tokens(tokens).total * site.channels
        stored: list[tuple[Residual | HeadOutput, int]] = [(residual, tokens.visual) for residual in writes.residuals]
        stored += [(output, site.tokens(tokens).total) for output in writes.head_outputs]
        for entry, length in stored:
            kept = 1 if entry.conditional_only else rows
            for later in range(step, entry.last_reader):
                held[later] += kept * length * _count(entry.heads, site) * site.head_dim
    return held


def _count(heads: tuple[int, ...] | None, site: Site) -> int:
    return site.heads if heads is None else len(heads)


def _computed_samples(cell: Attend, samples: int) -> int:
    return 1 if cell.share_cfg else samples
