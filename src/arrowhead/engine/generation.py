"""The state of one generation, from the first call of the transformer to the end of the pipeline's call.

Where a pipeline runs several denoising loops in one call, each of them is a generation.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from arrowhead.engine.cache import Cache, held_bytes
from arrowhead.engine.cache_encoding import NATIVE, CacheEncoding
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.site_plan import SitePlan, prepare
from arrowhead.engine.stats import Stats
from arrowhead.errors import PlanMismatch
from arrowhead.plans.cells import Cell
from arrowhead.plans.layout import Branches, Site, Tokens
from arrowhead.plans.lifetimes import Writes


@dataclass
class Generation:
    """The state of one generation: its step, its caches, its counters.

    `call` is the number of the running call within its step; each call has a cache, whose entries are stored in `encoding`.
    `kernel` may be `auto`. `rows` is the batch of every call, known from the first site pass on; `latents` are the latents of
    every call, known from the first call on. `tokens` are those of the running call: where a step has two calls, their texts
    may have two lengths, unless the generation is `strict`.
    """

    branches: Branches
    tokens: Tokens
    kernel: str
    caches: tuple[Cache, ...]
    stats: Stats
    encoding: CacheEncoding = NATIVE
    step: int = 0
    call: int = 0
    rows: int | None = None
    latents: int | None = None
    strict: bool = False
    stack_passes: dict[str, Any] = field(default_factory=dict)
    """By the stack's path, the `StackPass` that is going on."""
    _of_calls: dict[int, Tokens] = field(default_factory=dict)
    _plans: dict[tuple[Site, Cell, Writes], SitePlan] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        branches: Branches,
        tokens: Tokens,
        kernel: str,
        stats: Stats,
        encoding: CacheEncoding = NATIVE,
        *,
        strict: bool = True,
    ) -> "Generation":
        """The state in the first call of the transformer, with empty caches."""
        return cls(branches, tokens, kernel, _empty_caches(branches), stats, encoding, strict=strict, _of_calls={0: tokens})

    def prepared(self, site: Site, cell: Cell, writes: Writes) -> SitePlan:
        """The plan of a site pass, prepared at the first use: for searches, which do not know their cells beforehand."""
        key = site, cell, writes
        if key not in self._plans:
            self._plans[key] = prepare(site, cell, writes, self.tokens, self.branches)
        return self._plans[key]

    def advance(self, tokens: Tokens) -> bool:
        """Advance to the next call of the transformer. Returns whether it is the first such call of a step.

        Raises:
            PlanMismatch: the call has other tokens.
        """
        self.call = (self.call + 1) % self.branches.calls
        self.step += self.call == 0
        before, new = self._of_calls.get(self.call, self.tokens), self.call not in self._of_calls
        if tokens != before and (self.strict or not new or not _same_image(tokens, before)):
            raise PlanMismatch(
                f"got {tokens} in one call of the transformer and {before} in another; wanted one length in all steps"
                f"{' and branches' if self.strict else ''}; bring them to the same number of tokens"
            )
        self.tokens = self._of_calls[self.call] = tokens
        return new

    def ends_with(self, steps: int) -> bool:
        """Whether the running call is the last one of so many steps."""
        return self.step == steps - 1 and self.call == self.branches.calls - 1

    def end_guidance(self) -> None:
        """Go on with the conditional branch alone, and with what is stored of it."""
        self.caches = (self.caches[0].of_conditional(),)
        self.branches, self.rows, self.latents = self.branches.unguided, None, None

    def begin_guidance(self, branches: Branches) -> None:
        """Go on with both branches, and with nothing stored: the unconditional one was not computed before."""
        self.caches = _empty_caches(branches)
        self.branches, self.rows, self.latents = branches, None, None

    def require_rows(self, call: SiteCall, sequences: int) -> None:
        """Check that a site's batch is that of all calls before, and has both CFG branches where there are two.

        A sample has `sequences` rows at the site.

        Raises:
            PlanMismatch: it is another batch, for which stored tensors have the wrong rows.
        """
        rows = call.batch // sequences
        if rows == self.rows:
            return
        wanted = self.rows or rows + (rows % 2 if self.branches.batched else 0)
        if rows != wanted:
            raise PlanMismatch(
                f"{call.site.path}: got a batch of {rows} in step {self.step}, wanted {wanted} in every step"
                f"{', both CFG branches' if self.branches.batched else ''}; leave out what changes it on the way, such as a "
                "callback that ends guidance, or remove the plan"
            )
        self.rows = rows

    @property
    def other_texts(self) -> bool:
        """Whether the two calls of a step have texts of other lengths."""
        return self.tokens != self._of_calls[0]

    def forget(self, call: int) -> None:
        """Drop what the `call`-th call of a step would read."""
        self.caches = tuple(Cache(self.branches) if i == call else cache for i, cache in enumerate(self.caches))

    @property
    def cache(self) -> Cache:
        """The cache of the running call."""
        return self.caches[self.call]

    @property
    def held_bytes(self) -> int:
        """Bytes that the caches hold now."""
        return held_bytes(self.caches)


def _same_image(tokens: Tokens, others: Tokens) -> bool:
    """Whether the visual tokens are the same, and text stands on the same side."""
    return replace(tokens, text=others.text) == others


def _empty_caches(branches: Branches) -> tuple[Cache, ...]:
    """A cache for each call of a step."""
    return tuple(Cache(branches) for _ in range(branches.calls))
