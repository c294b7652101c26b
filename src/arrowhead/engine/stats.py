"""Counters of what one generation really did, and the summary made from them. Nothing here looks at a plan."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from arrowhead.plans.cells import FULL, Attend, Cell, Method, method_name, paper_name
from arrowhead.plans.flops import Flops, head_flops, projection_flops, site_flops
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import Writes

NO_FLOPS = Flops(0, 0)


@dataclass
class Stats:
    """What has been computed and reused so far in one generation. FLOPs are per image, `rows` too.

    `samples` are those of an image in one call of the transformer, of which a step has `calls`.
    """

    samples: int
    calls: int = 1
    steps: int = 0
    passes: Counter[Site] = field(default_factory=Counter)
    cells: Counter[str] = field(default_factory=Counter)
    heads: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    residuals: int = 0
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    spent: Flops = NO_FLOPS
    whole: Flops = NO_FLOPS

    def record_pass(self, site: Site, cell: Cell, tokens: Tokens) -> None:
        """A site was passed, and did what `cell` says."""
        self.passes[site] += 1
        self.cells[paper_name(cell)] += 1
        if site.kind != "self_attention":
            pass  # it has no heads
        elif isinstance(cell, Attend):
            self.heads.update(method_name(method) for method in cell.methods(site.heads))
        else:
            self.heads[paper_name(cell)] += site.heads
        self.whole += site_flops(site, tokens, FULL, Writes(), self.samples)

    def record_projections(self, site: Site, tokens: Tokens, heads: int, rows: float) -> None:
        """The output projection ran, and the Q, K and V projections of so many heads."""
        self.spent += Flops(0, projection_flops(site, tokens, heads) * rows)

    def record_attention(self, site: Site, tokens: Tokens, methods: Sequence[Method], rows: float, kernel: str) -> None:
        """One pass over queries and keys ran, for heads with these methods."""
        flops = sum(head_flops(site, tokens, method) for method in methods) * rows
        self.spent += Flops(flops, flops)
        self.kernels[kernel] += 1

    def count_missed_as_full(self, site: Site, tokens: Tokens) -> int:
        """Calls in which a site was not passed: whatever ran there is counted as full attention."""
        missing = self.steps * self.calls - self.passes[site]
        for _ in range(missing):
            full = site_flops(site, tokens, FULL, Writes(), self.samples)
            self.spent, self.whole = self.spent + full, self.whole + full
        return missing

    def summary(self, planned_steps: int) -> "Summary":
        """The counters so far, as a value."""
        spent, whole = (self.spent, self.whole) if self.whole.module else (Flops(1, 1), Flops(1, 1))
        left = Flops(spent.attention / (whole.attention or 1), spent.module / whole.module)
        cells, heads, kernels = Counter(self.cells), Counter(self.heads), Counter(self.kernels)
        return Summary(
            self.steps, planned_steps, cells, heads, self.residuals, kernels, left, self.peak_bytes, tuple(self.notes)
        )


@dataclass(frozen=True)
class Summary:
    """What a generation really computed, reused and skipped. Print it.

    `cells` counts site passes by the papers' names, `heads` what single heads did in them, `kernels` passes over queries and
    keys by the kernel that ran them (`native` is the pipeline's own attention), `flops` are the fractions of the
    uncompressed run's that were spent.
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

    def __str__(self) -> str:
        rows = {
            "steps": f"{self.steps} of {self.planned_steps}",
            "site passes": _shares(self.cells),
            **({"heads": _shares(self.heads)} if any("head-wise" in name for name in self.cells) else {}),
            "residuals made": str(self.residuals),
            "FLOPs left": f"attention {self.flops.attention:.1%}, with projections {self.flops.module:.1%}",
            "kernels": ", ".join(f"{name} × {n}" for name, n in self.kernels.items()) or "none",
            "cache peak": f"{self.peak_cache_bytes / 2**20:.2f} MiB",
        }
        lines = [f"{name:<15}{value}" for name, value in rows.items()]
        return "\n".join([*lines, *(f"{'note':<15}{note}" for note in self.notes)])


def _shares(count: Counter[str]) -> str:
    total = count.total()
    return f"{total}: " + ", ".join(f"{name} {n} ({n / total:.0%})" for name, n in count.most_common())
