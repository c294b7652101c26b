"""Counters of what one generation really did, and the summary made from them. Nothing here looks at a plan.

The numbers that belong to a piece of work are prepared before it runs (`SitePlan`). Where the work is done, it is counted once:
what it cost is summed up when somebody asks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from arrowhead.kernels.computed_pairs import Way, computed_pairs
from arrowhead.plans.cells import FULL, Arrow, Method
from arrowhead.plans.flops import Flops, pair_flops, pairs, site_flops
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import Writes

NO_FLOPS = Flops(0, 0)


@dataclass(frozen=True, eq=False)
class PassCount:
    """What one site pass adds to the counters: names of the cell and of its heads' methods, and FLOPs of full attention."""

    path: str
    cell: str
    heads: Mapping[str, int]
    whole: Flops


@dataclass(frozen=True, eq=False)
class Work:
    """A piece of work, such as the projections of a site: its FLOPs for one sample."""

    flops: Flops


@dataclass(frozen=True, eq=False)
class AttentionWork(Work):
    """The two matmuls of some heads of a site, each under its method."""

    site: Site
    tokens: Tokens
    methods: tuple[Method, ...]

    def masked(self, way: Way) -> Flops:
        """FLOPs of one sample for pairs that a kernel computes besides those that are kept, when it computes in some way."""
        flops, own = 0, self.site.tokens(self.tokens)
        for method, heads in Counter(self.methods).items():
            radius = method.radius if isinstance(method, Arrow) else None
            extra = computed_pairs(way, own, radius) - pairs(method, own)
            flops += heads * extra * pair_flops(self.site, self.tokens, method)
        return Flops(flops, flops)


@dataclass
class Stats:
    """What has been computed and reused so far in one generation, in all of its denoising loops. FLOPs are per image.

    `samples` are those of an image in one call of the transformer, and `calls` counts these calls. `done` has the samples of an
    image that each piece of work was done for; `attended` those of attention by kernels, with the way in which they computed.
    `passes` are the site passes so far. `beside` counts calls of the transformer that are no step's own, and run in full.
    `looped` are the steps of the loops that have ended.
    """

    samples: int
    calls: int = 0
    steps: int = 0
    passes: int = 0
    beside: int = 0
    looped: int = 0
    counts: Counter[PassCount] = field(default_factory=Counter)
    done: defaultdict[Work, float] = field(default_factory=lambda: defaultdict(float))
    attended: defaultdict[tuple[AttentionWork, Way], float] = field(default_factory=lambda: defaultdict(float))
    kernels: Counter[str] = field(default_factory=Counter)
    residuals: int = 0
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    missed: Flops = NO_FLOPS
    """FLOPs of the calls in which a site was not passed."""

    def record_pass(self, count: PassCount) -> None:
        """Count that a site was passed."""
        self.counts[count] += 1
        self.passes += 1

    def record_work(self, work: Work, samples: float) -> None:
        """Count work that ran for so many samples of an image."""
        self.done[work] += samples

    def record_attention(self, work: AttentionWork, samples: float, kernel: str, way: Way | None = None) -> None:
        """Count one pass over queries and keys by a kernel, for so many samples of an image. `way`: how the kernel computes."""
        self.record_work(work, samples)
        self.kernels[kernel] += 1
        if way is not None:
            self.attended[work, way] += samples

    @property
    def spent(self) -> Flops:
        """FLOPs that were spent."""
        return sum((work.flops * samples for work, samples in self.done.items()), self.missed)

    @property
    def masked(self) -> Flops:
        """FLOPs that kernels spent besides, on pairs that are masked."""
        return sum((work.masked(way) * samples for (work, way), samples in self.attended.items()), NO_FLOPS)

    @property
    def whole(self) -> Flops:
        """FLOPs that full attention would have spent."""
        return sum((count.whole * times for count, times in self.counts.items()), self.missed)

    def missed_calls(self, sites: Iterable[Site], calls: int) -> dict[Site, int]:
        """The sites that were not passed in each of so many calls of the transformer, with the number of those without."""
        passes = Counter[str]()
        for count, times in self.counts.items():
            passes[count.path] += times
        return {site: calls - passes[site.path] for site in sites if passes[site.path] < calls}

    def count_missed_as_full(self, missed: Mapping[Site, int], tokens: Tokens) -> None:
        """Count the calls in which a site was not passed as full attention, whatever ran there."""
        for site, calls in missed.items():
            self.missed += site_flops(site, tokens, FULL, Writes(), self.samples) * calls

    def summary(self, planned_steps: int) -> "Summary":
        """The counters so far, as a value; the plan has `planned_steps` in the latest loop."""
        spent, whole = (self.spent, self.whole) if self.whole.module else (Flops(1, 1), Flops(1, 1))
        left, computed = (_part(done, whole) for done in (spent, spent + self.masked))
        cells, heads = Counter[str](), Counter[str]()
        for count, times in self.counts.items():
            cells[count.cell] += times
            for name, each in count.heads.items():
                heads[name] += each * times
        kernels, notes = Counter(self.kernels), tuple(self.notes)
        planned = self.looped + planned_steps
        return Summary(self.steps, planned, cells, heads, self.residuals, kernels, left, self.peak_bytes, notes, computed)


@dataclass(frozen=True)
class Summary:
    """What a generation computed, reused and skipped, counted where it was done. `print(run.summary())` gives a table.

    `steps` ran, of `planned_steps` in the plan; where a call has several denoising loops, these are the steps of all loops.
    `cells` counts site passes by the papers' names (full, ASC, WA-RS, AST, ...), `heads` the methods of single heads in them,
    `residuals` the residuals that were made, `kernels` the passes over queries and keys by the kernel that ran (`native`: the
    pipeline's own attention). `flops` are fractions of the uncompressed FLOPs: of the query–key pairs that the plan keeps.
    `computed` are those of the pairs that the kernels computed, of which some are masked, since chunks, blocks and tiles are
    computed whole. `peak_cache_bytes` is the most that the caches held after a site pass. `notes` repeat the warnings of the
    generation.

        >>> run = ah.apply(pipe, plan)
        >>> image = pipe(**inputs).images[0]
        >>> run.summary().flops.attention
        0.41
    """

    steps: int
    planned_steps: int
    cells: Counter[str]
    heads: Counter[str]
    residuals: int
    kernels: Counter[str]
    flops: Flops
    peak_cache_bytes: int
    notes: tuple[str, ...]
    computed: Flops

    def __str__(self) -> str:
        rows = {
            "steps": f"{self.steps} of {self.planned_steps}",
            "site passes": _shares(self.cells),
            **({"heads": _shares(self.heads)} if any("head-wise" in name for name in self.cells) else {}),
            "residuals made": str(self.residuals),
            "FLOPs left": _shown(self.flops),
            **({"computed": _shown(self.computed)} if _shown(self.computed) != _shown(self.flops) else {}),
            "kernels": ", ".join(f"{name} × {n}" for name, n in self.kernels.items()) or "none",
            "cache peak": f"{self.peak_cache_bytes / 2**20:.2f} MiB",
        }
        lines = [f"{name:<15}{value}" for name, value in rows.items()]
        return "\n".join([*lines, *(f"{'note':<15}{note}" for note in self.notes)])


def _part(flops: Flops, whole: Flops) -> Flops:
    return Flops(flops.attention / (whole.attention or 1), flops.module / whole.module)


def _shown(flops: Flops) -> str:
    return f"attention {flops.attention:.1%}, with projections {flops.module:.1%}"


def _shares(count: Counter[str]) -> str:
    total = count.total()
    return f"{total}: " + ", ".join(f"{name} {n} ({n / total:.0%})" for name, n in count.most_common())
