"""What a calibration notes in each step: the products of gradients with what was computed in this step and before."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arrowhead.calibration.run import Step, require_finite
from arrowhead.calibration.sharding import ALONE, Share
from arrowhead.engine.attention_hook import AttentionCall
from arrowhead.engine.cache import Output, map_output
from arrowhead.engine.execute_site import SitePass, attend_heads, require_token_sizes
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.plans.cells import Arrow, Full
from arrowhead.plans.flops import full_flops
from arrowhead.plans.layout import Branches, Site, Tokens, outermost
from arrowhead.plans.target import Target
from arrowhead.searches.budget.config import Extent
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.loop_gain import LoopRun
from arrowhead.searches.budget.sensitivity.probes import LEAST, SiteProbes
from arrowhead.searches.budget.sensitivity.sampler_gain import Sampling
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.upstream import CPU_ATTENTION

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = 64
"""Of each kind in a step, from so many regions of the tokens as that takes: the square of one product tells little, and the
least of many candidates would be those that are underestimated."""
APART = 0x51DE0F7E
"""Added to the vectors' seed, lest they be the very noise that the run began with: seeds of pictures are small numbers."""


@dataclass(frozen=True)
class _Kept:
    """One step of a site: its heads' output (B, H, N, D), its residuals (B, H, V, D), one for each radius, and its roundings.

    Of a sample that comes in several sequences, as frame by frame, these follow one another in N.

    A rounding, one for each precision, is what that changes of the output, (B, H, N, D).
    """

    output: Tensor
    residuals: tuple[Tensor, ...] = ()
    roundings: tuple[Tensor, ...] = ()


class Recorder:
    """The buffers of the last steps, and the products so far."""

    def __init__(self, sites: Sequence[Site], tokens: Tokens, extent: Extent, share: Share = ALONE) -> None:
        self._sites, self._tokens, self._extent, self._share = tuple(sites), tokens, extent, share
        self._guidance: Guidance  # of the step; `_at_sites`, of what sites give, which has heads where an output has channels
        self._radii = extent.bands(sites, tokens)
        self._generator = torch.Generator()
        self._kept: dict[str, deque[_Kept]] = {site.path: deque(maxlen=extent.ages + 1) for site in sites}
        self._own: list[FlopCounterMode] = []  # of the arrows in the first step, which no pipeline computes
        self._other_flops = 0.0  # outside of all sites, for one image in a step
        self._images = self._regions = 0  # known in the first step
        self._weights = SiteProbes(len(self._sites))  # in place of gradients
        self._products: list[tuple[Tensor, ...]] = []  # of each step, see `Table`: outputs, residuals, roundings

    def follow(self, step: Step, guidance: Guidance) -> None:
        """One step: the pipeline's own, and the products of gradients, or of what stands for them, with what is kept."""
        self._guidance = guidance
        self._at_sites = replace(guidance, channels=None)
        if step.first:  # what another transformer gave is of no use
            for kept in self._kept.values():
                kept.clear()
        self._generator.manual_seed(APART + self._extent.seed)  # the same vectors in every step: what steps do adds up
        found = list(self._by_gradients(step) if self._extent.gradients else self._by_weights(step))
        self._products.append(tuple(torch.cat(products, -1) for products in zip(*found, strict=True)))

    def _by_gradients(self, step: Step) -> Iterator[tuple[Tensor, ...]]:
        """Forward, and back for each vector."""
        probes: dict[str, Tensor] = {}
        vectors = self._extent.vectors
        with ExitStack() as counted:
            whole = counted.enter_context(self._counting())
            with step.traced(lambda call, state: self._at_site(call, state, probes)) as outputs:
                counted.close()  # before anything goes back
                self._note(outputs, whole)
                for i in range(vectors):
                    yield self._of_vector(probes, outputs, last=i == vectors - 1)

    def _by_weights(self, step: Step) -> Iterator[tuple[Tensor, ...]]:
        """Forward, and again with sites changed. What stands for a gradient is a vector as long as the output by the site's."""
        with self._counting() as whole:
            outputs = step.finish_by(lambda call, state: self._at_site(call, state, None))
        self._note(outputs, whole)
        guided = self._guidance.guided(outputs).float()
        for _ in range(0 if step.first else math.ceil(LEAST / self._images)):  # a first one has none before it
            which = self._weights.chosen(self._images)
            changed = self._guidance.guided(step.tried(partial(self._changed, which))).float()
            for image, place in enumerate(which):
                now, change = self._of_image(place, image)
                if change is not None:
                    response = (changed[image] - guided[image]).norm() / guided[image].norm()
                    self._weights.note(step.index, place, float(response / (change.norm() / now.norm())))
        for _ in range(self._extent.vectors):
            yield self._joined({site.path: self._in_place_of_gradient(site, guided) for site in self._sites})

    def _counting(self) -> "AbstractContextManager[FlopCounterMode | None]":
        """The first step tells for all."""
        return nullcontext() if self._products else flop_counter()

    def _note(self, outputs: Sequence[Tensor], whole: "FlopCounterMode | None") -> None:
        """What is known once the first step has run."""
        if whole is None:
            return
        channels, given = self._guidance.channels, outputs[0].shape
        if channels is not None and channels > given[1]:
            raise InputsInvalid(
                f"got an output of shape {tuple(given)} with latent_channels={channels}, wanted {given[1]} of its channels at "
                "most; or None for all"
            )
        self._images = len(self._guidance.guided([output.detach() for output in outputs]))
        self._regions = self._extent.regions or max(1, PRODUCTS // (self._share.of_all(self._images) * self._extent.vectors))
        samples = self._guidance.branches.samples
        known = full_flops(outermost(self._sites), self._tokens, samples).module
        multiplied = whole.get_total_flops() - sum(own.get_total_flops() for own in self._own)
        self._other_flops = max(multiplied / self._images - known, 0.0)

    def _changed(self, which: Sequence[int], call: SiteCall, state: Generation) -> Output:
        """The module's output, of each image whose site this is by what the site gave in the step before."""
        site, kept = call.site, self._kept[call.site.path]
        _tallied(call, state)
        images = [image for image, place in enumerate(which) if self._sites[place] == site]
        if not images or len(kept) < 2:
            return call.native()
        change = torch.zeros_like(kept[0].output)
        difference = kept[1].output - kept[0].output
        for rows, own in zip(self._guidance.halves(change), self._guidance.halves(difference), strict=True):
            if rows is not None and own is not None:
                rows[images] = own[images]
        return self._again(call, _in_sequences(change, site, self._tokens))

    def _of_image(self, place: int, image: int) -> tuple[Tensor, Tensor | None]:
        """What a site gave one image, both branches as guidance adds them up, and how that differs from the step before's."""
        last = islice(self._kept[self._sites[place].path], 2)
        now, *before = (self._at_sites.guided([entry.output.flatten(2).float()])[image] for entry in last)
        change = before[0] - now if before else None
        return now, change if change is not None and change.any() else None

    def _in_place_of_gradient(self, site: Site, guided: Tensor) -> Tensor:
        """(B, H, N, D): a random vector for each image, as long as the output is beside what the site gave."""
        out = self._kept[site.path][0].output.flatten(2).float()  # (B, H, N·D)
        own = self._at_sites.guided([out])
        length = guided.flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1).clamp_min(1e-12)
        vector = torch.randn(own.shape, generator=self._generator).to(own.device) * length[:, None, None]
        (cotangent,) = self._at_sites.cotangents([out], vector)
        return cotangent.view_as(self._kept[site.path][0].output)

    def table(
        self,
        sampling: Sampling | LoopRun,
        branches: Branches,
        target: Target,
        blocks: tuple[Site, ...],
        about: Mapping[str, Any],
        switch: int | None,
    ) -> Table:
        """All steps together."""
        final, feedback = sampling.latents(), self._extent.feedback
        images = self._share.of_all(self._images)
        gains, answers = sampling.gains(len(self._products), images)
        products = [self._of_all(torch.stack(of_steps)) for of_steps in zip(*self._products, strict=True)]
        if not self._extent.gradients:
            heads = torch.tensor([site.heads for site in self._sites])
            weights = self._weights.fitted(len(self._products)).repeat_interleave(heads, 1)  # (S, H)
            products = [own * weights[(...,) + (None,) * (own.ndim - 2)] for own in products]
        outputs, residuals, roundings = (own.float() for own in products)
        if not all(bool(own.isfinite().all()) for own in (outputs, residuals, roundings)):
            raise InputsInvalid(
                "got products of gradients that float32 does not hold, wanted finite ones; look at the guidance scale, and at "
                "what the transformer gives"
            )
        return Table(
            target=target,
            tokens=self._tokens,
            branches=branches,
            radii=self._radii,
            ages=self._extent.ages,
            outputs=outputs,
            residuals=residuals,
            gains=tuple(gain * answer**feedback for gain, answer in zip(gains, answers, strict=True)),
            answers=answers,
            feedback=feedback,
            blocks=blocks,
            final=float(final.square().mean()),
            elements=final[0].numel(),
            other_flops=self._other_flops,
            images=images,
            regions=self._regions,
            itemsize=next(iter(self._kept.values()))[0].output.itemsize,
            about=about,
            switch=switch,
            precisions=tuple(self._extent.precisions),
            roundings=roundings if self._extent.precisions else None,
        )

    def _of_all(self, products: Tensor) -> Tensor:
        """All processes' products (…, M) of this one's."""
        if self._share.alone:
            return products
        shape = *products.shape[:-1], self._extent.vectors, self._images, self._regions
        by_image = products.reshape(shape).movedim(-2, 0)
        return self._share.joined(by_image.contiguous()).movedim(0, -2).flatten(-3)

    def _at_site(self, call: SiteCall, state: Generation, probes: dict[str, Tensor] | None) -> Output:
        """The module's output; where its heads' outputs arise, a probe of zeros for gradients to come back to, if they do."""
        site = call.site
        if probes and site.path in probes:
            return self._again(call, probes[site.path])
        passage = _tallied(call, state)
        if site.kind != "self_attention":
            return self._of_module(call, state, probes)

        def attention(asked: AttentionCall) -> Tensor:
            require_token_sizes(asked, passage)
            out = asked.native()  # (B, H, N, D)
            with torch.no_grad(), self._counted():
                require_finite(out, call, state)
                residuals, roundings = self._residuals_of(asked, out, passage), self._roundings_of(asked, out, passage)
                whole = partial(_of_samples, site=site, tokens=self._tokens)
                self._kept[site.path].appendleft(
                    _Kept(whole(out.detach()), tuple(map(whole, residuals)), tuple(map(whole, roundings)))
                )
            if probes is None:
                return out
            probes[site.path] = torch.zeros_like(out, requires_grad=True)
            return out + probes[site.path]

        return call.run(attention)

    def _of_module(self, call: SiteCall, state: Generation, probes: dict[str, Tensor] | None) -> Output:
        """As a site of one head, (B, 1, N, C), text and image one after the other where a block gives both."""
        site = call.site
        out = call.native()
        with torch.no_grad():
            parts = [tensor.detach() for tensor in _tensors(call.storable(out), site)]
            kept = (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, None]
        require_finite(kept, call, state)
        self._kept[site.path].appendleft(_Kept(kept))
        if probes is None:
            return out
        probes[site.path] = torch.zeros_like(kept, requires_grad=True)
        return _with_probe(out, probes[site.path])

    def _again(self, call: SiteCall, probe: Tensor) -> Output:
        """The module once more, with this added: in a checkpointed block, which runs again on the way back, or as a trial."""
        if call.site.kind != "self_attention":
            return _with_probe(call.native(), probe)
        return call.run(lambda attention: attention.native() + probe)

    def _counted(self) -> AbstractContextManager[Any]:
        """Around what this adds to the pipeline's run: what it multiplies, in the first step."""
        if self._products:
            return nullcontext()
        self._own.append(flop_counter())
        return self._own[-1]

    def _residuals_of(self, asked: AttentionCall, out: Tensor, passage: SitePass) -> Iterator[Tensor]:
        heads, visual = range(passage.call.site.heads), passage.tokens.visual_slice
        for radius in self._radii:
            band = attend_heads(asked, heads, [Arrow(radius)] * len(heads), slice(None), passage)
            yield out[:, :, visual] - band[:, :, visual]

    def _roundings_of(self, asked: AttentionCall, out: Tensor, passage: SitePass) -> Iterator[Tensor]:
        heads = range(passage.call.site.heads)
        for precision in self._extent.precisions:
            yield attend_heads(asked, heads, [Full(precision)] * len(heads), slice(None), passage) - out

    def _of_vector(self, probes: dict[str, Tensor], outputs: Sequence[Tensor], *, last: bool) -> tuple[Tensor, ...]:
        """Of all heads of all sites, for a new random vector: outputs (H, ages + 1, pairs, M), residuals, roundings.

        Of these two, (H, radii or precisions, ages + 1, pairs, M).
        """
        guided = self._guidance.guided([output.detach() for output in outputs])
        of_all = torch.randn(self._share.of_all(len(guided)), *guided.shape[1:], generator=self._generator)
        vector = self._share.own(of_all).to(guided.device, guided.dtype)
        cotangents = self._guidance.cotangents(outputs, vector)
        gradients = torch.autograd.grad(outputs, list(probes.values()), cotangents, retain_graph=not last)
        of_path = dict(zip(probes, gradients, strict=True))
        return self._joined({site.path: _of_samples(of_path[site.path], site, self._tokens) for site in self._sites})

    def _joined(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The products of all sites, by their paths."""
        products = [self._of_site(site, gradients[site.path].float()) for site in self._sites]
        return tuple(map(torch.cat, zip(*products, strict=True)))

    def _of_site(self, site: Site, gradient: Tensor) -> tuple[Tensor, ...]:
        """Products of the gradient (B, H, N, D), as in `_of_vector`, for the heads of one site."""
        kept, visual = self._kept[site.path], slice(None)
        if site.sequences(self._tokens) == 1:
            visual = site.tokens(self._tokens).visual_slice
        outputs = self._paired(gradient, [entry.output for entry in kept])  # (H, steps kept, pairs, B · regions)
        now = outputs[:, :1, [0, 1, 1]] if self._guidance.branches.batched else outputs[:, :1]  # of the gradient's own branch
        residuals = [self._paired(gradient, own, visual) for own in zip(*(entry.residuals for entry in kept), strict=True)]
        roundings = [self._paired(gradient, own) for own in zip(*(entry.roundings for entry in kept), strict=True)]

        def whole(found: Sequence[Tensor], count: int) -> Tensor:
            """(H, count, ages + 1, pairs, M), zero where nothing was found: of ages before the run, of sites without heads."""
            padded = outputs.new_zeros(len(outputs), count, self._extent.ages + 1, *outputs.shape[2:])
            for place, products in enumerate(found):
                padded[:, place, : len(kept)] = products
            return padded

        of_precisions = whole(roundings, len(self._extent.precisions))
        return whole([outputs - now], 1)[:, 0], whole(residuals, len(self._radii)), of_precisions

    def _paired(self, gradient: Tensor, sources: Sequence[Tensor], where: slice = slice(None)) -> Tensor:
        """⟨g, source⟩ of each head, image and region, for each pair of branches: (H, sources, pairs, B · regions).

        `where` are the tokens that the sources have, of all that the regions are parts of. In float64 on the CPU: they are
        alike, and subtracted.
        """
        conditional, other = self._guidance.halves(gradient)
        batch, heads, tokens, channels = conditional.shape
        padded = self._regions * math.ceil(tokens / self._regions)
        scratch = conditional.new_zeros(batch, heads, padded, channels)  # one for all: to allocate costs more than to multiply
        by_region = scratch.view(batch, heads, self._regions, -1)

        def product(gradient: Tensor, source: Tensor) -> Tensor:
            torch.mul(gradient[:, :, where], source, out=scratch[:, :, :tokens][:, :, where])
            return by_region.sum(3).transpose(0, 1).flatten(1)  # (B, H, regions) -> (H, B · regions)

        found = []
        for source in sources:
            from_conditional, from_other = self._guidance.halves(source)
            pairs = [product(conditional, from_conditional)]
            if other is not None and from_other is not None:
                pairs += [product(other, from_other), product(other, from_conditional)]
            found.append(torch.stack(pairs, 1))
        return torch.stack(found, 1).cpu().double()


def _of_samples(rows: Tensor, site: Site, tokens: Tokens) -> Tensor:
    """A sample's sequences one after the other: (B · sequences, H, N, D) -> (B, H, sequences · N, D)."""
    count = site.sequences(tokens)
    return rows if count == 1 else rows.view(-1, count, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)


def _in_sequences(samples: Tensor, site: Site, tokens: Tokens) -> Tensor:
    """Back to the rows that the site has."""
    count = site.sequences(tokens)
    batch, heads, _, width = samples.shape
    return samples if count == 1 else samples.view(batch, heads, count, -1, width).transpose(1, 2).flatten(0, 1)


def _tallied(call: SiteCall, state: Generation) -> SitePass:
    """A passage that leaves nothing out, counted; what lies within a block is counted by itself."""
    passage = SitePass.full(call, state)
    passage.record_pass()
    if call.site.kind == "self_attention":
        passage.record_attention(call.batch)
    if not call.site.within:
        passage.record_projections()
    return passage


def _tensors(out: Output, site: Site) -> list[Tensor]:
    found = [tensor for tensor in (out if isinstance(out, tuple) else (out,)) if tensor is not None]
    if not all(isinstance(tensor, Tensor) and tensor.ndim == 3 for tensor in found):
        raise NotIntercepted(f"{site.path} gave a {type(out).__name__}; wanted tensors of (batch, tokens, channels)")
    return found


def _with_probe(out: Output, probe: Tensor) -> Output:
    """A module's output with its part of the probe (B, 1, N, C) added to each tensor."""
    start = 0

    def added(tensor: Tensor) -> Tensor:
        nonlocal start
        own, start = probe[:, 0, start : start + tensor.shape[1]], start + tensor.shape[1]
        return tensor + own

    return map_output(out, added)


def flop_counter() -> "FlopCounterMode":
    """PyTorch's, which does not know attention on a CPU by itself."""
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 - it imports triton where there is one

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])

    mapping = {CPU_ATTENTION: attention}
    return FlopCounterMode(display=False, custom_mapping=mapping)
