"""FLOPs of a plan in closed form. One multiply–add counts as two FLOPs, softmax is left out, as in both papers.

A multiply–add of 8-bit integers counts as one, because int8 tensor cores do two in the time of one in half precision. So a full
head in int8 counts 3/4 of a native one: half of Q·Kᵀ and all of the weights times V. Quantisation is left out, as softmax is.
This is weighted work, not time: on the CPU, where int8 is emulated, it is not faster.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arrowhead.plans import masks
from arrowhead.plans.cells import FULL, Arrow, Attend, Cached, Cell, Full, Method, Reuse, precision_of
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import Writes, lifetimes


@dataclass(frozen=True)
class Flops:
    """FLOPs, or fractions of the uncompressed run's: attention's two matmuls, and whole modules, projections included."""

    attention: float
    module: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.attention + other.attention, self.module + other.module)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.attention * times, self.module * times)


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
    return projection_flops(site, tokens, 1) - projection_flops(site, tokens, 0) if site.separable_heads else 0


def computed_heads(site: Site, cell: Attend) -> tuple[int, ...]:
    """The heads whose Q, K and V are projected under a cell: those that are not cached, where the site can tell them apart.

    At least one, since it is by attention that a processor gets to its output projection.
    """
    if not site.separable_heads:
        return tuple(range(site.heads))
    return tuple(h for h, method in enumerate(cell.methods(site.heads)) if not isinstance(method, Cached)) or (0,)


def site_flops(site: Site, tokens: Tokens, cell: Cell, writes: Writes, samples: int) -> Flops:
    """FLOPs of one site in one step for one image: `samples` is 2 with CFG in the batch, else 1.

    A residual costs one more pass over its band, for as many samples and heads as it is made for.
    """
    if isinstance(cell, Reuse):
        return Flops(0, 0)
    computed = computed_samples(cell, samples)
    matmuls = sum(head_flops(site, tokens, method) for method in cell.methods(site.heads)) * computed
    for residual in writes.residuals:
        rows = 1 if residual.conditional_only else computed
        matmuls += head_flops(site, tokens, Arrow(residual.radius)) * rows * count_heads(residual.heads, site)
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


def count_heads(heads: tuple[int, ...] | None, site: Site) -> int:
    return site.heads if heads is None else len(heads)


def computed_samples(cell: Attend, samples: int) -> int:
    return 1 if cell.share_cfg else samples
