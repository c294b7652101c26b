"""Scalar products of a gradient at a site's output with what the site gave in this step and before."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead.engine.cache_encoding import EncodedTensor
from arrowhead.plans.layout import Site
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.site_history import SiteHistory

Products = tuple[Tensor, Tensor, Tensor]
"""The products of one step, float64 on the CPU, see `Table`: of outputs (H, ages + 1, pairs, M), residuals (H, radii, ages + 1,
pairs, M) and quantisation errors (H, precisions, ages + 1, pairs, M)."""


@dataclass(frozen=True)
class GradientProducts:
    """Makes the products of a step, under its guidance, with M = images × `regions` parts of the sequence of tokens."""

    history: SiteHistory
    guidance: Guidance
    regions: int

    def of_all_sites(self, gradients: Mapping[str, Tensor]) -> Products:
        """The products of the heads of all sites, for the gradients (B, H, N, D) at each site's path."""
        products = [self._of_site(site, gradients[site.path].float()) for site in self.history.sites]
        outputs, residuals, quantisation_errors = map(torch.cat, zip(*products, strict=True))
        return outputs, residuals, quantisation_errors

    def _of_site(self, site: Site, gradient: Tensor) -> Products:
        steps, visual = self.history.steps_of(site), slice(None)
        if site.sequences(self.history.tokens) == 1:
            visual = site.tokens(self.history.tokens).visual_slice
        outputs = self._paired(gradient, [step.encoded_output for step in steps])  # (H, recorded steps, pairs, B · regions)
        own = [0, 1, 1] if self.guidance.branches.batched else [0]
        now = outputs[:, :1, own]  # of the gradient's own branch
        residuals = [self._paired(gradient, each, visual) for each in zip(*(s.residuals for s in steps), strict=True)]
        errors = [self._paired(gradient, each) for each in zip(*(s.quantisation_errors for s in steps), strict=True)]

        def padded(found: Sequence[Tensor], count: int) -> Tensor:
            """(H, count, ages + 1, pairs, M), 0 for ages before the run, and for sites without heads."""
            whole = outputs.new_zeros(len(outputs), count, self.history.ages + 1, *outputs.shape[2:])
            for place, products in enumerate(found):
                whole[:, place, : len(steps)] = products
            return whole

        of_precisions = padded(errors, len(self.history.precisions))
        return padded([outputs - now], 1)[:, 0], padded(residuals, len(self.history.radii)), of_precisions

    def _paired(self, gradient: Tensor, sources: Sequence[EncodedTensor], where: slice = slice(None)) -> Tensor:
        """⟨g, source⟩ of each head, image and region, for each pair of branches: (H, sources, pairs, B · regions).

        `where` are the tokens that the sources have, among those of the gradient. Float64 on the CPU: the products are nearly
        equal, and are subtracted.
        """
        conditional, other = self.guidance.halves(gradient)
        batch, heads, tokens, channels = conditional.shape
        padded = self.regions * math.ceil(tokens / self.regions)
        scratch = conditional.new_zeros(batch, heads, padded, channels)  # one for all: to allocate costs more than to multiply
        by_region = scratch.view(batch, heads, self.regions, -1)

        def product(gradient: Tensor, source: Tensor) -> Tensor:
            torch.mul(gradient[:, :, where], source, out=scratch[:, :, :tokens][:, :, where])
            return by_region.sum(3).transpose(0, 1).flatten(1)  # (B, H, regions) -> (H, B · regions)

        found = []
        for source in sources:
            from_conditional, from_other = self.guidance.halves(source.read())  # one at a time
            pairs = [product(conditional, from_conditional)]
            if other is not None and from_other is not None:
                pairs += [product(other, from_other), product(other, from_conditional)]
            found.append(torch.stack(pairs, 1))
        return torch.stack(found, 1).cpu().double()
