"""What a site stores in each step, and which step reads each entry last, derived from the site's column of a plan.

A *column* is the cells of one site over the steps. An *entry* is one thing that a site stores in its cache. The plan's FLOPs
and memory, the engine and the solver all take their entries from `lifetimes`.

>>> from arrowhead.plans.cells import AST, FULL
>>> lifetimes((FULL, AST, AST, FULL))[0].output_until
2
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from arrowhead.plans.cells import (
    Attend,
    Cell,
    Radius,
    Reuse,
    extrapolates,
    radius_sort_key,
    reads_head_output,
    refreshes_residual,
    residual_radius,
)
from arrowhead.plans.layout import Site, stack_around

FOREVER = sys.maxsize
"""The last reader of an entry that is stored until the next one overwrites it."""
EntryKind = Literal["output", "slope", "heads", "residual", "handed over"]
"""What an entry holds.

- output: the site's output, after the output projection.
- slope: the change per step between the site's last two outputs.
- heads: outputs of heads, before the output projection.
- residual: residuals O − W of heads.
- handed over: the output of the first call of a step, for the second call of the same step.
"""


@dataclass(frozen=True)
class Residual:
    """Residuals O − W of one radius, to be stored in a step for `heads`, or for all heads (None).

    `last_reader` is the step that reads them last. `conditional_only`: every reader shares CFG, so the conditional branch's
    rows are enough.
    """

    radius: Radius
    last_reader: int
    conditional_only: bool
    heads: tuple[int, ...] | None = None

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """By radius, then by last reader."""
        return radius_sort_key(self.radius), self.last_reader, self.conditional_only


@dataclass(frozen=True)
class HeadOutput:
    """Outputs before the output projection, to be stored in a step for `heads`, or for all heads (None); see `Residual`."""

    last_reader: int
    conditional_only: bool
    heads: tuple[int, ...] | None = None

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """By last reader."""
        return self.last_reader, self.conditional_only


@dataclass(frozen=True)
class Writes:
    """What a site stores in one step.

    `output_until` is the last reader of the site's output, `slope_until` the last step that extrapolates it; None where no
    step does. The slope is the change per step from the output computed before.
    """

    output_until: int | None = None
    residuals: tuple[Residual, ...] = ()
    head_outputs: tuple[HeadOutput, ...] = ()
    slope_until: int | None = None


@dataclass(frozen=True)
class Computed:
    """What the earlier steps of a column have computed, and later steps may read. Cells are of one method: those of a head.

    `outputs` counts the site's outputs, `full`: the head was full, `attended`: the head was computed in any way.
    """

    outputs: int = 0
    full: bool = False
    attended: bool = False

    def after(self, cell: Cell) -> "Computed":
        """What has been computed after one more step, in which the site does `cell`."""
        if isinstance(cell, Reuse):
            return self
        return Computed(self.outputs + 1, self.full or refreshes_residual(cell), self.attended or not reads_head_output(cell))

    def fault(self, cell: Cell) -> str | None:
        """Why `cell` cannot run next: what it reads was not computed. None where it can run."""
        if isinstance(cell, Reuse) and not self.outputs:
            return "reuses an output, but no earlier step computes one"
        if extrapolates(cell) and self.outputs < 2:
            return "extrapolates from two outputs, but only one earlier step computes one"
        if residual_radius(cell) is not None and not self.full:
            return "adds a residual, but no earlier step has full attention"
        if reads_head_output(cell) and not self.attended:
            return "repeats a head's output, but no earlier step computes it"
        return None


def lifetimes(column: Sequence[Cell]) -> tuple[Writes, ...]:
    """What one site stores in each step: only what a later step reads, until the step that reads it last.

    A reusing step does not renew the site's output, so all steps of a chain of reuse read the output computed before the
    chain. The same holds for a chain of steps in which a head is cached. A residual made in a step in which its head is full
    serves until the next step in which the head is full.
    """
    views = _views(column)
    return tuple(
        Writes()
        if isinstance(cell, Reuse)
        else Writes(
            _output_until(column, step),
            _joined(_residuals(view, step) for view in views),
            _joined(_head_outputs(view, step) for view in views),
            _slope_until(column, step),
        )
        for step, cell in enumerate(column)
    )


def lifetimes_of_all(cells: Sequence[Sequence[Cell]], sites: Sequence[Site]) -> tuple[tuple[Writes, ...], ...]:
    """What each site stores in each step, from steps × sites of cells.

    Attention within a stack of the same plan runs where the stack computes. In the other steps nothing is read of it.
    """
    inner = stack_around(sites)
    columns = zip(sites, zip(*cells, strict=True), strict=True)
    return tuple(_where_computed(column) if site in inner else lifetimes(column) for site, column in columns)


def _where_computed(column: Sequence[Cell]) -> tuple[Writes, ...]:
    """What a site stores in the steps in which it computes, when its output is not read in the others."""
    steps = [step for step, cell in enumerate(column) if isinstance(cell, Attend)]
    found = [Writes()] * len(column)
    for step, writes in zip(steps, lifetimes([column[step] for step in steps]), strict=True):
        residuals = (replace(entry, last_reader=steps[entry.last_reader]) for entry in writes.residuals)
        outputs = (replace(entry, last_reader=steps[entry.last_reader]) for entry in writes.head_outputs)
        found[step] = Writes(residuals=tuple(residuals), head_outputs=tuple(outputs))
    return tuple(found)


def head_count(column: Sequence[Cell]) -> int | None:
    """The number of heads in a column that has cells with a method for each head; None where all heads do the same."""
    counts = {len(cell.method) for cell in column if isinstance(cell, Attend) and isinstance(cell.method, tuple)}
    return max(counts, default=None)


def of_head(column: Sequence[Cell], head: int) -> tuple[Cell, ...]:
    """The column of one head: cells of one method each."""
    return tuple(cell.of_head(head) for cell in column)


def first_fault(column: Sequence[Cell], switch: int | None = None) -> str | None:
    """Why a column cannot run: the first cell that reads what no earlier step computed. None where it can run.

    From the step `switch` on another transformer runs, which cannot read what was computed before.
    """
    faults = [(*found, head) for head, view in enumerate(_views(column)) if (found := _fault(view, switch)) is not None]
    if not faults:
        return None
    step, reason, head = min(faults)
    whose = "" if head_count(column) is None else f"head {head}: "
    return f"{whose}step {step} {reason}"


def _views(column: Sequence[Cell]) -> list[Sequence[Cell]]:
    """The columns of all heads; the column itself where all heads do the same."""
    heads = head_count(column)
    return [column] if heads is None else [of_head(column, head) for head in range(heads)]


def _fault(column: Sequence[Cell], switch: int | None) -> tuple[int, str] | None:
    """The first fault in a head's column: its step, and the reason."""
    computed = Computed()
    for step, cell in enumerate(column):
        if step == switch:
            computed = Computed()
        if reason := computed.fault(cell):
            return step, reason
        computed = computed.after(cell)
    return None


Entry = TypeVar("Entry", Residual, HeadOutput)


def _joined(of_heads: Iterable[tuple[Entry, ...]]) -> tuple[Entry, ...]:
    """The entries of all heads, from those of each head: heads with equal entries store them together."""
    owners: dict[Entry, list[int]] = {}
    heads = 0
    for head, entries in enumerate(of_heads):
        heads += 1
        for entry in entries:
            owners.setdefault(entry, []).append(head)
    return tuple(
        entry if len(owners[entry]) == heads else replace(entry, heads=tuple(owners[entry]))
        for entry in sorted(owners, key=lambda entry: entry.sort_key)
    )


def _output_until(column: Sequence[Cell], step: int) -> int | None:
    """The last reader of the output computed in `step`: the last step of the chain of reuse that follows, if there is one.

    Where the step after the chain stores a slope, that step reads the output, too.
    """
    end = _reuse_chain_end(column, step)
    if end + 1 < len(column) and _slope_until(column, end + 1) is not None:
        return end + 1
    return end if end > step else None


def _slope_until(column: Sequence[Cell], step: int) -> int | None:
    """The last step that extrapolates the output computed in `step`."""
    chain = range(step + 1, _reuse_chain_end(column, step) + 1)
    return max((later for later in chain if extrapolates(column[later])), default=None)


def _reuse_chain_end(column: Sequence[Cell], step: int) -> int:
    """The last step of the chain of reuse that follows `step`; `step` itself where none follows."""
    end = step
    while end + 1 < len(column) and isinstance(column[end + 1], Reuse):
        end += 1
    return end


def _residuals(column: Sequence[Cell], step: int) -> tuple[Residual, ...]:
    """The residuals that a head stores in `step`, one for each radius that is read before the head is full again."""
    if not refreshes_residual(column[step]):
        return ()
    readers: dict[Radius, list[int]] = {}
    for later in range(step + 1, len(column)):
        if refreshes_residual(column[later]):
            break
        radius = residual_radius(column[later])
        if radius is not None:
            readers.setdefault(radius, []).append(later)
    return tuple(Residual(radius, steps[-1], _all_share(column, steps)) for radius, steps in readers.items())


def _head_outputs(column: Sequence[Cell], step: int) -> tuple[HeadOutput, ...]:
    """The output that a head stores in `step`: one, where the head is cached before it is computed again."""
    if reads_head_output(column[step]):
        return ()
    readers: list[int] = []
    for later in range(step + 1, len(column)):
        if reads_head_output(column[later]):
            readers.append(later)
        elif isinstance(column[later], Attend):
            break
    return (HeadOutput(readers[-1], _all_share(column, readers)),) if readers else ()


def _all_share(column: Sequence[Cell], steps: Iterable[int]) -> bool:
    """Whether the column shares CFG in all these steps, in which it computes."""
    return all(getattr(column[step], "share_cfg", False) for step in steps)
