"""Seconds of every cell, measured side by side on this device, in the first step of a generation."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from arrowhead.calibration.driver import Driver
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.step import Step
from arrowhead.engine.cache import Output
from arrowhead.engine.execute_site import SitePass, execute_site
from arrowhead.engine.generation import Generation
from arrowhead.engine.site_calls import SiteCall
from arrowhead.engine.stats import Stats
from arrowhead.models.find import find
from arrowhead.plans.cells import AST, EXTRAPOLATE, FULL, Arrow, Attend, Cell, Full
from arrowhead.plans.layout import Site, outermost
from arrowhead.plans.lifetimes import FOREVER, Residual, Writes
from arrowhead.searches.budget.solver.costs import SecondCosts, Shape, shape_of
from arrowhead.searches.budget.solver.states import Choices
from arrowhead.searches.progress import clock

ROUNDS = 5
"""Measurements of each cell; their median counts."""


def timed(driver: Driver, sites: Sequence[Site], choices: Choices, blocks: Sequence[Site] = ()) -> SecondCosts:
    """The seconds that every cell takes at these sites, and at the blocks around them as wholes, in the driver's first step.

    Each is the median of interleaved rounds. `other` are the seconds outside of the sites.

    Raises what `arrowhead.search` raises.
    """
    wanted = {*sites, *blocks}
    model = find(driver.pipe, {site.kind for site in wanted}).filtered(lambda site: site in wanted)
    seconds: dict[tuple[Shape, Cell | Residual], list[float]] = defaultdict(list)
    whole: list[float] = []
    timing = False  # a site, or a block with the sites within it

    def at_site(call: SiteCall, state: Generation) -> Output:
        nonlocal timing
        if not timing:
            SitePass.full(call, state).record_pass()
            if (shape_of(call.site), FULL) not in seconds:
                timing = True
                _time_site(call, state, choices, seconds)
                timing = False
        return call.native()

    def time_step(step: Step) -> None:
        step.finish_by(at_site)
        while any((shape_of(site), FULL) not in seconds for site in model.sites):  # sites within a block that was timed
            step.tried(at_site)
        whole.extend(_seconds(step.full) for _ in range(ROUNDS))

    CalibrationRun(driver, model).run(time_step, first_only=True)
    found = {key: median(values) for key, values in seconds.items()}
    full = sum(found[shape_of(site), FULL] for site in outermost(sites))
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
    """Time every cell of a site in turn, `ROUNDS` times after one time that does not count."""
    own = Generation.begin(state.branches, state.tokens, state.kernel, Stats(state.branches.samples))
    if call.site.kind != "self_attention":
        choices = replace(choices, radii=(), precisions=())
    radii = choices.radii
    both = tuple(Residual(radius, FOREVER, conditional_only=False) for radius in radii)
    execute_site(call, own.prepared(call.site, FULL, Writes(FOREVER, both)), own)
    if choices.slopes:
        own.advance(own.tokens)
        execute_site(call, own.prepared(call.site, FULL, Writes(FOREVER, slope_until=FOREVER)), own)
        own.advance(own.tokens)
    for counted in [False] + [True] * ROUNDS:
        for what, cell, writes in _timings(choices):
            spent = _seconds(partial(execute_site, call, own.prepared(call.site, cell, writes), own))
            if counted:
                seconds[shape_of(call.site), what].append(spent)


def _timings(choices: Choices) -> Iterator[tuple[Cell | Residual, Cell, Writes]]:
    """What is timed, with the cell and the writes that it runs: cells, and full attention that stores one residual."""
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


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return clock() - started
