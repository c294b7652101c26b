"""The state of one generation, from the first call of the transformer to the end of the pipeline's call."""

from dataclasses import dataclass, field

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
    """What one generation carries from call to call of the transformer, and forgets at its end.

    `call` is which of the step's calls is running; each has its cache, whose entries are kept in `encoding`. `kernel` may be
    `auto`. `rows` are those of every call, known from the first site on.
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
    _plans: dict[tuple[Site, Cell, Writes], SitePlan] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, branches: Branches, tokens: Tokens, kernel: str, stats: Stats, encoding: CacheEncoding = NATIVE
    ) -> "Generation":
        """Before the first call of the transformer."""
        return cls(branches, tokens, kernel, tuple(Cache(branches) for _ in range(branches.calls)), stats, encoding)

    def prepared(self, site: Site, cell: Cell, writes: Writes) -> SitePlan:
        """The plan of one pass, prepared when it is first asked for: for searches, which choose cells as they go."""
        key = site, cell, writes
        if key not in self._plans:
            self._plans[key] = prepare(site, cell, writes, self.tokens, self.branches)
        return self._plans[key]

    def advance(self, tokens: Tokens) -> None:
        """On to the next call of the transformer.

        Raises:
            PlanMismatch: it has other tokens.
        """
        if tokens != self.tokens:
            raise PlanMismatch(
                f"got {tokens} in one call of the transformer and {self.tokens} in another; wanted one length, so that prompt "
                "and negative prompt can share; bring both to the same number of tokens"
            )
        self.call = (self.call + 1) % self.branches.calls
        self.step += self.call == 0

    def require_rows(self, call: SiteCall, sequences: int) -> None:
        """Check that a site is called with as many rows as all before, and with both CFG branches where there are two.

        Of a sample the site has so many `sequences`.

        Raises:
            PlanMismatch: it is not; what is stored would be of other rows.
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
    def cache(self) -> Cache:
        """The running call's."""
        return self.caches[self.call]

    @property
    def held_bytes(self) -> int:
        """What the caches hold now."""
        return held_bytes(self.caches)
