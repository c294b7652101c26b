"""DiTFastAttnV2's search: a method for every head of every site, chosen by errors at the site itself, in one generation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from arrowhead.calibration.driver import Driver
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.search_result import SearchResult
from arrowhead.calibration.sharding import ALONE, Share
from arrowhead.calibration.step import Step, require_finite
from arrowhead.engine.attention_hook import AttentionCall
from arrowhead.engine.cache import Entry, Key, Output, both_branches, encode_output
from arrowhead.engine.execute_site import SitePass, attend_heads
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import InputsInvalid
from arrowhead.metrics.error import error_from_moments, error_moments
from arrowhead.models.find import find
from arrowhead.plans import flops
from arrowhead.plans.cells import FULL, Arrow, Attend, Box, Cached, Cell, Full, Method, Radius, grouped
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import FOREVER
from arrowhead.searches.multiple_choice import solve_multiple_choice
from arrowhead.searches.radii import narrower, require_radii
from arrowhead.searches.settings import is_number, require_flags

HEADS_AT_ONCE = 4
"""Heads whose candidates are in memory together."""


@dataclass(frozen=True)
class Headwise:
    """The candidates of DiTFastAttnV2's search (Zhang et al. 2025), and how it chooses among them.

    Args:
        radii: of the arrows, in tokens on each side, or boxes in the grid; None for a sixteenth, a 32nd and a 64th of the
            visual tokens.
        caching: whether heads may repeat their output of the step before.
        share_cfg: whether a site may compute the conditional branch alone.
        residual: whether arrows add O − W of their head's last full step.
        prefilter: candidates whose error is this many times a head's share of the threshold, or more, are dropped before the
            choice; None drops none.
        savings: the value of a candidate: the FLOPs that it saves, projections included, or the paper's weights.

    Raises:
        InputsInvalid: a setting is out of range, or radii are boxes with the paper's weights.

    >>> arrowhead.search(pipe, inputs, strategy=arrowhead.Headwise(radii=(16, 64), share_cfg=True), threshold=0.6)
    """

    radii: tuple[Radius, ...] | None = None
    caching: bool = True
    share_cfg: bool = False
    residual: bool = False
    prefilter: float | None = 1.5
    savings: Literal["flops", "paper"] = "flops"

    def __post_init__(self) -> None:
        require_radii(self.radii)
        require_flags(self, "caching", "share_cfg", "residual")
        if self.prefilter is not None and not (is_number(self.prefilter) and self.prefilter > 0):
            raise InputsInvalid(f"got prefilter={self.prefilter!r}, wanted a number above 0, or None")
        if not isinstance(self.savings, str) or self.savings not in ("flops", "paper"):
            raise InputsInvalid(f"got savings={self.savings!r}, wanted 'flops' or 'paper'")
        if self.savings == "paper" and any(isinstance(radius, Box) for radius in self.radii or ()):
            raise InputsInvalid(f"got savings='paper' with radii={self.radii!r}, wanted radii in tokens; or savings='flops'")

    def methods(self, tokens: Tokens) -> tuple[Method, ...]:
        """The methods of a head, full attention first. Bands that would cover everything are left out."""
        radii = (tokens.visual // 16, tokens.visual // 32, tokens.visual // 64) if self.radii is None else self.radii
        arrows = [Arrow(radius, self.residual) for radius in narrower(radii, tokens)]
        return (Full(), *arrows, *([Cached()] if self.caching else []))


@dataclass(frozen=True)
class Choice:
    """The cell chosen at one site in one step, and the sum of its heads' errors; `steps` as in `Trial`."""

    step: int
    steps: int | None
    site: str
    cell: Attend
    error: float


def headwise_search(
    driver: Driver, *, threshold: float, settings: Headwise, on_choice: Callable[[Choice], None] = lambda _: None
) -> SearchResult:
    """Choose for every head on one generation of the driver, and call `on_choice` for every site; gives what was found.

    A transformer's first step is full. At every later one each site computes its full output on the input that it gets in the
    compressed trajectory, and from that output the error of every candidate of every head. It chooses the greatest saving with
    Σ errors ≤ threshold, and passes the output of the chosen cell on. No projection runs twice.

    Raises what `arrowhead.search` raises.
    """
    calibration = CalibrationRun(driver, find(driver.pipe))
    rows: list[list[Cell]] = []

    def choose(step: Step) -> None:
        chooser = Chooser(settings, 0.0 if step.first else threshold, step.may_share, driver.share)
        step.finish_by(chooser.at_site)
        rows.append([chooser.chosen[site][0] for site in step.sites])
        for site, (cell, error) in chooser.chosen.items():
            on_choice(Choice(step.index, calibration.step_count, site.path, cell, error))

    calibration.run(choose)
    return calibration.found(rows)


class Chooser:
    """The choices of one step, made at each site when it is called; `chosen` are the cells with their sums of errors."""

    def __init__(self, settings: Headwise, threshold: float, may_share: Callable[[Site], bool], share: Share = ALONE) -> None:
        self.chosen: dict[Site, tuple[Attend, float]] = {}
        self._settings, self._threshold, self._may_share, self._share = settings, threshold, may_share, share

    def at_site(self, call: SiteCall, state: Generation) -> Output:
        """Run the site's module with the methods chosen for its heads; write what later steps may read to the cache."""
        site_pass = SitePass.full(call, state)
        site_pass.record_pass()
        out = call.run(lambda attention: self._attention(attention, site_pass))
        site_pass.record_projections()
        return out

    def _attention(self, attention: AttentionCall, site_pass: SitePass) -> Tensor:
        full = attention.native()  # (B, H, N, D)
        require_finite(full, site_pass.call, site_pass.generation)
        site_pass.record_attention(len(full))
        may_share = self._settings.share_cfg and self._may_share(site_pass.call.site)
        candidates = _Candidates(self._settings, attention, site_pass, full, may_share, self._share)
        cell, error = candidates.choose(self._threshold) if self._threshold > 0 else (FULL, 0.0)
        self.chosen[site_pass.call.site] = cell, error
        out = full if cell == FULL else candidates.output(cell)
        candidates.store(cell, out)
        return out


@dataclass(frozen=True)
class _Candidates:
    """The candidates of one site in one step: their errors, the choice among them, and the output of a cell made of them."""

    settings: Headwise
    attention: AttentionCall
    site_pass: SitePass
    full: Tensor  # (B, H, N, D)
    may_share: bool  # branches
    share: Share

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.settings.methods(self.site_pass.tokens)

    @property
    def conditional(self) -> slice:
        return self.site_pass.generation.branches.conditional(self.full.shape[0])

    def choose(self, threshold: float) -> tuple[Attend, float]:
        """The cell that saves most with errors of at most `threshold` in sum, and that sum."""
        site, heads = self.site_pass.call.site, self.site_pass.call.site.heads
        shares = (False, True) if self.may_share else (False,)
        errors = self._errors(shares)
        if self.settings.prefilter is not None:
            errors[errors >= self.settings.prefilter * threshold / heads] = torch.inf
        errors[shares.index(False), :, 0] = 0.0  # full attention is always open
        best: tuple[int, Attend, float] | None = None
        for share, of_share in zip(shares, errors, strict=True):
            savings, constant = _savings(self.settings, site, self.site_pass.generation.tokens, self.methods, share)
            if (found := solve_multiple_choice(of_share.tolist(), savings, threshold)) is None:
                continue
            options, saved = found
            if best is None or saved + constant > best[0]:
                error = sum(float(of_share[head, option]) for head, option in enumerate(options))
                best = saved + constant, Attend(tuple(self.methods[option] for option in options), share), error
        assert best is not None  # full attention costs no error
        return best[1], best[2]

    def _errors(self, shares: Sequence[bool]) -> Tensor:
        """The error of every candidate, (shares, H, methods), on the CPU: relative squared errors of a head's output."""
        heads = self.site_pass.call.site.heads
        found = torch.zeros(3, len(shares), heads, len(self.methods))
        full = self._unpadded(self.full)
        for m, method in enumerate(self.methods):
            for some in _runs(heads, HEADS_AT_ONCE):
                candidate = self._heads(method, some, slice(None))
                for s, share in enumerate(shares):
                    other = both_branches(candidate[self.conditional]) if share else candidate
                    assert isinstance(other, Tensor)
                    found[:, s, some[0] : some[-1] + 1, m] = error_moments(full[:, some], self._unpadded(other)).cpu()
        return self.share.agreed(error_from_moments(self.share.pooled(found)))

    def _unpadded(self, heads: Tensor) -> Tensor:
        """Outputs (B, h, N, D) without padding, of M tokens in all: (1, h, M, D); as they are where there is none."""
        padding = self.attention.padding
        return heads if padding is None else heads.transpose(1, 2)[~padding].transpose(0, 1)[None]

    def output(self, cell: Attend) -> Tensor:
        """The heads' outputs under a cell, for both branches: (B, H, N, D)."""
        rows = self.conditional if cell.share_cfg else slice(None)
        out = self.full[rows].clone()
        for method, heads in grouped(cell.methods(out.shape[1])):
            if not isinstance(method, Full):
                out[:, list(heads)] = self._heads(method, heads, rows)
        return torch.cat([out, out]) if cell.share_cfg else out

    def _heads(self, method: Method, heads: Sequence[int], rows: slice) -> Tensor:
        """The outputs of these heads under one method: (b, h, N, D)."""
        if isinstance(method, Full):
            return self.full[rows][:, heads]
        if isinstance(method, Cached):
            return self._read(Key(self.site_pass.call.site.path, "heads"), heads, rows)
        key = Key(self.site_pass.call.site.path, "residual", method.radius)
        residual = self._read(key, heads, rows) if method.residual else None
        return attend_heads(self.attention, heads, [method] * len(heads), rows, self.site_pass, residual)

    def _read(self, key: Key, heads: Sequence[int], rows: slice) -> Tensor:
        """A cache entry for these heads and rows: (b, h, N, D) or (b, h, V, D)."""
        state = self.site_pass.generation
        return state.cache.read_heads(key, heads, self.site_pass.call.site.heads, state.step)[rows]

    def store(self, cell: Attend, out: Tensor) -> None:
        """Write what later steps may read: every head's output (B, H, N, D), and the residuals of the heads that were full."""
        state, site = self.site_pass.generation, self.site_pass.call.site
        if self.settings.caching:
            state.cache.write(Key(site.path, "heads"), Entry(encode_output(out, site.head_dim), False, FOREVER))
        full = tuple(head for head, method in enumerate(cell.methods(site.heads)) if isinstance(method, Full))
        if not self.settings.residual or not full:
            return
        visual, rows = self.site_pass.tokens.visual_slice, self.conditional if cell.share_cfg else slice(None)
        for method in self.methods:
            if isinstance(method, Arrow):
                band = self._heads(Arrow(method.radius), full, rows)[:, :, visual]
                band = torch.cat([band, band]) if cell.share_cfg else band
                key = Key(site.path, "residual", method.radius)
                difference = out[:, full, visual] - band  # (B, h, V, D)
                state.cache.write(key, Entry(encode_output(difference, site.head_dim), False, FOREVER, full))


def _runs(heads: int, length: int) -> Iterator[list[int]]:
    """All heads in groups of at most `length`."""
    for start in range(0, heads, length):
        yield list(range(start, min(start + length, heads)))


def _radius(arrow: Arrow) -> int:
    assert isinstance(arrow.radius, int)  # `Headwise` takes no boxes with the paper's weights
    return arrow.radius


def _savings(settings: Headwise, site: Site, tokens: Tokens, methods: Sequence[Method], share: bool) -> tuple[list[int], int]:
    """The savings of each method per head, and those of the site besides, as whole numbers.

    By default they are FLOPs of one image under guidance. With the paper's weights they are billionths of a full head: 1 for a
    cached head, ½ for sharing, ((V − w) / (V + T))² for a band of w tokens on each side.
    """
    if settings.savings == "paper":
        visual, total = site.tokens(tokens).visual, site.tokens(tokens).total
        weights = [
            1.0 if isinstance(m, Cached) else ((visual - _radius(m)) / total) ** 2 if isinstance(m, Arrow) else 0.0
            for m in methods
        ]
        return [round(1e9 * (1 - (1 - weight) / 2 if share else weight)) for weight in weights], 0
    rows = 1 if share else 2
    projected = flops.head_projection_flops(site, tokens)

    def spent(method: Method, samples: int) -> int:
        return int(samples * (flops.head_flops(site, tokens, method) + (0 if isinstance(method, Cached) else projected)))

    besides = flops.projection_flops(site, tokens, site.heads) - site.heads * projected  # what sharing alone halves
    return [spent(Full(), 2) - spent(method, rows) for method in methods], int(besides) if share else 0
