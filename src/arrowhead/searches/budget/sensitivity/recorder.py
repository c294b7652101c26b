"""Records a calibration run step by step, and makes its sensitivity table."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arrowhead.calibration.sharding import ALONE, Share
from arrowhead.calibration.step import Step
from arrowhead.errors import InputsInvalid
from arrowhead.plans.flops import full_flops
from arrowhead.plans.layout import Branches, Site, Tokens, outermost
from arrowhead.plans.target import Target
from arrowhead.searches.budget.config import Extent
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.gradient_products import GradientProducts, Products
from arrowhead.searches.budget.sensitivity.gradient_sources import Backpropagation, GradientSource, Trials
from arrowhead.searches.budget.sensitivity.loop_gain import LoopReplay
from arrowhead.searches.budget.sensitivity.sampler_gain import SchedulerReplay
from arrowhead.searches.budget.sensitivity.site_history import SiteHistory
from arrowhead.searches.budget.sensitivity.table import Table

PRODUCTS = 64
"""Products of each kind in a step, from as many regions of the tokens as that takes. The square of a single product tells
little: a search would pick those of many candidates whose error is underestimated."""
SEED_OFFSET = 0x51DE0F7E
"""Added to the vectors' seed, so that they are not the noise that the run began with: seeds of pictures are small numbers."""


class Recorder:
    """The history of the last steps, where gradients come from, and the products of the steps so far."""

    def __init__(self, sites: Sequence[Site], tokens: Tokens, extent: Extent, share: Share = ALONE) -> None:
        self._tokens, self._extent, self._share = tokens, extent, share
        self.history = SiteHistory(sites, tokens, extent)
        self._source: GradientSource = (
            Backpropagation(self.history, share, extent.vectors) if extent.gradients else Trials(self.history, extent.vectors)
        )
        self._generator = torch.Generator()
        self._products: list[Products] = []  # of each step, M = vectors × images × regions

    def follow(self, step: Step, guidance: Guidance) -> None:
        """Run the pipeline's step, and take the products of its gradients with what was recorded."""
        if step.first:  # what another transformer gave is of no use
            self.history.clear()
        self._generator.manual_seed(SEED_OFFSET + self._extent.seed)  # the same vectors in every step: what steps do adds up
        found: list[Products] = []
        for gradients in self._source.gradients(step, guidance, self._generator):
            found.append(GradientProducts(self.history, guidance, self._regions).of_all_sites(gradients))
        outputs, residuals, quantisation_errors = (torch.cat(each, -1) for each in zip(*found, strict=True))
        self._products.append((outputs, residuals, quantisation_errors))

    @property
    def _images(self) -> int:
        """How many images all processes generate."""
        return self._share.of_all(self._source.images)

    @property
    def _regions(self) -> int:
        return self._extent.regions or max(1, PRODUCTS // (self._images * self._extent.vectors))

    def table(
        self,
        replay: SchedulerReplay | LoopReplay,
        branches: Branches,
        target: Target,
        blocks: tuple[Site, ...],
        about: Mapping[str, Any],
        switch: int | None,
        of_calls: Sequence[Tokens],
        other_texts: bool,
    ) -> Table:
        """The table of all steps.

        Raises:
            InputsInvalid: float32 does not hold the products.
        """
        final, feedback, steps = replay.latents(), self._extent.feedback, len(self._products)
        sampler_gains, model_feedback = replay.gains_and_feedback(steps, self._images)
        weights = self._source.weights(steps)  # (S, H)
        joined = [self._of_all_processes(torch.stack(of_steps)) for of_steps in zip(*self._products, strict=True)]
        products = [own * weights[(...,) + (None,) * (own.ndim - 2)] for own in joined]
        outputs, residuals, quantisation_errors = (own.float() for own in products)
        if not all(bool(own.isfinite().all()) for own in (outputs, residuals, quantisation_errors)):
            raise InputsInvalid(
                "got products of gradients that float32 does not hold, wanted finite ones; look at the guidance scale, and at "
                "what the transformer gives"
            )
        return Table(
            target=target,
            tokens=self._tokens,
            branches=branches,
            radii=self.history.radii,
            ages=self._extent.ages,
            outputs=outputs,
            residuals=residuals,
            sampler_gains=tuple(gain * own**feedback for gain, own in zip(sampler_gains, model_feedback, strict=True)),
            model_feedback=model_feedback,
            feedback=feedback,
            blocks=blocks,
            final=float(final.square().mean()),
            elements=final[0].numel(),
            other_flops=self._other_flops(branches, of_calls),
            other_texts=other_texts,
            images=self._images,
            regions=self._regions,
            itemsize=self.history.steps_of(self.history.sites[0])[0].encoded_output.dtype.itemsize,
            about=about,
            switch=switch,
            precisions=self.history.precisions,
            quantisation_errors=quantisation_errors if self.history.precisions else None,
        )

    def _other_flops(self, branches: Branches, of_calls: Sequence[Tokens]) -> float:
        """FLOPs outside of all sites, per image and step, of a run whose two calls of a step (if there are two) run as one."""
        sites, samples = outermost(self.history.sites), 2 if branches.guided else 1
        known = sum(full_flops(sites, tokens, samples // len(of_calls)).module for tokens in of_calls)
        return max(self.history.flops.total / self._source.images - known, 0.0)

    def _of_all_processes(self, products: Tensor) -> Tensor:
        """All processes' products (…, M) of this process's."""
        if self._share.alone:
            return products
        shape = *products.shape[:-1], self._extent.vectors, self._source.images, self._regions
        by_image = products.reshape(shape).movedim(-2, 0)
        return self._share.joined(by_image.contiguous()).movedim(0, -2).flatten(-3)
