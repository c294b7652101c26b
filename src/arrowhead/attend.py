"""One site in one step under one cell: where methods meet kernels and cache."""

from dataclasses import dataclass

from torch import Tensor

from arrowhead.cache import Cache, both_branches
from arrowhead.errors import PlanMismatch
from arrowhead.intercept import AttentionCall, SiteCall
from arrowhead.kernels import dispatch
from arrowhead.layout import Branches, Tokens
from arrowhead.lifetimes import Residual, Writes
from arrowhead.methods import Arrow, Attend, Cell, Full, Reuse
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
    """One passage of a site: its call, what is done in it, and the generation that it belongs to."""

    call: SiteCall
    cell: Attend
    writes: Writes
    generation: Generation

    @property
    def images(self) -> float:
        """Images in the batch, each of one or two samples."""
        return self.call.batch / self.generation.branches.samples

    @property
    def shared(self) -> bool:
        """Whether the conditional branch is computed for both."""
        return self.cell.share_cfg and self.generation.branches.guided


def attend(call: SiteCall, cell: Cell, writes: Writes, generation: Generation) -> Tensor:
    """What the site's module gives in this step, (B, N, C), storing what `writes` says.

    Raises:
        PlanMismatch: a band was asked for, but the model masks this attention itself.
        NotIntercepted: the module's attention could not be reached, or what the cell reads was never stored.
    """
    path, cache, tally = call.site.path, generation.cache, generation.tally
    tally.passed(call.site, cell, generation.tokens)
    if isinstance(cell, Reuse):
        return cache.read((path, None), generation.step)
    passage = Passage(call, cell, writes, generation)
    rows = generation.branches.conditional(call.batch) if passage.shared else None
    out = call.run(lambda attention: _attention(attention, passage), rows)  # (B, N, C), or the conditional half of it
    tally.projected(call.site, generation.tokens, out.shape[0] / passage.images)
    if writes.output_until is not None:
        cache.write((path, None), out, conditional_only=passage.shared, last_reader=writes.output_until)
    tally.peak_bytes = max(tally.peak_bytes, cache.held_bytes)
    return both_branches(out) if passage.shared else out


def _attention(call: AttentionCall, passage: Passage) -> Tensor:
    """Attention under the cell's method, and the residuals made from it: (b, H, N, D), b the rows of the call."""
    method, generation, site = passage.cell.method, passage.generation, passage.call.site
    if isinstance(method, Full):
        out = call.native()
        generation.tally.attended(site, generation.tokens, method, call.q.shape[0] / passage.images, "native")
        for residual in passage.writes.residuals:
            _write_residual(call, out, residual, passage)
        return out
    out = _band(call, method.radius, slice(None), passage)
    if method.residual:
        key = (site.path, method.radius)
        out[:, :, generation.tokens.visual_slice] += generation.cache.read(key, generation.step, conditional=passage.shared)
    return out


def _write_residual(call: AttentionCall, out: Tensor, residual: Residual, passage: Passage) -> None:
    """R_r = O_r − W_r over the visual tokens, (b, H, V, D), before the output projection (WA-RS of DiTFastAttn)."""
    generation = passage.generation
    halve = residual.conditional_only and generation.branches.guided and not passage.shared
    rows = generation.branches.conditional(call.q.shape[0]) if halve else slice(None)
    visual = generation.tokens.visual_slice
    difference = out[rows, :, visual] - _band(call, residual.radius, rows, passage)[:, :, visual]
    key, half = (passage.call.site.path, residual.radius), passage.shared or halve
    generation.cache.write(key, difference, conditional_only=half, last_reader=residual.last_reader)
    generation.tally.residuals += 1


def _band(call: AttentionCall, radius: int, rows: slice, passage: Passage) -> Tensor:
    generation, site = passage.generation, passage.call.site
    if call.masked:
        raise PlanMismatch(
            f"{site.path}: got a plan with a band where the model masks its attention itself; wanted attention without a "
            "mask; search again without window attention"
        )
    q, k, v = call.q[rows], call.k[rows], call.v[rows]  # (b, H, N, D)
    out = dispatch.arrow(q, k, v, generation.tokens, radius, scale=call.scale, kernel=generation.kernel)
    generation.tally.attended(site, generation.tokens, Arrow(radius), q.shape[0] / passage.images, generation.kernel)
    return out
