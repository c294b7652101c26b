"""One site in one step under one cell: where methods meet kernels and cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from arrowhead.cache import Cache, Key, Output, both_branches
from arrowhead.cost import computed_heads
from arrowhead.errors import PlanMismatch
from arrowhead.intercept import SiteCall
from arrowhead.kernels import dispatch
from arrowhead.layout import Branches, Tokens
from arrowhead.lifetimes import Residual, Writes
from arrowhead.methods import Arrow, Attend, Cached, Cell, Full, Method, Reuse, grouped
from arrowhead.route import AttentionCall
from arrowhead.tally import Tally


@dataclass
class Generation:
    """What one generation carries from call to call, and forgets at its end."""

    branches: Branches
    tokens: Tokens
    kernel: str
    cache: Cache
    tally: Tally
    step: int = 0


@dataclass(frozen=True)
class Passage:
    """One passage of a site: its call, what is done in it, and the generation that it belongs to.

    `heads` are those whose Q, K and V are computed.
    """

    call: SiteCall
    cell: Attend
    writes: Writes
    generation: Generation
    heads: tuple[int, ...]

    @property
    def images(self) -> float:
        """Images in the batch, each of one or two samples."""
        return self.call.batch / self.generation.branches.samples

    @property
    def shared(self) -> bool:
        """Whether the conditional branch is computed for both."""
        return self.cell.share_cfg and self.generation.branches.guided

    @property
    def tokens(self) -> Tokens:
        """What the site attends over."""
        return self.call.site.tokens(self.generation.tokens)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The method of each head."""
        return self.cell.methods(self.call.site.heads)


def attend(call: SiteCall, cell: Cell, writes: Writes, generation: Generation) -> Output:
    """What the site's module gives in this step, (B, N, C), storing what `writes` says.

    Raises:
        PlanMismatch: a band was asked for, but the model's attention is causal.
        NotIntercepted: the module's attention could not be reached, or what the cell reads was never stored.
    """
    site, cache, tally = call.site, generation.cache, generation.tally
    tally.passed(site, cell, generation.tokens)
    if isinstance(cell, Reuse):
        return cache.read(Key(site.path), generation.step)
    passage = Passage(call, cell, writes, generation, computed_heads(site, cell))
    rows = generation.branches.conditional(call.batch) if passage.shared else None
    some = passage.heads if len(passage.heads) < site.heads else None
    out = call.run(lambda attention: _attention(attention, passage), rows, some)
    tally.projected(site, generation.tokens, cell, 1 if passage.shared else generation.branches.samples)
    if writes.output_until is not None:
        cache.write(Key(site.path), out, conditional_only=passage.shared, last_reader=writes.output_until)
    tally.peak_bytes = max(tally.peak_bytes, cache.held_bytes)
    return both_branches(out) if passage.shared else out


def _attention(call: AttentionCall, passage: Passage) -> Tensor:
    """Attention of every head under its method, and what is kept of it: (b, H, N, D), b the rows of the call."""
    methods = passage.methods
    if methods == (Full(),) * len(methods):
        out = call.native()
        _count(passage, methods, call.q.shape[0], "native")
    else:
        out = _by_method(call, passage)
    for residual in passage.writes.residuals:
        _write_residual(call, out, residual, passage)
    for kept in passage.writes.head_outputs:
        halve, half = _half(kept.conditional_only, passage)
        rows = passage.generation.branches.conditional(out.shape[0]) if halve else slice(None)
        value = out[rows] if kept.heads is None else out[rows, list(kept.heads)]
        key = Key(passage.call.site.path, "heads")
        passage.generation.cache.write(key, value, conditional_only=half, last_reader=kept.last_reader, heads=kept.heads)
    return out


def _by_method(call: AttentionCall, passage: Passage) -> Tensor:
    """Heads of the same kind together; (b, H, N, D)."""
    generation, site, methods = passage.generation, passage.call.site, passage.methods
    computed = tuple(head for head, method in enumerate(methods) if not isinstance(method, Cached))
    out = call.q.new_empty(call.q.shape[0], site.heads, *call.q.shape[2:])
    if computed:
        radii = [method.radius if isinstance(method, Arrow) else None for method in methods]
        attended = bands(call, computed, [radii[head] for head in computed], slice(None), passage)
        if len(computed) == site.heads:
            out = attended
        else:
            out[:, list(computed)] = attended
        _count(passage, methods, call.q.shape[0], generation.kernel)
    for method, heads in grouped(methods):
        every = len(heads) == site.heads
        if isinstance(method, Cached):
            key = Key(site.path, "heads")
            kept = generation.cache.read_heads(key, heads, site.heads, generation.step, conditional=passage.shared)
            if every:
                out = kept
            else:
                out[:, list(heads)] = kept
        elif isinstance(method, Arrow) and method.residual:
            key = Key(site.path, "residual", method.radius)
            kept = generation.cache.read_heads(key, heads, site.heads, generation.step, conditional=passage.shared)
            visual = passage.tokens.visual_slice
            if every:
                out[:, :, visual] += kept
            else:
                out[:, list(heads), visual] += kept
    return out


def _half(conditional_only: bool, passage: Passage) -> tuple[bool, bool]:
    """Whether to halve what was computed before it is kept, and whether what is kept is the conditional half."""
    halve = conditional_only and passage.generation.branches.guided and not passage.shared
    return halve, halve or passage.shared


def _write_residual(call: AttentionCall, out: Tensor, residual: Residual, passage: Passage) -> None:
    """R_r = O_r − W_r over the visual tokens, (b, h, V, D), before the output projection (WA-RS of DiTFastAttn)."""
    generation, site = passage.generation, passage.call.site
    halve, half = _half(residual.conditional_only, passage)
    rows = generation.branches.conditional(call.q.shape[0]) if halve else slice(None)
    heads = tuple(range(site.heads)) if residual.heads is None else residual.heads
    visual = passage.tokens.visual_slice
    band = bands(call, heads, [residual.radius] * len(heads), rows, passage)[:, :, visual]
    whole = out[rows, :, visual] if residual.heads is None else out[rows, list(heads), visual]
    key = Key(site.path, "residual", residual.radius)
    generation.cache.write(key, whole - band, conditional_only=half, last_reader=residual.last_reader, heads=residual.heads)
    generation.tally.residuals += 1
    _count(passage, [Arrow(residual.radius)] * len(heads), band.shape[0], generation.kernel)


def bands(call: AttentionCall, heads: Sequence[int], radii: Sequence[int | None], rows: slice, passage: Passage) -> Tensor:
    """Attention of these heads, each with its own radius or full (None): (rows, h, N, D).

    Raises:
        PlanMismatch: the model's attention is causal, or drops weights.
    """
    generation, site = passage.generation, passage.call.site
    if call.causal:
        raise PlanMismatch(
            f"{site.path}: got a plan with a band or with heads of several kinds where the model's attention is causal or "
            "drops weights; wanted attention with a mask at most; search again without bands"
        )
    q, k, v, mask = call.q[rows], call.k[rows], call.v[rows], call.mask
    if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[rows]
    places = [passage.heads.index(head) for head in heads]
    if places != list(range(q.shape[1])):
        q, k, v = q[:, places], k[:, places], v[:, places]
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, places]
    return dispatch.arrow(q, k, v, passage.tokens, radii, scale=call.scale, mask=mask, kernel=generation.kernel)


def _count(passage: Passage, methods: Sequence[Method], rows: int, kernel: str) -> None:
    generation, site = passage.generation, passage.call.site
    generation.tally.attended(site, generation.tokens, methods, rows / passage.images, kernel)
