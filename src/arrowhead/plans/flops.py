"""FLOPs of a plan in closed form. A multiply–add counts as two FLOPs, and softmax is left out, as in both papers.

A multiply–add of 8-bit integers counts as one FLOP, because int8 tensor cores do two in the time of one in half precision. So a
full head in int8 counts 3/4 of a native one: half of Q·Kᵀ, and all of the attention weights times V. Encoding to int8 is left
out, as softmax is. These FLOPs are weighted work, not time: on the CPU, where int8 is emulated, int8 is not faster.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arrowhead.plans import masks
from arrowhead.plans.cells import FULL, Arrow, Attend, Cached, Cell, Full, Method, Reuse, precision_of
from arrowhead.plans.layout import Site, Tokens, counted_once
from arrowhead.plans.lifetimes import Writes, lifetimes_of_all


@dataclass(frozen=True)
class Flops:
    """FLOPs, or parts of the uncompressed run's FLOPs.

    `attention` counts the two matmuls of self-attention, Q·Kᵀ and the attention weights times V. `module` counts whole modules,
    their projections included.
    """

    attention: float
    module: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.attention + other.attention, self.module + other.module)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.attention * times, self.module * times)


def pairs(method: Method, tokens: Tokens) -> int:
    """The number of query–key pairs that a head computes under a method, in a sequence of these tokens."""
    if isinstance(method, Cached):
        return 0
    return masks.pairs(tokens, method.radius if isinstance(method, Arrow) else None)


def head_flops(site: Site, tokens: Tokens, method: Method) -> float:
    """FLOPs of the two matmuls of one head and one sample, in a call with these tokens.

    At a site of another kind, the matmuls of all heads of the sites within it.
    """
    if site.kind != "self_attention":
        return sum(inner.heads * head_flops(inner, tokens, Full()) for inner in site.within)
    return pair_flops(site, tokens, method) * pairs(method, site.tokens(tokens))


def pair_flops(site: Site, tokens: Tokens, method: Method) -> int:
    """FLOPs of one query–key pair of a head, in all sequences of one sample."""
    scores = 1 if precision_of(method) == "int8" else 2  # FLOPs of a multiply–add of Q·Kᵀ
    return (scores + 2) * site.head_dim * site.sequences(tokens)


def projection_flops(site: Site, tokens: Tokens, heads: int) -> float:
    """FLOPs of the projections of one sample: 8·N·d² for Q, K, V and output, where all heads together have the width d.

    Q, K and V are projected for `heads` heads (see `computed_heads`), but K and V for all where heads share them. At a site of
    another kind these are all FLOPs of the site, the matmuls of cross-attention included.
    """
    if site.kind != "self_attention":
        flops = 2 * (site.weights * site.tokens(tokens).total + site.text_weights * tokens.text)
        if site.kind == "cross_attention":
            flops += 4 * site.head_dim * tokens.visual * tokens.text
        return flops + sum(projection_flops(inner, tokens, inner.heads) for inner in site.within)
    besides = site.weights * site.tokens(tokens).total * site.sequences(tokens)
    if site.projects_out == "outside":
        return 2 * besides
    visual, text = _input_elements(site, tokens)
    projected_out = {"all": visual + text, "visual": visual, "none": 0}[site.projects_out]
    kv_heads = heads if site.kv_heads is None else site.kv_heads
    multiply_adds = site.head_dim * ((heads + 2 * kv_heads) * (visual + text) + site.heads * projected_out)
    return 2 * (multiply_adds + besides)


def _input_elements(site: Site, tokens: Tokens) -> tuple[int, int]:
    """Elements of one sample's visual tokens, and of its text tokens, at the site's input."""
    own = site.tokens(tokens)
    return own.visual * site.sequences(tokens) * site.channels, own.text * (site.text_channels or site.channels)


def head_projection_flops(site: Site, tokens: Tokens) -> float:
    """FLOPs of the projections of one sample that are saved for each cached head."""
    return projection_flops(site, tokens, 1) - projection_flops(site, tokens, 0) if site.separable_heads else 0


def computed_heads(site: Site, cell: Attend) -> tuple[int, ...]:
    """The heads whose Q, K and V are projected under a cell: those that are not cached, or all where heads are not separable.

    At least one head, because a processor has to call attention before it comes to its output projection.
    """
    if not site.separable_heads:
        return tuple(range(site.heads))
    return tuple(head for head, method in enumerate(cell.methods(site.heads)) if not isinstance(method, Cached)) or (0,)


def site_flops(site: Site, tokens: Tokens, cell: Cell, writes: Writes, samples: int) -> Flops:
    """FLOPs of one site in one step for one image. `samples` is 2 with both CFG branches, else 1.

    A residual that is stored costs its band once more, for the samples and heads that it is made for.

    >>> site = Site("attn", heads=16, head_dim=72, channels=1152)
    >>> site_flops(site, Tokens(1024), FULL, Writes(), samples=2).attention == 2 * 4 * 1024**2 * 1152
    True
    """
    if isinstance(cell, Reuse):
        return Flops(0, 0)
    computed = computed_samples(cell, samples)
    matmuls = sum(head_flops(site, tokens, method) for method in cell.methods(site.heads)) * computed
    for residual in writes.residuals:
        stored_for = 1 if residual.conditional_only else computed
        matmuls += head_flops(site, tokens, Arrow(residual.radius)) * stored_for * count_heads(residual.heads, site)
    return Flops(matmuls, matmuls + projection_flops(site, tokens, len(computed_heads(site, cell))) * computed)


def full_flops(sites: Iterable[Site], tokens: Tokens, samples: int) -> Flops:
    """FLOPs of sites that compute everything, in one step for one image."""
    return sum((site_flops(site, tokens, FULL, Writes(), samples) for site in sites), Flops(0, 0))


def remaining_flops(cells: Sequence[Sequence[Cell]], sites: Sequence[Site], tokens: Tokens, samples: int) -> Flops:
    """The parts of the uncompressed run's FLOPs that remain under steps × sites of cells."""
    spent, whole = Flops(0, 0), Flops(0, 0)
    columns = zip(*cells, strict=True)
    for site, column, stored in zip(counted_once(sites), columns, lifetimes_of_all(cells, sites), strict=True):
        for cell, writes in zip(column, stored, strict=True):
            spent += site_flops(site, tokens, cell, writes, samples)
            whole += site_flops(site, tokens, FULL, Writes(), samples)
    return Flops(spent.attention / (whole.attention or 1), spent.module / whole.module)


def count_heads(heads: tuple[int, ...] | None, site: Site) -> int:
    """The number of heads of an entry at a site; None stands for all."""
    return site.heads if heads is None else len(heads)


def computed_samples(cell: Attend, samples: int) -> int:
    """The number of samples that a cell computes of `samples`: one where it shares CFG."""
    return 1 if cell.share_cfg else samples
