"""One site in one step under one cell: where methods meet kernels and cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from arrowhead.engine.attention_hook import AttentionCall
from arrowhead.engine.cache import (
    EncodedOutput,
    Entry,
    Key,
    Output,
    add_scaled,
    both_branches,
    compact_output,
    encode_output,
    map_output,
)
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import PlanMismatch
from arrowhead.kernels import dispatch
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.head_index import head_index
from arrowhead.models.head_separation import can_project_heads_separately
from arrowhead.plans import masks
from arrowhead.plans.cells import Arrow, Attend, Cached, Cell, Full, Method, Reuse, grouped, precision_of
from arrowhead.plans.flops import computed_heads
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import HeadOutput, Residual, Writes


@dataclass(frozen=True)
class SitePass:
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
        return self.cell.share_cfg

    @property
    def untouched(self) -> bool:
        """Whether attention is the model's own, and nothing of single heads is kept."""
        return self.cell.method == Full() and not (self.writes.residuals or self.writes.head_outputs)

    @property
    def halved(self) -> bool:
        """Whether the module runs for half of its batch."""
        return self.shared and self.generation.branches.batched

    @property
    def tokens(self) -> Tokens:
        """What the site attends over."""
        return self.call.site.tokens(self.generation.tokens)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The method of each head."""
        return self.cell.methods(self.call.site.heads)


def execute_site(call: SiteCall, cell: Cell, writes: Writes, generation: Generation) -> Output:
    """What the site's module gives in this step, (B, N, C), storing what `writes` says.

    Raises:
        PlanMismatch: a band was asked for, but the model's attention is causal; or the batch is another one.
        NotIntercepted: the module's attention could not be reached, or what the cell reads was never stored.
    """
    site, cache, stats = call.site, generation.cache, generation.stats
    generation.require_rows(call)
    if isinstance(cell, Attend) and cell.share_cfg and not generation.branches.guided:
        cell = replace(cell, share_cfg=False)  # there is nothing to share
    stats.record_pass(site, cell, generation.tokens)
    if isinstance(cell, Reuse):
        return _reused(call, cell, generation)
    heads = computed_heads(site, cell)
    if len(heads) < site.heads and not can_project_heads_separately(
        call.module
    ):  # any more: the plan was applied before that changed
        heads = tuple(range(site.heads))
    passage = SitePass(call, cell, writes, generation, heads)
    if passage.shared and generation.call == 1:
        out = call.restore(cache.read(Key(site.path, "handed over"), generation.step))
    else:
        out = _run(passage)
    if generation.branches.calls > 1:
        cache.expire(site.path, generation.step)
    stats.peak_bytes = max(stats.peak_bytes, generation.held_bytes)
    return out


def _reused(call: SiteCall, cell: Reuse, generation: Generation) -> Output:
    key, slope, cache, step = Key(call.site.path), Key(call.site.path, "slope"), generation.cache, generation.step
    if not cell.extrapolate:
        return call.restore(cache.read(key, step))
    ahead = cell.extrapolate * cache.age(key, step)
    return call.restore(add_scaled(cache.read(key, step), cache.read(slope, step), ahead))


def _run(passage: SitePass) -> Output:
    """Run the module, and keep what of its output a later call reads; gives the output of both branches."""
    call, generation, site = passage.call, passage.generation, passage.call.site
    rows = generation.branches.conditional(call.batch) if passage.halved else None
    some = passage.heads if len(passage.heads) < site.heads else None
    if site.kind == "self_attention" and passage.untouched:
        out = call.native(rows)
        record_attention(passage, passage.methods, call.batch // 2 if passage.halved else call.batch, "native")
    else:
        out = call.run(lambda attention: _attention(attention, passage), rows, some)
    samples = 1 if passage.shared else generation.branches.samples
    generation.stats.record_projections(site, generation.tokens, len(passage.heads), samples)
    if site.within:
        generation.stats.record_attention(site, generation.tokens, passage.methods, samples, "native")
    handed_over = passage.shared and generation.branches.calls == 2
    if not (passage.halved or handed_over or passage.writes != Writes()):
        return out
    own = call.storable(out, rows)
    if handed_over or passage.writes.output_until is not None:
        own = compact_output(own)
    if passage.writes.slope_until is not None:
        _keep_slope(own, passage.writes.slope_until, passage)
    exact = encode_output(own, site.head_dim, replace(generation.encoding, dtype="native")) if handed_over else None
    if passage.writes.output_until is not None:
        in_full = exact if generation.encoding.dtype == "native" else None
        _keep(Key(site.path), in_full or _kept(own, passage), passage.writes.output_until, passage)
    if exact is not None:  # what both branches have in one batch is not rounded either
        generation.caches[1].write(Key(site.path, "handed over"), Entry(exact, False, generation.step))
    return call.restore(both_branches(own)) if passage.halved else out


def _keep_slope(out: Output, last_reader: int, passage: SitePass) -> None:
    """(O_a − O_b) / (a − b) for the output O_a of this step and O_b, the one computed before it."""
    cache, step, path = passage.generation.cache, passage.generation.step, passage.call.site.path
    age = cache.age(Key(path), step)
    change = add_scaled(out, cache.read(Key(path), step, conditional=passage.halved), -1)
    _keep(Key(path, "slope"), _kept(map_output(change, lambda tensor: tensor / age), passage), last_reader, passage)


def _kept(value: Output, passage: SitePass) -> EncodedOutput:
    return encode_output(value, passage.call.site.head_dim, passage.generation.encoding)


def _keep(key: Key, value: EncodedOutput, last_reader: int, passage: SitePass, of: Residual | HeadOutput | None = None) -> None:
    """Store what the conditional branch computed for both in both calls' caches; anything else in this call's."""
    generation = passage.generation
    only, heads = (False, None) if of is None else (of.conditional_only, of.heads)
    half = generation.branches.calls == 1 and (passage.halved or (only and generation.branches.guided))
    entry = Entry(value, half, last_reader, heads, generation.step)
    generation.cache.write(key, entry)
    if generation.branches.calls == 2 and passage.shared and not only:
        generation.caches[1].write(key, entry)


def _wanted(of: Residual | HeadOutput, passage: SitePass) -> slice | None:
    """The rows of what was computed that are to be kept: all, those of the conditional branch, or none."""
    branches = passage.generation.branches
    if not of.conditional_only or passage.shared or not branches.guided:
        return slice(None)
    return None if passage.generation.call == 1 else branches.conditional(passage.call.batch)


def _attention(call: AttentionCall, passage: SitePass) -> Tensor:
    """Attention of every head under its method, and what is kept of it: (b, H, N, D), b the rows of the call."""
    if passage.cell.method == Full():
        out = call.native()
        record_attention(passage, passage.methods, call.q.shape[0], "native")
    else:
        out = _by_method(call, passage)
    for residual in passage.writes.residuals:
        _write_residual(call, out, residual, passage)
    for of_heads in passage.writes.head_outputs:
        if (rows := _wanted(of_heads, passage)) is not None:
            value = out[rows] if of_heads.heads is None else out[rows, head_index(of_heads.heads, out.device)]
            key = Key(passage.call.site.path, "heads")
            _keep(key, _kept(compact_output(value), passage), of_heads.last_reader, passage, of_heads)
    return out


def _by_method(call: AttentionCall, passage: SitePass) -> Tensor:
    """Each head by its own; (b, H, N, D)."""
    site, methods = passage.call.site, passage.methods
    cached = tuple(head for head, method in enumerate(methods) if isinstance(method, Cached))
    computed = tuple(head for head in range(site.heads) if head not in cached)
    if not cached:
        return attend_heads(call, computed, methods, slice(None), passage, _residual(call, computed, passage))
    out = call.q.new_empty(call.q.shape[0], site.heads, *call.q.shape[2:])
    if computed:
        own = [methods[head] for head in computed]
        out[:, head_index(computed, out.device)] = attend_heads(
            call, computed, own, slice(None), passage, _residual(call, computed, passage)
        )
    out[:, head_index(cached, out.device)] = _read(Key(site.path, "heads"), cached, passage)
    return out


def _residual(call: AttentionCall, heads: tuple[int, ...], passage: SitePass) -> Tensor | None:
    """What earlier steps kept for those of these heads that add it, (b, h, V, D), undefined for others; None if none does."""
    site = passage.call.site
    keys = [_residual_key(site, passage.methods[head]) for head in heads]
    found = [(key, own) for key, own in grouped(keys) if key is not None]
    if len(found) == 1 and len(found[0][1]) == len(heads):
        return _read(found[0][0], heads, passage)
    if not found:
        return None
    out = call.q.new_empty(call.q.shape[0], len(heads), passage.tokens.visual, call.q.shape[3])
    for key, own in found:
        out[:, head_index(own, out.device)] = _read(key, [heads[place] for place in own], passage)
    return out


def _read(key: Key, heads: Sequence[int], passage: SitePass) -> Tensor:
    """What earlier steps kept of these heads, (b, h, ·, D)."""
    generation, count = passage.generation, passage.call.site.heads
    return generation.cache.read_heads(key, heads, count, generation.step, conditional=passage.halved)


def _residual_key(site: Site, method: Method) -> Key | None:
    """Where the residual is that a head adds."""
    return Key(site.path, "residual", method.radius) if isinstance(method, Arrow) and method.residual else None


def _write_residual(call: AttentionCall, out: Tensor, residual: Residual, passage: SitePass) -> None:
    """R_r = O_r − W_r over the visual tokens, (b, h, V, D), before the output projection (WA-RS of DiTFastAttn)."""
    generation, site = passage.generation, passage.call.site
    if (rows := _wanted(residual, passage)) is None:
        return
    heads = tuple(range(site.heads)) if residual.heads is None else residual.heads
    visual = passage.tokens.visual_slice
    methods = [Arrow(residual.radius)] * len(heads)
    band = attend_heads(call, heads, methods, rows, passage)[:, :, visual]
    whole = out[rows, :, visual] if residual.heads is None else out[rows, head_index(heads, out.device), visual]
    key = Key(site.path, "residual", residual.radius)
    _keep(key, _kept(whole - band, passage), residual.last_reader, passage, residual)
    generation.stats.residuals += 1


def attend_heads(
    call: AttentionCall,
    heads: Sequence[int],
    methods: Sequence[Method],
    rows: slice,
    passage: SitePass,
    residual: Tensor | None = None,
) -> Tensor:
    """Attention of these heads by a kernel, each by its own method, none of them cached: (rows, h, N, D); counted.

    `residual`, (rows, h, V, D), is added for the methods that say so; without it none is.

    Raises:
        PlanMismatch: the model's attention is causal, or drops weights, or is over other tokens than the site's.
    """
    site = passage.call.site
    require_token_sizes(call, passage)
    if call.causal:
        raise PlanMismatch(
            f"{site.path}: got a plan with a band, int8 or heads of several kinds where the model's attention is causal or "
            "drops weights; wanted attention with a mask at most; search again without these"
        )
    own, all_heads = tuple(passage.heads.index(head) for head in heads), call.q.shape[1]
    where = head_index(own, call.q.device)
    q = call.q[rows][:, where]
    k, v = (_serving(own, tensor[rows], all_heads) for tensor in (call.k, call.v))
    mask = None if call.mask is None else call.mask[(None,) * (4 - call.mask.ndim)]
    if mask is not None:
        mask = masks.part(masks.part(mask, 0, rows), 1, where)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    asked = Call(q, k, v, passage.tokens, tuple(map(_policy, methods)), scale, mask)
    if residual is not None:
        adds = tuple(place for place, method in enumerate(methods) if _residual_key(site, method) is not None)
        asked = replace(asked, residual=residual, adds=adds)
    kernel = dispatch.resolve(passage.generation.kernel, asked)
    record_attention(passage, methods, len(q), kernel)
    return dispatch.attend(asked, kernel)


def require_token_sizes(call: AttentionCall, passage: SitePass) -> None:
    """Check that tokens are where masks take them to be: an adapter may say otherwise, and no kernel would notice."""
    site, tokens, (heads, queries, width) = passage.call.site, passage.tokens.total, call.q.shape[1:]
    wanted = len(passage.heads), tokens, tokens, site.head_dim
    if (got := (heads, queries, call.k.shape[2], width)) != wanted:
        raise PlanMismatch(
            f"{site.path}: got {got}, wanted {wanted} heads, queries, keys and numbers in each; correct `tokens`, `over`, "
            "`joint` or `head_dim` of the adapter that says so, and search again"
        )


def _serving(heads: tuple[int, ...], tensor: Tensor, of: int) -> Tensor:
    """What serves these of so many heads, (B, h, N, D), of keys or values that may have fewer."""
    return tensor[:, head_index(tuple(head * tensor.shape[1] // of for head in heads), tensor.device)]


def _policy(method: Method) -> Policy:
    return Policy(method.radius if isinstance(method, Arrow) else None, precision_of(method))


def record_attention(passage: SitePass, methods: Sequence[Method], rows: int, kernel: str) -> None:
    """Tally one pass over queries and keys, of `rows` of the batch, for heads with these methods."""
    generation, site = passage.generation, passage.call.site
    generation.stats.record_attention(site, generation.tokens, methods, rows / passage.images, kernel)
