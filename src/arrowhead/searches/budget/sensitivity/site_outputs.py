"""What a site gives in a step: an output that it computes, one that it repeats, or one that it extrapolates from two.

A sensitivity table predicts the error of each of these values, and the dynamic program chooses between them. All are frozen, so
that they can be the keys of dictionaries. They say how an output was made, not what is in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from arrowhead.plans.cells import Arrow, Cached, Cell, Full, Precision, Radius, Reuse, refreshes_residual


@dataclass(frozen=True)
class AddedResidual:
    """The residual that an arrow adds: made `age` steps before the arrow ran, by a step that shared its branches or did not."""

    age: int
    shared: bool = False


@dataclass(frozen=True)
class ComputedOutput:
    """An output that is computed in this step: by full attention (`radius` None), or by the arrow of that radius.

    `share`: the conditional branch was computed alone, and its output serves both branches.
    """

    radius: Radius | None = None
    residual: AddedResidual | None = None
    share: bool = False
    precision: Precision = "native"

    lag: ClassVar[int] = 0
    """Steps since the output was computed."""

    @property
    def source(self) -> "ComputedOutput":
        """The output as the step gave it that computed it."""
        return self

    @property
    def oldest(self) -> int:
        """Steps since the oldest tensor was computed that the output is made of."""
        return self.residual.age if self.residual else 0

    def before(self) -> None:
        """None: the output is new in this step, and continues no other."""

    def aged(self) -> "RepeatedOutput":
        """The same output, repeated one step later."""
        return RepeatedOutput(self, 1)

    def shared_if(self, share: bool) -> "ComputedOutput":
        """The same output, which serves both branches if it did already or if `share` is true."""
        return replace(self, share=True) if share else self


@dataclass(frozen=True)
class RepeatedOutput:
    """An output that was computed `lag` steps ago (1 or more), and is given again."""

    source: ComputedOutput
    lag: int

    @property
    def share(self) -> bool:
        """Whether the conditional branch's output serves both branches."""
        return self.source.share

    @property
    def oldest(self) -> int:
        """Steps since the oldest tensor was computed that the output is made of."""
        return self.lag + self.source.oldest

    def before(self) -> "StoredOutput":
        """What the site gave a step ago: the same output, one step younger."""
        return self.source if self.lag == 1 else replace(self, lag=self.lag - 1)

    def aged(self) -> "RepeatedOutput":
        """The same output, one step later."""
        return replace(self, lag=self.lag + 1)

    def shared_if(self, share: bool) -> "RepeatedOutput":
        """The same output, which serves both branches if it did already or if `share` is true."""
        return replace(self, source=self.source.shared_if(share))


StoredOutput = ComputedOutput | RepeatedOutput
"""An output that one step computed: what a site can repeat, and what it can extrapolate from."""


@dataclass(frozen=True)
class ExtrapolatedOutput:
    """An output extrapolated from two: `later` + `slope` · `since` / `gap` · (`later` − `earlier`).

    The site was computed `since` steps ago, and `gap` steps before that. `later` and `earlier` are what it stored then, with
    their lags at this step. The lag of a head that was cached in such a step is longer.
    """

    later: RepeatedOutput
    earlier: RepeatedOutput
    slope: float
    since: int
    gap: int

    @property
    def oldest(self) -> int:
        """Steps since the oldest tensor was computed that the output is made of."""
        return max(self.later.oldest, self.earlier.oldest)

    def before(self) -> "SiteOutput":
        """What the site gave a step ago: an extrapolated output, too, or `later` itself if this is the first one."""
        if self.since == 1:
            return self.later.before()
        later, earlier = (replace(output, lag=output.lag - 1) for output in (self.later, self.earlier))
        return replace(self, later=later, earlier=earlier, since=self.since - 1)


SiteOutput = StoredOutput | ExtrapolatedOutput


def site_outputs_of(column: Sequence[Cell]) -> list[SiteOutput]:
    """What a site gives in each step under a column of cells of one method.

    A cached head's output serves both branches where the heads beside it share theirs, and so does what the site reuses of it.
    """
    found: list[SiteOutput] = []
    of_head: StoredOutput = ComputedOutput()  # the last output that the head computed
    stored: StoredOutput = of_head  # the head's part of the site's stored output
    earlier: RepeatedOutput | None = None  # its part of the output that the site stored before that one
    full_step, full_shared = 0, False  # where the residual was made
    computed, gap = 0, 1  # the step that computed the site last, and its distance from the one before
    for step, cell in enumerate(column):
        if isinstance(cell, Reuse):
            of_head, stored, earlier = of_head.aged(), stored.aged(), earlier.aged() if earlier else None
            assert isinstance(cell.extrapolate, float)  # one coefficient for both branches: others are a stack's
            if earlier and cell.extrapolate:
                found.append(ExtrapolatedOutput(stored, earlier, cell.extrapolate, step - computed, gap))
            else:
                found.append(stored)
            continue
        computed, gap = step, step - computed
        earlier = stored.aged().shared_if(cell.share_cfg)
        if isinstance(cell.method, Cached):
            of_head = of_head.aged()
            stored = of_head.shared_if(cell.share_cfg)
        else:
            assert isinstance(cell.method, Full | Arrow)
            if refreshes_residual(cell):
                full_step, full_shared = step, cell.share_cfg
            residual = AddedResidual(step - full_step, full_shared)
            of_head = stored = _computed(cell.method, cell.share_cfg, residual)
        found.append(stored)
    return found


def _computed(method: Full | Arrow, share: bool, residual: AddedResidual) -> ComputedOutput:
    """What a method gives, with the residual that is there for arrows that add one."""
    if isinstance(method, Full):
        return ComputedOutput(share=share, precision=method.precision)
    return ComputedOutput(method.radius, residual if method.residual else None, share, method.precision)
