"""A denoising step of a calibration run, as a search sees it: run as often as it likes, finished once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arrowhead.calibration.outputs import output_with, samples_of
from arrowhead.engine.cache import Output
from arrowhead.engine.circumstances import works_on_text
from arrowhead.engine.execute_site import execute_site
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.plans.cells import FULL, Attend, Cell, refreshes_residual, residual_radius
from arrowhead.plans.layout import Site
from arrowhead.plans.lifetimes import FOREVER, Residual, Writes

if TYPE_CHECKING:
    from arrowhead.calibration.run import CalibrationRun

AtSite = Callable[[SiteCall, Generation], Output]
"""What a search does where a site's module is called; it gives the module's output."""
Runs = Sequence[Callable[[], Any]]
"""A step's calls of the transformer: one, or one for each CFG branch."""


class Step:
    """A denoising step at which the pipeline waits: one call of the transformer, or one for each CFG branch.

    Its methods give samples without the tokens that the pipeline drops.

    Attributes:
        index: the step's number.
        latents: of each call, (B, …), or a list with one for each image.
        outputs: of each call, set once the step is finished.
    """

    def __init__(self, index: int, calibration: "CalibrationRun", runs: Runs, latents: Sequence[Any], returned: slice) -> None:
        self.index, self.latents = index, latents
        self.outputs: list[Any] = []
        self._calibration, self._runs, self._returned = calibration, runs, returned

    @property
    def sites(self) -> tuple[Site, ...]:
        """The transformer's sites, see `CalibrationRun.sites`."""
        return self._calibration.sites

    @property
    def first(self) -> bool:
        """Whether a transformer runs for the first time: caches hold nothing for it."""
        return self.index in (0, self._calibration.switch)

    def may_share(self, site: Site) -> bool:
        """Whether the site may compute the conditional branch alone: there are two, and what it works on has one length."""
        return self._calibration.branches.guided and not (self._calibration.other_texts and works_on_text(site))

    def full(self) -> Tensor:
        """The transformer's sample (B, …) with full attention everywhere, both branches."""
        return self.output([FULL] * len(self.sites))

    def output(self, cells: Sequence[Cell]) -> Tensor:
        """The transformer's sample (B, …) with these cells, one for each site, both branches; caches stay as they are."""
        samples = self.tried(self._by(cells, lambda *_: Writes()))
        return samples[0] if len(samples) == 1 else torch.cat(samples)

    def tried(self, at_site: AtSite) -> list[Tensor]:
        """The samples of each call with sites' outputs from `at_site`; the pipeline does not go on with them."""
        return self._used(samples_of(self._calibration.forward(self._runs, at_site)))

    def finish(self, cells: Sequence[Cell], candidates: Mapping[Site, Sequence[Cell]]) -> None:
        """Let the pipeline go on with the output under these cells; keep in caches all that `candidates` may read later."""
        self.finish_by(self._by(cells, lambda site, cell: _writes(candidates[site], cell)))

    def finish_by(self, at_site: AtSite) -> list[Tensor]:
        """Let the pipeline go on with the output with sites' outputs from `at_site`; gives each call's sample."""
        self.outputs = self._calibration.forward(self._runs, at_site)
        return self._used(samples_of(self.outputs))

    @contextmanager
    def traced(self, at_site: AtSite) -> Iterator[list[Tensor]]:
        """`finish_by` with gradients: within the block they can be asked for, with respect to each call's sample."""
        with self._calibration.traced(self._runs, at_site) as outputs:
            samples = samples_of(outputs)
            self.outputs = [output_with(output, sample.detach()) for output, sample in zip(outputs, samples, strict=True)]
            yield self._used(samples)

    def _used(self, samples: Sequence[Tensor]) -> list[Tensor]:
        if (got := [*map(len, samples)]) != (wanted := [*map(len, self.latents)]):
            raise NotIntercepted(
                f"the transformer gave samples of {got[0]} images for latents of {wanted[0]}; wanted as many, in a tensor "
                "(B, …), in a list with one for each image, or in a tuple that begins with either"
            )
        return [sample[:, self._returned] for sample in samples]

    def _by(self, cells: Sequence[Cell], writes: Callable[[Site, Cell], Writes]) -> AtSite:
        cell_of = dict(zip(self.sites, cells, strict=True))

        def at_site(call: SiteCall, state: Generation) -> Output:
            cell = cell_of[call.site]
            return execute_site(call, state.prepared(call.site, cell, writes(call.site, cell)), state)

        return at_site


def _writes(candidates: Sequence[Cell], cell: Cell) -> Writes:
    """What a cell leaves in the caches: all that a candidate might read in a later step, kept until it is overwritten."""
    if not isinstance(cell, Attend):
        return Writes()
    radii = {residual_radius(candidate) for candidate in candidates} if refreshes_residual(cell) else set()
    residuals = (Residual(radius, FOREVER, conditional_only=False) for radius in radii if radius is not None)
    return Writes(FOREVER, tuple(residuals))


def require_finite(out: Tensor, call: SiteCall, state: Generation) -> None:
    """Check the output of a site with full attention.

    Raises:
        InputsInvalid: a value is not finite.
    """
    if not all(bool(end.isfinite()) for end in out.detach().aminmax()):  # one pass, and nothing allocated; NaN is either end
        raise InputsInvalid(
            f"at step {state.step} {call.site.path} gave values that are not finite, with full attention; wanted finite ones; "
            "use bfloat16 or float32"
        )
