"""FLOPs and cache bytes in closed form. One multiply–add counts as two FLOPs, softmax is left out, as in both papers."""

from collections.abc import Sequence
from dataclasses import dataclass

from arrowhead.layout import Site, Tokens
from arrowhead.lifetimes import Writes, lifetimes
from arrowhead.methods import FULL, Arrow, Attend, Cell, Full, Method, Reuse


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
    if isinstance(method, Full):
        return tokens.total**2
    visual, text = tokens.visual, tokens.text
    w = min(method.radius, max(visual - 1, 0))
    return visual * (2 * w + 1) - w * (w + 1) + text * tokens.total + visual * text


def matmul_flops(site: Site, tokens: Tokens, method: Method) -> float:
    """The two matmuls of one sample's attention: Q·Kᵀ, and the weights times V."""
    return 4 * site.heads * site.head_dim * pairs(method, tokens)


def projection_flops(site: Site, tokens: Tokens) -> float:
    """The Q, K, V and output projections of one sample: 8·N·d² where the heads' width is the model's width d."""
    return 8 * tokens.total * site.channels * site.heads * site.head_dim


def site_flops(site: Site, tokens: Tokens, cell: Cell, writes: Writes, samples: int) -> Flops:
    """FLOPs of one site in one step for one image: `samples` is 2 with CFG in the batch, else 1.

    A residual costs one more pass over its band, for as many samples as it is made for.
    """
    if isinstance(cell, Reuse):
        return Flops(0, 0)
    computed = _computed_samples(cell, samples)
    matmuls = matmul_flops(site, tokens, cell.method) * computed
    for residual in writes.residuals:
        rows = 1 if residual.conditional_only else computed
        matmuls += matmul_flops(site, tokens, Arrow(residual.radius)) * rows
    return Flops(matmuls, matmuls + projection_flops(site, tokens) * computed)


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
                held[later] += rows * tokens.total * site.channels
        for residual in writes.residuals:
            kept = 1 if residual.conditional_only else rows
            for later in range(step, residual.last_reader):
                held[later] += kept * tokens.visual * site.heads * site.head_dim
    return held


def _computed_samples(cell: Attend, samples: int) -> int:
    return 1 if cell.share_cfg else samples
