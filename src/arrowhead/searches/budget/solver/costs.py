"""What is counted as cost: FLOPs in closed form, or seconds measured on this device side by side with full attention."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from arrowhead.calibration.run import CalibrationRun
from arrowhead.engine.cache import Output
from arrowhead.engine.execute_site import execute_site
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.stats import Stats
from arrowhead.errors import NotIntercepted
from arrowhead.models.find import find
from arrowhead.plans.cells import AST, EXTRAPOLATE, FULL, Arrow, Attend, Cell, Full, Radius, extrapolates
from arrowhead.plans.flops import site_flops
from arrowhead.plans.layout import Site, Tokens, outermost
from arrowhead.plans.lifetimes import FOREVER, Residual, Writes
from arrowhead.searches.budget.solver.states import Choices

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

Measure = Literal["attention", "module", "transformer"]
ROUNDS = 5


class Costs(Protocol):
    """The costs of one step: of a site that runs a cell, and of everything outside of the sites."""

    @property
    def other(self) -> float:
        """The cost outside of the sites, which no cell changes."""

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """The cost of a site that runs this cell and writes this."""


@dataclass(frozen=True)
class FlopCosts:
    """FLOPs of one image in one step.

    The `measure` says which ones: those of attention's two matmuls, of whole modules, or of the transformer, which are those of
    whole modules and `outside` of them.
    """

    measure: Measure
    tokens: Tokens
    samples: int
    outside: float = 0.0

    @property
    def other(self) -> float:
        """FLOPs of the transformer outside of the sites."""
        return self.outside if self.measure == "transformer" else 0.0

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """FLOPs in closed form, see `plans.flops.site_flops`."""
        flops = site_flops(site, self.tokens, cell, writes, self.samples)
        return flops.attention if self.measure == "attention" else flops.module


Shape = Site
"""A site without its path: those that are alike are timed once."""


@dataclass(frozen=True)
class SecondCosts:
    """Measured seconds of one step, with the inputs that were timed.

    `cells` are the seconds of a cell at a site of this shape, `residuals` those that making a residual adds (by its radius, and
    whether for the conditional branch alone), `other` those outside of the sites. The slope that a computed output stores for
    later extrapolation takes one pass over two outputs, and is left out.
    """

    cells: Mapping[tuple[Shape, Cell], float]
    residuals: Mapping[tuple[Shape, Radius, bool], float]
    other: float

    def of(self, site: Site, cell: Cell, writes: Writes) -> float:
        """Seconds as measured at the first site of its shape."""
        shape, shared = _shape(site), isinstance(cell, Attend) and cell.share_cfg
        cell = EXTRAPOLATE if extrapolates(cell) else cell  # the slope's size makes no difference
        made = sum(self.residuals[shape, r.radius, r.conditional_only or shared] for r in writes.residuals)
        return self.cells[shape, cell] + made


def timed(
    pipe: "DiffusionPipeline", inputs: Mapping[str, Any], sites: Sequence[Site], choices: Choices, blocks: Sequence[Site] = ()
) -> SecondCosts:
    """Time every cell for these sites, and the blocks around them, as wholes on the first step of the pipeline's run.

    The median of interleaved rounds. What is outside of the sites is `other`.

    Raises what `arrowhead.search` raises.
    """
    looked_at = {*sites, *blocks}
    model = find(pipe, {site.kind for site in looked_at}).only(lambda site: site in looked_at)
    calibration = CalibrationRun(model, inputs)
    seconds: dict[tuple[Shape, Cell | Residual], list[float]] = defaultdict(list)
    whole: list[float] = []
    busy: list[Site] = []  # a block that is being timed, and passes what lies within

    def at_site(call: SiteCall, state: Generation) -> Output:
        if not busy:
            state.stats.record_pass(call.site, FULL, state.tokens)
        if not busy and (_shape(call.site), FULL) not in seconds:
            busy.append(call.site)
            _time_site(call, state, choices, seconds)
            busy.clear()
        return call.native()

    with closing(calibration.steps()) as steps:
        step = next(steps, None)
        if step is None:
            raise NotIntercepted("the pipeline never called its transformer; wanted at least one denoising step")
        step.finish_by(at_site)
        while any((_shape(site), FULL) not in seconds for site in model.sites):  # within a block that was timed
            step.tried(at_site)
        for _ in range(ROUNDS):
            whole.append(_seconds(step.full))
    found = {key: median(values) for key, values in seconds.items()}
    full = sum(found[_shape(site), FULL] for site in outermost(sites))
    cells = {(shape, what): value for (shape, what), value in found.items() if not isinstance(what, Residual)}
    residuals = {
        (shape, what.radius, what.conditional_only): max(value - found[shape, FULL], 0.0)
        for (shape, what), value in found.items()
        if isinstance(what, Residual)
    }
    return SecondCosts(cells, residuals, max(median(whole) - full, 0.0))


def _time_site(
    call: SiteCall, state: Generation, choices: Choices, seconds: dict[tuple[Shape, Cell | Residual], list[float]]
) -> None:
    """Every cell of a site in turn, `ROUNDS` times after one that does not count."""
    own = Generation.begin(state.branches, state.tokens, state.kernel, Stats(state.branches.samples))
    if call.site.kind != "self_attention":
        choices = replace(choices, radii=(), precisions=())
    radii = choices.radii
    both = tuple(Residual(radius, FOREVER, conditional_only=False) for radius in radii)
    execute_site(call, FULL, Writes(FOREVER, both), own)
    if choices.slopes:
        own.advance(own.tokens)
        execute_site(call, FULL, Writes(FOREVER, slope_until=FOREVER), own)
        own.advance(own.tokens)
    for counted in [False] + [True] * ROUNDS:
        for what, cell, writes in _tried(choices):
            spent = _seconds(lambda cell=cell, writes=writes: execute_site(call, cell, writes, own))  # type: ignore[misc]
            if counted:
                seconds[_shape(call.site), what].append(spent)


def _tried(choices: Choices) -> Iterator[tuple[Cell | Residual, Cell, Writes]]:
    """What is timed: cells, and full attention that makes one residual, which is kept as those before were."""
    for reused in (AST, EXTRAPOLATE) if choices.slopes else (AST,):
        yield reused, reused, Writes()
    for share in (False, True) if choices.share_cfg else (False,):
        for precision in ("native", *choices.precisions):
            arrows = [Arrow(radius, residual, precision) for radius in choices.radii for residual in (False, True)]
            for cell in (Attend(Full(precision), share), *(Attend(arrow, share) for arrow in arrows)):
                yield cell, cell, Writes()
        for radius in choices.radii:
            made = Residual(radius, FOREVER, conditional_only=share)
            yield made, FULL, Writes(FOREVER, (made,))


def _shape(site: Site) -> Shape:
    return replace(site, path="", within=tuple(map(_shape, site.within)))


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started
