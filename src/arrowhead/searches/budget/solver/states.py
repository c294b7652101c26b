"""What a site may give in a step, and what it remembers for the steps to come: the states of the dynamic programme."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from arrowhead.plans.cells import Arrow, Attend, Cached, Cell, Full, Precision, Radius, Reuse, refreshes_residual
from arrowhead.plans.lifetimes import FOREVER, Residual, Writes

SLOPES = (0.5, 0.75, 1.0)
"""What of a line's slope may be taken. Less than all of it is better where outputs are noisy, as in a run's first steps."""


@dataclass(frozen=True)
class SiteOutput:
    """An output of a site, as a step sees it that gives it: made `lag` steps ago, by full attention or by an arrow.

    `residual_lag`: steps since the residual that the arrow added was made; None where it added none. `residual_shared`: that
    step computed the conditional branch alone. `share`: so did the step that made the output. `earlier`: what the site gave
    before that, where the line through both is given, with this `slope` of its own, `since` steps after the later of the two,
    which is `gap` steps after the earlier.
    `precision` is that of the output.
    """

    lag: int = 0
    radius: Radius | None = None
    residual_lag: int | None = None
    residual_shared: bool = False
    share: bool = False
    earlier: "SiteOutput | None" = None
    since: int = 0
    gap: int = 1
    slope: float = 1.0
    precision: Precision = "native"

    @property
    def oldest(self) -> int:
        """Steps since the oldest of what this is made of was computed."""
        return max(self.lag, self.residual_lag or 0, self.earlier.oldest if self.earlier else 0)

    def before(self) -> "SiteOutput | None":
        """What a site gave a step ago, if it has been doing the same since the output was computed; None where this is new."""
        if self.lag == 0:
            return None
        return self._moved(-1).as_it_was() if self.since == 1 else self._moved(-1)

    def as_it_was(self) -> "SiteOutput":
        """The later output by itself."""
        return replace(self, earlier=None, since=0, gap=1, slope=1.0)

    def continued(self, earlier: "SiteOutput", since: int, gap: int, slope: float) -> "SiteOutput":
        """The line through this output and an earlier one."""
        return replace(self, earlier=earlier, since=since, gap=gap, slope=slope)

    def aged(self) -> "SiteOutput":
        """The same output, one step later."""
        return self._moved(1)

    def _moved(self, steps: int) -> "SiteOutput":
        residual_lag = None if self.residual_lag is None else self.residual_lag + steps
        if self.earlier is None:
            return replace(self, lag=self.lag + steps, residual_lag=residual_lag)
        earlier, since = self.earlier._moved(steps), self.since + steps
        return replace(self, lag=self.lag + steps, residual_lag=residual_lag, earlier=earlier, since=since)


@dataclass(frozen=True)
class StoredResidual:
    """A residual at hand, made `lag` steps before the coming one; `half`: for the conditional branch alone.

    `shared`: the step that made it computed that branch alone, for both.
    """

    radius: Radius
    lag: int = 1
    shared: bool = False
    half: bool = False


@dataclass(frozen=True)
class State:
    """What the coming step can build on: the output that was computed last, and a residual; None for what there is not.

    `earlier`: the output that was computed before the last, where both are of native full attention: a line goes through them.
    `slope`: what of the line's slope was taken in the step before, and has to be in the coming one.
    """

    output: SiteOutput | None = None
    residual: StoredResidual | None = None
    earlier: SiteOutput | None = None
    slope: float | None = None


START = State()


@dataclass(frozen=True)
class Transition:
    """What a site does in a step from a memory: its cell, what the cell gives, what is written, and the memory after it."""

    cell: Cell
    given: SiteOutput
    writes: Writes
    after: State


@dataclass(frozen=True)
class Choices:
    """What the programme may choose from: the arrows' radii, ages of up to `ages` steps, and whether branches may be shared.

    Between two steps of full attention arrows add the residual of one radius, or none. `precisions` other than native are open
    to arrows and to full attention, which then makes no residual, and leaves the one that there is.

    Until the next step that computes, an output is repeated, or continued by one slope (and repeated when it is too old for
    that): so are a run's damages known, which where kinds alternate would look smaller than they are.
    """

    radii: tuple[Radius, ...]
    ages: int
    share_cfg: bool
    residual: bool = True
    reuse: bool = True
    slopes: tuple[float, ...] = ()
    precisions: tuple[Precision, ...] = ()

    def moves(self, memory: State) -> Iterator[Transition]:
        """What a site may do from a memory besides `refreshing`; from nothing at all, only full attention by less precision."""
        for share in self._shares:
            yield from self._imprecise(memory, share)
        if memory == START:
            return
        for share in self._shares:
            yield from self._arrows(memory, share)
        output, earlier = memory.output, memory.earlier
        if not self.reuse or output is None:
            return
        if memory.slope is None:
            yield Transition(Reuse(), output, Writes(), self._after(output, memory.residual))
        if earlier is not None:
            for slope in self.slopes if memory.slope is None else (memory.slope,):
                line = output.continued(earlier, output.lag, earlier.lag - output.lag, slope)
                yield Transition(Reuse(slope), line, Writes(), self._after(output, memory.residual, earlier, slope))
        plain = output.radius is None and output.precision == "native"
        if self.slopes and plain and output.lag < self.ages:
            given = SiteOutput(share=output.share)
            yield Transition(Attend(Full(), output.share), given, Writes(), self._after(given, None, output))

    @property
    def _shares(self) -> tuple[bool, ...]:
        return (False, True) if self.share_cfg else (False,)

    def refreshing(self) -> Iterator[Transition]:
        """Full attention, perhaps of the conditional branch alone, with a residual of one radius or without: always open."""
        for share in self._shares:
            given, cell = SiteOutput(share=share), Attend(Full(), share)
            yield Transition(cell, given, Writes(), self._after(given, None))
            for radius in self.radii if self.residual else ():
                for half in self._shares[: 1 if share else None]:  # what is computed for one branch serves both
                    writes = Writes(residuals=(Residual(radius, FOREVER, conditional_only=half),))
                    kept = StoredResidual(radius, lag=0, shared=share, half=half)
                    yield Transition(cell, given, writes, self._after(given, kept))

    def _imprecise(self, memory: State, share: bool) -> Iterator[Transition]:
        for precision in self.precisions:
            given = SiteOutput(share=share, precision=precision)
            yield Transition(Attend(Full(precision), share), given, Writes(), self._after(given, memory.residual))

    def _arrows(self, memory: State, share: bool) -> Iterator[Transition]:
        kept = memory.residual
        for precision in ("native", *self.precisions):
            if kept is None:
                for radius in self.radii:
                    given = SiteOutput(radius=radius, share=share, precision=precision)
                    cell = Attend(Arrow(radius, precision=precision), share)
                    yield Transition(cell, given, Writes(), self._after(given, None))
            elif share or not kept.half:
                given = SiteOutput(0, kept.radius, kept.lag, kept.shared, share, precision=precision)
                cell = Attend(Arrow(kept.radius, residual=True, precision=precision), share)
                yield Transition(cell, given, Writes(), self._after(given, kept))

    def _after(
        self, given: SiteOutput, kept: StoredResidual | None, earlier: SiteOutput | None = None, slope: float | None = None
    ) -> State:
        """A step later; what is too old then is forgotten."""
        output = given.aged() if given.oldest < self.ages else None
        older = None if kept is None or kept.lag >= self.ages else replace(kept, lag=kept.lag + 1)
        before = earlier.aged() if earlier is not None and earlier.lag < self.ages else None
        return State(output, older, before, slope if before else None)


def site_outputs_of(column: Sequence[Cell]) -> list[SiteOutput]:
    """What a column of one method gives in each step.

    What is cached beside heads that share serves both branches, and so does the site's output that is reused after that.
    """
    found: list[SiteOutput] = []
    made = whole = SiteOutput()  # the head's last computed output, and what is in the site's
    earlier: SiteOutput | None = None  # what was in the site's output before that
    full, full_shared = 0, False
    computed, gap = 0, 1  # when the site last was, and how many steps after the time before
    for step, cell in enumerate(column):
        if isinstance(cell, Reuse):
            made, whole, earlier = made.aged(), whole.aged(), None if earlier is None else earlier.aged()
            found.append(
                whole.continued(earlier, step - computed, gap, cell.extrapolate) if earlier and cell.extrapolate else whole
            )
            continue
        computed, gap = step, step - computed
        before = whole.aged()
        if isinstance(cell.method, Cached):
            made = made.aged()
            whole = replace(made, share=made.share or cell.share_cfg)
        else:
            assert isinstance(cell.method, Full | Arrow)
            made = SiteOutput(share=cell.share_cfg, precision=cell.method.precision)
            if refreshes_residual(cell):
                full, full_shared = step, cell.share_cfg
            elif isinstance(cell.method, Arrow):
                made = replace(made, radius=cell.method.radius)
                if cell.method.residual:
                    made = replace(made, residual_lag=step - full, residual_shared=full_shared)
            whole = made
        earlier = replace(before, share=before.share or cell.share_cfg)
        found.append(whole)
    return found
