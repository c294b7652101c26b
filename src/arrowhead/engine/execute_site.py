"""One pass through a site: it is computed under its plan, or repeated; what later calls read is stored."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from arrowhead.engine.site_plan import AttendPlan, HeadGroup, HeadWrite, ReusePlan, SitePlan
from arrowhead.engine.stats import AttentionWork
from arrowhead.errors import PlanMismatch
from arrowhead.kernels import dispatch
from arrowhead.kernels.call import Call
from arrowhead.kernels.computed_pairs import Way, way_of
from arrowhead.kernels.head_index import put_heads, select_heads, serving
from arrowhead.plans import masks
from arrowhead.plans.cells import FULL, Method
from arrowhead.plans.layout import Tokens
from arrowhead.plans.lifetimes import Writes

ALL_ROWS = slice(None)


@dataclass(slots=True)  # not frozen: one is made in every pass
class SitePass:
    """One pass through a site whose module runs: its call, its plan, and the generation that it belongs to."""

    call: SiteCall
    plan: AttendPlan
    generation: Generation

    @classmethod
    def full(cls, call: SiteCall, generation: Generation) -> "SitePass":
        """A pass that leaves nothing out, and stores nothing."""
        plan = generation.prepared(call.site, FULL, Writes())
        assert isinstance(plan, AttendPlan)
        return cls(call, plan, generation)

    @property
    def tokens(self) -> Tokens:
        """What the site attends over."""
        return self.plan.tokens

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads whose Q, K and V are projected."""
        return self.plan.heads

    def record_pass(self) -> None:
        """Count that the site was passed."""
        self.generation.stats.record_pass(self.plan.count)

    def record_projections(self) -> None:
        """Count the projections of the heads that are projected, and the output projection."""
        self.generation.stats.record_work(self.plan.projections, self.plan.samples)

    def record_attention(
        self, rows: int, kernel: str = "native", work: AttentionWork | None = None, way: Way | None = None
    ) -> None:
        """Count one pass over queries and keys for `rows` of the batch, of all heads, or of those whose `work` it is."""
        samples = rows * self.generation.branches.samples / self.call.batch
        self.generation.stats.record_attention(work or self.plan.attention, samples, kernel, way)


def execute_site(call: SiteCall, plan: SitePlan, generation: Generation) -> Output:
    """The output of the site's module in this step, (B, N, C); stores what the plan says.

    Raises:
        PlanMismatch: a band was asked for, but the model's attention is causal; or the batch is another one.
        NotIntercepted: the module's attention could not be reached, or what the cell reads was never stored.
    """
    generation.require_rows(call, plan.sequences)
    generation.stats.record_pass(plan.count)
    if isinstance(plan, ReusePlan):
        return _reused(call, plan, generation)
    if plan.hands_over and generation.call == 1:
        out = call.restore(generation.cache.read(plan.handed_over, generation.step))
    else:
        out = _run(SitePass(call, plan, generation))
    if generation.branches.calls > 1:
        generation.cache.expire(plan.site.path, generation.step)
    if plan.stores:
        stats = generation.stats
        stats.peak_bytes = max(stats.peak_bytes, generation.held_bytes)
    return out


def _reused(call: SiteCall, plan: ReusePlan, generation: Generation) -> Output:
    """The stored output, scaled, and with its change since where it is extrapolated."""
    cache, step = generation.cache, generation.step
    if plan.plain:
        return call.restore(cache.read(plan.output, step))
    age, rows = cache.age(plan.output, step), call.batch
    out = scaled_rows(cache.read(plan.output, step), plan.scale, generation, rows)
    if any(plan.extrapolate):
        ahead = plan.extrapolate[0] * age, plan.extrapolate[1] * age
        out = add_scaled(out, scaled_rows(cache.read(plan.slope, step), ahead, generation, rows), 1)
    return call.restore(out)


def scaled_rows(value: Output, weights: tuple[float, float], generation: Generation, batch: int) -> Output:
    """A value (B, N, C): the conditional branch's rows times the first weight, the unconditional branch's times the second."""
    if generation.branches.calls > 1:
        weights = (weights[generation.call],) * 2
    if weights[0] == weights[1]:
        return value if weights[0] == 1 else map_output(value, lambda tensor: tensor * weights[0])
    conditional = generation.branches.conditional(batch)

    def scaled(tensor: Tensor) -> Tensor:
        out = tensor * weights[1]
        out[conditional] = tensor[conditional] * weights[0]
        return out

    return map_output(value, scaled)


def _run(site_pass: SitePass) -> Output:
    """Run the module, store what later calls read of its output, and give the output of both branches."""
    call, plan, generation = site_pass.call, site_pass.plan, site_pass.generation
    rows = generation.branches.conditional(call.batch) if plan.halved else None
    out = _computed(site_pass, rows)
    if not (plan.halved or plan.stores_output):
        return out
    storable = call.storable(out, rows)
    if plan.stores_output:
        storable = _store(storable, site_pass)
    return call.restore(both_branches(storable)) if plan.halved else out


def _computed(site_pass: SitePass, rows: slice | None) -> Output:
    """What the module gives for these rows, with each head under its method."""
    call, plan = site_pass.call, site_pass.plan
    attends = plan.site.kind == "self_attention"
    if attends and plan.untouched:
        out = call.native(rows)
        site_pass.record_attention(call.batch // 2 if plan.halved else call.batch)
    else:
        some = plan.heads if len(plan.heads) < plan.site.heads else None
        out = call.run(lambda attention: _attention(attention, site_pass), rows, some)
    site_pass.record_projections()
    if plan.site.within:
        site_pass.generation.stats.record_attention(plan.attention, plan.samples, "native")
    return out


def _store(out: Output, site_pass: SitePass) -> Output:
    """Store the output's change per step, the output, and what is handed over to the second call; gives what is stored."""
    plan, generation, writes = site_pass.plan, site_pass.generation, site_pass.plan.writes
    if plan.hands_over or writes.output_until is not None:
        out = compact_output(out)
    if writes.slope_until is not None:
        _write(plan.slope, _encoded(_slope(out, site_pass), site_pass), writes.slope_until, site_pass)
    exact = None
    if plan.hands_over:  # the second call goes on with the output itself, as both branches of one batch do
        exact = encode_output(out, plan.site.head_dim, generation.encoding.exact)
    if writes.output_until is not None:
        as_kept = exact if exact is not None and generation.encoding.dtype == "native" else _encoded(out, site_pass)
        _write(plan.output, as_kept, writes.output_until, site_pass)
    if exact is not None:
        generation.caches[1].write(plan.handed_over, Entry(exact, False, generation.step))
    return out


def _slope(out: Output, site_pass: SitePass) -> Output:
    """(O_a − O_b) / (a − b) for the output O_a of this step and O_b, the one computed before it."""
    plan, cache, step = site_pass.plan, site_pass.generation.cache, site_pass.generation.step
    age = cache.age(plan.output, step)
    change = add_scaled(out, cache.read(plan.output, step, conditional=plan.halved), -1)
    return map_output(change, lambda tensor: tensor / age)


def _encoded(value: Output, site_pass: SitePass) -> EncodedOutput:
    return encode_output(value, site_pass.plan.site.head_dim, site_pass.generation.encoding)


def _write(key: Key, value: EncodedOutput, last_reader: int, site_pass: SitePass) -> None:
    """Store a module output, or its slope: where the step has two calls, for both if it serves both branches."""
    plan, generation = site_pass.plan, site_pass.generation
    entry = Entry(value, plan.halved, last_reader, made=generation.step)
    generation.cache.write(key, entry)
    if plan.hands_over:
        generation.caches[1].write(key, entry)


def _attention(call: AttentionCall, site_pass: SitePass) -> Tensor:
    """Attention of every head under its method, and what is stored of it: (b, H, N, D), b the rows of the call."""
    plan = site_pass.plan
    if plan.native:
        out = call.native()
        site_pass.record_attention(call.q.shape[0])
    else:
        out = _by_method(call, site_pass)
    for write in plan.residual_writes:
        _write_heads(write, call, out, site_pass)
    for write in plan.output_writes:
        _write_heads(write, call, out, site_pass)
    return out


def _by_method(call: AttentionCall, site_pass: SitePass) -> Tensor:
    """Computed heads from a kernel, cached heads from the cache: (b, H, N, D)."""
    plan, group = site_pass.plan, site_pass.plan.computed
    cached = _read(plan.head_outputs, plan.cached, site_pass) if plan.cached else None
    if group is None:
        assert cached is not None
        return cached
    attended = _attend(call, group, ALL_ROWS, site_pass, _residuals(call, group, site_pass))
    if cached is None:
        return attended
    out = attended.new_empty(attended.shape[0], plan.site.heads, *attended.shape[2:])
    put_heads(out, group.heads, attended)
    put_heads(out, plan.cached, cached)
    return out


def _residuals(call: AttentionCall, group: HeadGroup, site_pass: SitePass) -> Tensor | None:
    """The stored residuals that these heads add, (b, h, V, D), undefined for the others; None if no head adds one."""
    if not group.residuals:
        return None
    if len(group.residuals[0].heads) == len(group.heads):
        return _read(group.residuals[0].key, group.heads, site_pass)
    out = call.q.new_empty(call.q.shape[0], len(group.heads), site_pass.tokens.visual, call.q.shape[3])
    for read in group.residuals:
        put_heads(out, read.places, _read(read.key, read.heads, site_pass))
    return out


def _read(key: Key, heads: tuple[int, ...], site_pass: SitePass) -> Tensor:
    """What earlier steps stored of these heads, (b, h, ·, D)."""
    plan, generation = site_pass.plan, site_pass.generation
    return generation.cache.read_heads(key, heads, plan.site.heads, generation.step, conditional=plan.halved)


def _write_heads(write: HeadWrite, call: AttentionCall, out: Tensor, site_pass: SitePass) -> None:
    """Store outputs of heads, (b, h, N, D), or their residuals R_r = O_r − W_r, (b, h, V, D) (WA-RS of DiTFastAttn).

    Both are from before the output projection.
    """
    generation, rows = site_pass.generation, ALL_ROWS
    if write.conditional_rows:
        if generation.call == 1:
            return
        rows = generation.branches.conditional(site_pass.call.batch)
    value, visual = out[rows], site_pass.tokens.visual_slice
    value = value if write.band is None else value[:, :, visual]
    if write.heads is not None:
        value = select_heads(value, write.heads)
    if write.band is not None:
        value = value - _attend(call, write.band, rows, site_pass)[:, :, visual]
        generation.stats.residuals += 1
    entry = Entry(
        _encoded(compact_output(value), site_pass), write.conditional_only, write.last_reader, write.heads, generation.step
    )
    generation.cache.write(write.key, entry)
    if write.both_calls:
        generation.caches[1].write(write.key, entry)


def attend_heads(
    call: AttentionCall,
    heads: Sequence[int],
    methods: Sequence[Method],
    rows: slice,
    site_pass: SitePass,
    residual: Tensor | None = None,
) -> Tensor:
    """Attention of these heads by a kernel, each by its own method, none of them cached: (rows, h, N, D); counted.

    `residual`, (rows, h, V, D), is added for the methods that say so; without it none is.

    Raises:
        PlanMismatch: the model's attention is causal, or drops weights, or is over other tokens than the site's.
    """
    return _attend(call, site_pass.plan.group(heads, methods), rows, site_pass, residual)


def _attend(call: AttentionCall, group: HeadGroup, rows: slice, site_pass: SitePass, residual: Tensor | None = None) -> Tensor:
    """`attend_heads` for a group that is prepared."""
    require_token_sizes(call, site_pass)
    if call.causal:
        raise PlanMismatch(
            f"{site_pass.plan.site.path}: got a plan with a band, int8 or heads of several kinds where the model's attention "
            "is causal or drops weights; wanted attention with a mask at most; search again without these"
        )
    q, k, v, mask = call.q, call.k, call.v, call.mask
    if mask is not None:
        mask = masks.part(mask[(None,) * (4 - mask.ndim)], 0, rows)
        mask = mask if mask.shape[1] == 1 else select_heads(mask, group.projected)
    if rows != ALL_ROWS:
        q, k, v = q[rows], k[rows], v[rows]
    projected = q.shape[1]
    if k.shape[1] < projected or not group.whole:
        of_keys = serving(group.projected, k.shape[1], projected)
        q, k, v = select_heads(q, group.projected), select_heads(k, of_keys), select_heads(v, of_keys)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    adds = () if residual is None else group.adds
    asked = Call(q, k, v, site_pass.tokens, group.policies, scale, mask, residual, adds)
    kernel = dispatch.resolve(site_pass.generation.kernel, asked)
    out = dispatch.attend(asked, kernel)
    site_pass.record_attention(q.shape[0], kernel, group.work, way_of(kernel, asked))
    return out if call.padding is None else out.masked_fill(call.padding[rows, None, :, None], 0)


def require_token_sizes(call: AttentionCall, site_pass: SitePass) -> None:
    """Check that Q and K have the heads and tokens of the site: an adapter may describe others, and no kernel would notice.

    Raises:
        PlanMismatch: Q and K have other sizes than the site.
    """
    plan, (heads, queries, width) = site_pass.plan, call.q.shape[1:]
    wanted = len(plan.heads), plan.tokens.total, plan.tokens.total, plan.site.head_dim
    if (got := (heads, queries, call.k.shape[2], width)) != wanted:
        raise PlanMismatch(
            f"{plan.site.path}: got {got}, wanted {wanted} heads, queries, keys and numbers in each; correct `tokens`, `over`, "
            "`joint` or `head_dim` of the adapter that says so, and search again"
        )
