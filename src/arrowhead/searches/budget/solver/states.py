"""What a site has stored before a step, and what it can do from there: the states and transitions of the dynamic program."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from arrowhead.plans.cells import Arrow, Attend, Cell, Full, Precision, Radius, Reuse
from arrowhead.plans.lifetimes import FOREVER, Residual, Writes
from arrowhead.searches.budget.sensitivity.site_outputs import (
    AddedResidual,
    ComputedOutput,
    ExtrapolatedOutput,
    RepeatedOutput,
    SiteOutput,
    StoredOutput,
)


@dataclass(frozen=True)
class StoredResidual:
    """A residual in the cache, made `lag` steps before the coming step.

    `shared`: the step that made it computed the conditional branch alone, for both. `half`: only that branch's is stored.
    """

    radius: Radius
    lag: int = 1
    shared: bool = False
    half: bool = False


@dataclass(frozen=True)
class State:
    """What is stored before a step: the output that was computed last, and a residual; None where there is none.

    `earlier` is the output that was computed before the last one, where both come from native full attention: the site can
    extrapolate from the two. `slope` is the part of the slope that the step before took. The coming step has to take the same.
    """

    output: RepeatedOutput | None = None
    residual: StoredResidual | None = None
    earlier: RepeatedOutput | None = None
    slope: float | None = None


START = State()
"""The state before the first step: nothing is stored."""


@dataclass(frozen=True)
class Transition:
    """What a site does in a step: its cell, the output that the cell gives, what it writes, and the state after the step."""

    cell: Cell
    output: SiteOutput
    writes: Writes
    after: State


@dataclass(frozen=True)
class Choices:
    """What the dynamic program may choose from.

    Between two steps of full attention all arrows add the residual of one radius, or none does. An output of one of the
    `precisions` other than native makes no residual, and leaves the residual that is stored.

    From one computed step to the next, a site repeats its output or extrapolates it by one slope (and repeats it once it is too
    old for that). So the table knows the error of the whole run of steps. Runs that alternate would look better than they are.

    Args:
        radii: of the arrows.
        ages: how many steps old what a step builds on may be.
        share_cfg: whether a site may compute the conditional branch alone.
        residual: whether arrows may add a residual.
        reuse: whether outputs may be repeated or extrapolated.
        slopes: parts of the slope that a site may extrapolate by.
        precisions: other precisions than native that arrows and full attention may have.
    """

    radii: tuple[Radius, ...]
    ages: int
    share_cfg: bool
    residual: bool = True
    reuse: bool = True
    slopes: tuple[float, ...] = ()
    precisions: tuple[Precision, ...] = ()

    def from_any_state(self) -> Iterator[Transition]:
        """Native full attention, of both branches or shared, that makes a residual of one radius or none."""
        for share in self._shares:
            output, cell = ComputedOutput(share=share), Attend(Full(), share)
            yield Transition(cell, output, Writes(), self._after(output, None))
            for radius in self.radii if self.residual else ():
                for half in self._shares[: 1 if share else None]:  # what is computed for one branch serves both
                    writes = Writes(residuals=(Residual(radius, FOREVER, conditional_only=half),))
                    made = StoredResidual(radius, lag=0, shared=share, half=half)
                    yield Transition(cell, output, writes, self._after(output, made))

    def from_state(self, state: State) -> Iterator[Transition]:
        """The transitions that are open besides those of `from_any_state`."""
        for share in self._shares:
            yield from self._imprecise(state, share)
        if state == START:
            return
        for share in self._shares:
            yield from self._arrows(state, share)
        if self.reuse and state.output is not None:
            yield from self._reuses(state, state.output)

    @property
    def _shares(self) -> tuple[bool, ...]:
        return (False, True) if self.share_cfg else (False,)

    def _imprecise(self, state: State, share: bool) -> Iterator[Transition]:
        """Full attention of other precisions."""
        for precision in self.precisions:
            output = ComputedOutput(share=share, precision=precision)
            yield Transition(Attend(Full(precision), share), output, Writes(), self._after(output, state.residual))

    def _arrows(self, state: State, share: bool) -> Iterator[Transition]:
        """Arrows, which add the residual if there is one."""
        residual = state.residual
        for precision in ("native", *self.precisions):
            if residual is None:
                for radius in self.radii:
                    output = ComputedOutput(radius, None, share, precision)
                    cell = Attend(Arrow(radius, precision=precision), share)
                    yield Transition(cell, output, Writes(), self._after(output, None))
            elif share or not residual.half:
                output = ComputedOutput(residual.radius, AddedResidual(residual.lag, residual.shared), share, precision)
                cell = Attend(Arrow(residual.radius, residual=True, precision=precision), share)
                yield Transition(cell, output, Writes(), self._after(output, residual))

    def _reuses(self, state: State, output: RepeatedOutput) -> Iterator[Transition]:
        """The stored output, repeated or extrapolated; and full attention that keeps it, to extrapolate from the two."""
        earlier = state.earlier
        if state.slope is None:
            yield Transition(Reuse(), output, Writes(), self._after(output, state.residual))
        if earlier is not None:
            for slope in self.slopes if state.slope is None else (state.slope,):
                extrapolated = ExtrapolatedOutput(output, earlier, slope, since=output.lag, gap=earlier.lag - output.lag)
                yield Transition(Reuse(slope), extrapolated, Writes(), self._after(output, state.residual, earlier, slope))
        plain = output.source.radius is None and output.source.precision == "native"
        if self.slopes and plain and output.lag < self.ages:
            full = ComputedOutput(share=output.share)
            yield Transition(Attend(Full(), output.share), full, Writes(), self._after(full, None, output))

    def _after(
        self,
        output: StoredOutput,
        residual: StoredResidual | None,
        earlier: RepeatedOutput | None = None,
        slope: float | None = None,
    ) -> State:
        """The state a step later, without what is too old then."""
        kept = output.aged() if output.oldest < self.ages else None
        older = None if residual is None or residual.lag >= self.ages else replace(residual, lag=residual.lag + 1)
        before = earlier.aged() if earlier is not None and earlier.lag < self.ages else None
        return State(kept, older, before, slope if before else None)
