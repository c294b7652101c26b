"""What a site may give in a step, and what it remembers for the steps to come: the states of the dynamic programme."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from arrowhead.lifetimes import FOREVER, Residual, Writes
from arrowhead.methods import Arrow, Attend, Cached, Cell, Full, Reuse


@dataclass(frozen=True)
class Given:
    """An output of a site, as a step sees it that gives it: made `lag` steps ago, by full attention or by an arrow.

    `residual_lag`: steps since the residual that the arrow added was made; None where it added none. `residual_shared`: that
    step computed the conditional branch alone. `share`: so did the step that made the output.
    """

    lag: int = 0
    radius: int | None = None
    residual_lag: int | None = None
    residual_shared: bool = False
    share: bool = False

    def aged(self) -> "Given":
        """The same output, one step later."""
        residual_lag = None if self.residual_lag is None else self.residual_lag + 1
        return replace(self, lag=self.lag + 1, residual_lag=residual_lag)


@dataclass(frozen=True)
class Kept:
    """A residual at hand, made `lag` steps before the coming one; `half`: for the conditional branch alone.

    `shared`: the step that made it computed that branch alone, for both.
    """

    radius: int
    lag: int = 1
    shared: bool = False
    half: bool = False


@dataclass(frozen=True)
class Memory:
    """What the coming step can build on: the output that was computed last, and a residual; None for what there is not."""

    output: Given | None = None
    residual: Kept | None = None


START = Memory()


@dataclass(frozen=True)
class Move:
    """What a site does in a step from a memory: its cell, what the cell gives, what is written, and the memory after it."""

    cell: Cell
    given: Given
    writes: Writes
    after: Memory


@dataclass(frozen=True)
class Choices:
    """What the programme may choose from: the arrows' radii, ages of up to `ages` steps, and whether branches may be shared.

    Between two steps of full attention arrows add the residual of one radius, or none.
    """

    radii: tuple[int, ...]
    ages: int
    share_cfg: bool
    residual: bool = True
    reuse: bool = True

    def moves(self, memory: Memory) -> Iterator[Move]:
        """What a site may do from a memory besides `refreshing`; from nothing at all, nothing."""
        if memory == START:
            return
        for share in self._shares:
            yield from self._arrows(memory, share)
        if self.reuse and memory.output is not None:
            yield Move(Reuse(), memory.output, Writes(), self._after(memory.output, memory.residual))

    @property
    def _shares(self) -> tuple[bool, ...]:
        return (False, True) if self.share_cfg else (False,)

    def refreshing(self) -> Iterator[Move]:
        """Full attention, perhaps of the conditional branch alone, with a residual of one radius or without: always open."""
        for share in self._shares:
            given, cell = Given(share=share), Attend(Full(), share)
            yield Move(cell, given, Writes(), self._after(given, None))
            for radius in self.radii if self.residual else ():
                for half in self._shares[: 1 if share else None]:  # what is computed for one branch serves both
                    writes = Writes(residuals=(Residual(radius, FOREVER, conditional_only=half),))
                    kept = Kept(radius, lag=0, shared=share, half=half)
                    yield Move(cell, given, writes, self._after(given, kept))

    def _arrows(self, memory: Memory, share: bool) -> Iterator[Move]:
        kept = memory.residual
        if kept is None:
            for radius in self.radii:
                given = Given(radius=radius, share=share)
                yield Move(Attend(Arrow(radius), share), given, Writes(), self._after(given, None))
        elif share or not kept.half:
            given = Given(0, kept.radius, kept.lag, kept.shared, share)
            yield Move(Attend(Arrow(kept.radius, residual=True), share), given, Writes(), self._after(given, kept))

    def _after(self, given: Given, kept: Kept | None) -> Memory:
        """A step later; what is too old then is forgotten."""
        output = given.aged() if max(given.lag, given.residual_lag or 0) < self.ages else None
        older = None if kept is None or kept.lag >= self.ages else replace(kept, lag=kept.lag + 1)
        return Memory(output, older)


def givens_of(column: Sequence[Cell]) -> list[Given]:
    """What a column of one method gives in each step. What is cached beside heads that share serves both branches, too."""
    found: list[Given] = []
    made = Given()
    full, full_shared = 0, False
    for step, cell in enumerate(column):
        if isinstance(cell, Reuse) or isinstance(cell.method, Cached):
            made = made.aged()
            found.append(replace(made, share=made.share or (isinstance(cell, Attend) and cell.share_cfg)))
            continue
        made = Given(share=cell.share_cfg)
        if not isinstance(cell.method, Arrow):
            full, full_shared = step, cell.share_cfg
        elif cell.method.residual:
            made = Given(0, cell.method.radius, step - full, full_shared, cell.share_cfg)
        else:
            made = Given(0, cell.method.radius, share=cell.share_cfg)
        found.append(made)
    return found
