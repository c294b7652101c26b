"""What sites gave in the last steps of a calibration run, with residuals and quantisation errors."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from arrowhead.calibration.step import require_finite
from arrowhead.engine.attention_hook import AttentionCall
from arrowhead.engine.cache import Output, map_output
from arrowhead.engine.cache_encoding import EncodedTensor
from arrowhead.engine.execute_site import SitePass, attend_heads, require_token_sizes
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import NotIntercepted
from arrowhead.plans.cells import Arrow, Full, Radius
from arrowhead.plans.layout import Site, Tokens
from arrowhead.searches.budget.config import Extent
from arrowhead.searches.budget.sensitivity.outside_flops import FirstPassFlops
from arrowhead.searches.radii import fewest, narrower


@dataclass(frozen=True)
class SiteStep:
    """One step of a site, encoded: its heads' output (B, H, N, D), with a residual (B, H, V, D) for each radius.

    A quantisation error (B, H, N, D) for each precision is the output of that precision less the output. Where a sample has
    several sequences, as frame by frame, these follow one another in N and V. Of a module without heads there is one head.
    """

    encoded_output: EncodedTensor
    residuals: tuple[EncodedTensor, ...] = ()
    quantisation_errors: tuple[EncodedTensor, ...] = ()

    @property
    def output(self) -> Tensor:
        """The heads' output, decoded: (B, H, N, D)."""
        return self.encoded_output.read()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are stored."""
        every = self.encoded_output, *self.residuals, *self.quantisation_errors
        return tuple(tensor for encoded in every for tensor in encoded.tensors)


class SiteHistory:
    """The last `ages` + 1 steps of each site, newest first; sites run with full attention while they are recorded."""

    def __init__(self, sites: Sequence[Site], tokens: Tokens, extent: Extent) -> None:
        self.sites, self.tokens, self.ages = tuple(sites), tokens, extent.ages
        self.radii, self.precisions = radii_of(extent, sites, tokens), tuple(extent.precisions)
        self.flops, self._encoding = FirstPassFlops(), extent.encoding
        self._steps: dict[str, deque[SiteStep]] = {site.path: deque(maxlen=extent.ages + 1) for site in sites}

    def steps_of(self, site: Site) -> deque[SiteStep]:
        """The recorded steps of a site."""
        return self._steps[site.path]

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        return (tensor for steps in self._steps.values() for step in steps for tensor in step.tensors)

    def clear(self) -> None:
        """Forget all steps."""
        for steps in self._steps.values():
            steps.clear()

    def record(self, call: SiteCall, state: Generation) -> Output:
        """Run a site with full attention, record what it gave, and return that."""
        if call.site.kind == "self_attention":
            return call.run(self.recording_attention(call, state))
        return self.record_module(call, state)[0]

    def recording_attention(self, call: SiteCall, state: Generation) -> Callable[[AttentionCall], Tensor]:
        """An answer to a site's attention: full attention (B, H, N, D), which is recorded."""
        site, site_pass = call.site, count_full_pass(call, state)

        def attention(asked: AttentionCall) -> Tensor:
            require_token_sizes(asked, site_pass)
            out = asked.native()  # (B, H, N, D)
            with torch.no_grad(), self.flops.left_out():
                require_finite(out, call, state)
                residuals, errors = self._residuals(asked, out, site_pass), self._quantisation_errors(asked, out, site_pass)
                whole = partial(self._stored, site)
                recorded = SiteStep(whole(out.detach()), tuple(map(whole, residuals)), tuple(map(whole, errors)))
                self._steps[site.path].appendleft(recorded)
            return out

        return attention

    def record_module(self, call: SiteCall, state: Generation) -> tuple[Output, Tensor]:
        """Run and record a site without heads: its output, and what is recorded of it, (B, 1, N, C).

        Where a block gives text and image, these follow one another in N.
        """
        count_full_pass(call, state)
        out = call.native()
        with torch.no_grad():
            parts = [tensor.detach() for tensor in _tensors_of(call.storable(out), call.site)]
            recorded = (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, None]
        require_finite(recorded, call, state)
        self._steps[call.site.path].appendleft(SiteStep(self._encoding.stored(recorded, recorded.shape[-1])))
        return out, recorded

    def _residuals(self, asked: AttentionCall, out: Tensor, site_pass: SitePass) -> Iterator[Tensor]:
        heads, visual = range(site_pass.call.site.heads), site_pass.tokens.visual_slice
        for radius in self.radii:
            band = attend_heads(asked, heads, [Arrow(radius)] * len(heads), slice(None), site_pass)
            yield out[:, :, visual] - band[:, :, visual]

    def _quantisation_errors(self, asked: AttentionCall, out: Tensor, site_pass: SitePass) -> Iterator[Tensor]:
        heads = range(site_pass.call.site.heads)
        for precision in self.precisions:
            yield attend_heads(asked, heads, [Full(precision)] * len(heads), slice(None), site_pass) - out

    def _stored(self, site: Site, rows: Tensor) -> EncodedTensor:
        whole = self.by_sample(rows, site)
        return self._encoding.stored(whole, whole.shape[-1])

    def by_sample(self, rows: Tensor, site: Site) -> Tensor:
        """A sample's sequences one after the other: (B · sequences, H, N, D) -> (B, H, sequences · N, D)."""
        count = site.sequences(self.tokens)
        return rows if count == 1 else rows.view(-1, count, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)

    def by_sequence(self, samples: Tensor, site: Site) -> Tensor:
        """The rows that the site has: (B, H, sequences · N, D) -> (B · sequences, H, N, D)."""
        count = site.sequences(self.tokens)
        batch, heads, _, width = samples.shape
        return samples if count == 1 else samples.view(batch, heads, count, -1, width).transpose(1, 2).flatten(0, 1)


def run_with_added(call: SiteCall, added: Tensor) -> Output:
    """Run a site with full attention, and add this to what its heads give, (B, H, N, D), or the module, (B, 1, N, C)."""
    if call.site.kind == "self_attention":
        return call.run(lambda attention: attention.native() + added)
    return add_to_module(call.native(), added)


def add_to_module(out: Output, added: Tensor) -> Output:
    """A module's output, with its part of `added` (B, 1, N, C) in each of its tensors (B, n, C)."""
    start = 0

    def with_part(tensor: Tensor) -> Tensor:
        nonlocal start
        part, start = added[:, 0, start : start + tensor.shape[1]], start + tensor.shape[1]
        return tensor + part

    return map_output(out, with_part)


def count_full_pass(call: SiteCall, state: Generation) -> SitePass:
    """Count a pass through a site with full attention; sites within a block are counted on their own."""
    site_pass = SitePass.full(call, state)
    site_pass.record_pass()
    if call.site.kind == "self_attention":
        site_pass.record_attention(call.batch)
    if not call.site.within:
        site_pass.record_projections()
    return site_pass


def radii_of(extent: Extent, sites: Iterable[Site], tokens: Tokens) -> tuple[Radius, ...]:
    """The radii to record, widest first, without those of bands that would cover all that some site attends over."""
    least = fewest(sites, tokens)
    wanted = (least.visual // 8, least.visual // 32) if extent.radii is None else extent.radii
    return narrower(wanted, least)


def _tensors_of(out: Output, site: Site) -> list[Tensor]:
    found = [tensor for tensor in (out if isinstance(out, tuple) else (out,)) if tensor is not None]
    if not all(isinstance(tensor, Tensor) and tensor.ndim == 3 for tensor in found):
        raise NotIntercepted(f"{site.path} gave a {type(out).__name__}; wanted tensors of (batch, tokens, channels)")
    return found
