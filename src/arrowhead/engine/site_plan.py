"""What one pass through a site does, prepared before it runs: cells and closed forms are looked at here, and not in a step.

A run prepares the site plans of all its steps when a generation begins; a search prepares one when it first needs it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from arrowhead.engine.cache import Key
from arrowhead.engine.stats import AttentionWork, PassCount, Work
from arrowhead.kernels.call import Policy
from arrowhead.plans.cells import (
    AST,
    FULL,
    Arrow,
    Attend,
    Cached,
    Cell,
    Full,
    Method,
    Reuse,
    branch_coefficients,
    method_name,
    paper_name,
    precision_of,
)
from arrowhead.plans.flops import Flops, computed_heads, head_flops, projection_flops, site_flops
from arrowhead.plans.layout import Branches, Site, Tokens
from arrowhead.plans.lifetimes import HeadOutput, Residual, Writes


@dataclass(frozen=True)
class ResidualRead:
    """A stored residual that some heads add; `places` are theirs within the group of heads that is attended with them."""

    key: Key
    heads: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class HeadGroup:
    """Heads that one call of a kernel attends.

    `projected` are the places of these heads among all that are projected; `whole`: these are all of them, in order. `adds` are
    the places, within the group, of the heads that add a residual. `work` is the group's attention.
    """

    heads: tuple[int, ...]
    projected: tuple[int, ...]
    whole: bool
    policies: tuple[Policy, ...]
    adds: tuple[int, ...]
    residuals: tuple[ResidualRead, ...]
    work: AttentionWork


@dataclass(frozen=True)
class HeadWrite:
    """Outputs of some heads (None: of all) to store, or, with `band`, their residuals: outputs less what `band` attends.

    `conditional_rows`: only the conditional branch's rows of what is computed are stored. `conditional_only`: the entry has one
    branch of a CFG batch. `both_calls`: both calls of a step read the entry.
    """

    key: Key
    heads: tuple[int, ...] | None
    last_reader: int
    conditional_rows: bool
    conditional_only: bool
    both_calls: bool
    band: HeadGroup | None = None


@dataclass(frozen=True, eq=False)
class ReusePlan:
    """A pass that repeats the stored output, or extrapolates it by a part of its change per step.

    `scale` and `extrapolate` are those of the cell, for the conditional and the unconditional branch. `plain`: it is repeated
    as it is. `inner` are the passes of the sites within a stack, which are not called.
    """

    site: Site
    count: PassCount
    sequences: int
    plain: bool
    scale: tuple[float, float]
    extrapolate: tuple[float, float]
    output: Key
    slope: Key
    inner: tuple[PassCount, ...] = ()


@dataclass(frozen=True, eq=False)
class AttendPlan:
    """A pass that runs the site's module.

    `tokens` are those of one sequence of the site, `call_tokens` those of the transformer's call. `heads` are projected, and
    `cached` ones read from the cache; `computed` are attended by a kernel. `native`: all heads run the model's own attention;
    `untouched`: besides, nothing of single heads is stored. `halved`: the module runs for the conditional half of a CFG batch.
    `hands_over`: the second call of a step takes the output of the first. `stores`: later steps, or that call, read something
    of this pass; `stores_output`: of its module's output. `samples` are those of an image that are computed.
    """

    site: Site
    count: PassCount
    sequences: int
    tokens: Tokens
    call_tokens: Tokens
    branches: Branches
    cell: Attend
    writes: Writes
    methods: tuple[Method, ...]
    heads: tuple[int, ...]
    cached: tuple[int, ...]
    computed: HeadGroup | None
    native: bool
    untouched: bool
    shared: bool
    halved: bool
    hands_over: bool
    stores: bool
    stores_output: bool
    samples: int
    attention: AttentionWork
    projections: Work
    residual_writes: tuple[HeadWrite, ...]
    output_writes: tuple[HeadWrite, ...]
    output: Key
    slope: Key
    head_outputs: Key
    handed_over: Key

    def group(self, heads: Sequence[int], methods: Sequence[Method]) -> HeadGroup:
        """These heads, each with its method, for one call of a kernel."""
        return _head_group(self.site, self.call_tokens, self.heads, tuple(heads), tuple(methods))


SitePlan = ReusePlan | AttendPlan


def prepare(site: Site, cell: Cell, writes: Writes, tokens: Tokens, branches: Branches, *, separable: bool = True) -> SitePlan:
    """The pass of a site under a cell that stores `writes`, in a call of the transformer with these tokens and branches.

    `separable`: single heads of the module can be projected. Without guidance there is one branch, and nothing is shared.
    """
    if isinstance(cell, Attend) and cell.share_cfg and not branches.guided:
        cell = replace(cell, share_cfg=False)
    count, sequences = _pass_count(site, cell, tokens, branches), site.sequences(tokens)
    output, slope, head_outputs = Key(site.path), Key(site.path, "slope"), Key(site.path, "heads")
    if isinstance(cell, Reuse):
        scale, extrapolate = branch_coefficients(cell.scale), branch_coefficients(cell.extrapolate)
        if not branches.guided:
            scale, extrapolate = (scale[0], scale[0]), (extrapolate[0], extrapolate[0])
        return ReusePlan(site, count, sequences, cell == AST, scale, extrapolate, output, slope)
    every, methods = tuple(range(site.heads)), cell.methods(site.heads)
    heads = computed_heads(site, cell) if separable else every
    cached = tuple(head for head in every if isinstance(methods[head], Cached))
    computed = tuple(head for head in every if head not in cached)
    native, hands_over = cell.method == Full(), cell.share_cfg and branches.calls == 2
    residual_writes = (
        _head_write(
            Key(site.path, "residual", residual.radius),
            residual,
            cell,
            branches,
            _band(site, tokens, heads, every if residual.heads is None else residual.heads, residual),
        )
        for residual in writes.residuals
    )
    return AttendPlan(
        site=site,
        count=count,
        sequences=sequences,
        tokens=site.tokens(tokens),
        call_tokens=tokens,
        branches=branches,
        cell=cell,
        writes=writes,
        methods=methods,
        heads=heads,
        cached=cached,
        computed=_head_group(site, tokens, heads, computed, tuple(methods[head] for head in computed)) if computed else None,
        native=native,
        untouched=native and not (writes.residuals or writes.head_outputs),
        shared=cell.share_cfg,
        halved=cell.share_cfg and branches.batched,
        hands_over=hands_over,
        stores=hands_over or writes != Writes(),
        stores_output=hands_over or writes.output_until is not None or writes.slope_until is not None,
        samples=1 if cell.share_cfg else branches.samples,
        attention=_attention_work(site, tokens, methods),
        projections=Work(Flops(0, _projection_flops(site, tokens, len(heads)))),
        residual_writes=tuple(residual_writes),
        output_writes=tuple(_head_write(head_outputs, write, cell, branches) for write in writes.head_outputs),
        output=output,
        slope=slope,
        head_outputs=head_outputs,
        handed_over=Key(site.path, "handed over"),
    )


@lru_cache(maxsize=2**12)  # the steps of a site differ in few numbers
def _whole_flops(site: Site, tokens: Tokens, samples: int) -> Flops:
    return site_flops(site, tokens, FULL, Writes(), samples)


@lru_cache(maxsize=2**12)
def _head_flops(site: Site, tokens: Tokens, method: Method) -> float:
    return head_flops(site, tokens, method)


@lru_cache(maxsize=2**12)
def _projection_flops(site: Site, tokens: Tokens, heads: int) -> float:
    return projection_flops(site, tokens, heads)


def _pass_count(site: Site, cell: Cell, tokens: Tokens, branches: Branches) -> PassCount:
    names: Counter[str] = Counter()
    if site.kind == "self_attention":  # other kinds have no heads
        if isinstance(cell, Attend):
            names.update(map(method_name, cell.methods(site.heads)))
        else:
            names[paper_name(cell)] = site.heads
    return PassCount(site.path, paper_name(cell), names, _whole_flops(site, tokens, branches.samples))


def _attention_work(site: Site, tokens: Tokens, methods: Sequence[Method]) -> AttentionWork:
    """The two matmuls of heads with these methods."""
    flops = sum(_head_flops(site, tokens, method) * count for method, count in Counter(methods).items())
    return AttentionWork(Flops(flops, flops), site, tokens, tuple(methods))


def _head_group(
    site: Site, tokens: Tokens, projected: tuple[int, ...], heads: tuple[int, ...], methods: tuple[Method, ...]
) -> HeadGroup:
    reads: dict[Key, list[int]] = {}
    for place, method in enumerate(methods):
        if isinstance(method, Arrow) and method.residual:
            reads.setdefault(Key(site.path, "residual", method.radius), []).append(place)
    return HeadGroup(
        heads,
        tuple(map(projected.index, heads)),
        heads == projected,
        tuple(Policy(method.radius if isinstance(method, Arrow) else None, precision_of(method)) for method in methods),
        tuple(sorted(place for places in reads.values() for place in places)),
        tuple(ResidualRead(key, tuple(heads[place] for place in places), tuple(places)) for key, places in reads.items()),
        _attention_work(site, tokens, methods),
    )


def _band(site: Site, tokens: Tokens, projected: tuple[int, ...], heads: tuple[int, ...], residual: Residual) -> HeadGroup:
    """What is taken from the full output of these heads for a residual."""
    return _head_group(site, tokens, projected, heads, (Arrow(residual.radius),) * len(heads))


def _head_write(
    key: Key, write: Residual | HeadOutput, cell: Attend, branches: Branches, band: HeadGroup | None = None
) -> HeadWrite:
    shared = cell.share_cfg
    only = write.conditional_only and branches.guided
    return HeadWrite(
        key,
        write.heads,
        write.last_reader,
        conditional_rows=only and not shared,
        conditional_only=branches.calls == 1 and ((shared and branches.batched) or only),
        both_calls=branches.calls == 2 and shared and not write.conditional_only,
        band=band,
    )
