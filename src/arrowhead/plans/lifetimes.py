"""What a site must remember, and for how long: derived from its column of the plan, and from nothing else."""

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

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

FOREVER = sys.maxsize
"""A last reader that never comes: kept until overwritten."""
What = Literal["output", "slope", "heads", "residual", "handed over"]
"""What is remembered: a module's output, its change per step, outputs of heads, their residuals; or an output for the second
call of the same step."""


@dataclass(frozen=True)
class Residual:
    """A residual to make in a step for some heads, or for all (None); `conditional_only` when every reader shares CFG."""

    radius: Radius
    last_reader: int
    conditional_only: bool
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class HeadOutput:
    """Outputs before the output projection to keep in a step, for some heads or for all (None)."""

    last_reader: int
    conditional_only: bool
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Writes:
    """What a site stores in a step. `output_until` is the step of the module output's last reader, or None.

    `slope_until`: likewise of the change per step from the output computed before, for outputs that are extrapolated.
    """

    output_until: int | None = None
    residuals: tuple[Residual, ...] = ()
    head_outputs: tuple[HeadOutput, ...] = ()
    slope_until: int | None = None


Stored = TypeVar("Stored", Residual, HeadOutput)


def lifetimes(column: Sequence[Cell]) -> tuple[Writes, ...]:
    """What one site writes in each step: only what a later step reads, until the step that reads it last.

    `column` holds the site's cells over the steps. A reusing step does not rewrite the output, so a chain of them reads
    the output computed before the chain; likewise a chain of steps in which a head is cached. A residual made in a step
    where its head is full serves until the head's next full step.
    """
    heads = head_count(column)
    return tuple(
        Writes()
        if isinstance(cell, Reuse)
        else Writes(
            _output_until(column, step),
            _of_heads(column, step, heads, _residuals),
            _of_heads(column, step, heads, _head_outputs),
            _slope_until(column, step),
        )
        for step, cell in enumerate(column)
    )


def head_count(column: Sequence[Cell]) -> int | None:
    """How many heads the column tells apart; None when it treats all alike."""
    counts = {len(cell.method) for cell in column if isinstance(cell, Attend) and isinstance(cell.method, tuple)}
    return max(counts, default=None)


def of_head(column: Sequence[Cell], head: int) -> tuple[Cell, ...]:
    """The column as one head sees it: cells of one method each."""
    return tuple(cell.of_head(head) if isinstance(cell, Attend) else cell for cell in column)


def _of_heads(
    column: Sequence[Cell], step: int, heads: int | None, of_one: Callable[[Sequence[Cell], int], tuple[Stored, ...]]
) -> tuple[Stored, ...]:
    """What `of_one` says of each head, heads that agree taken together."""
    if heads is None:
        return of_one(column, step)
    agreed: dict[Stored, list[int]] = {}
    for head in range(heads):
        for stored in of_one(of_head(column, head), step):
            agreed.setdefault(stored, []).append(head)
    return tuple(
        stored if len(who) == heads else replace(stored, heads=tuple(who))
        for stored, who in sorted(agreed.items(), key=lambda item: (_order(item[0]), item[1]))
    )


def _order(stored: Residual | HeadOutput) -> Hashable:
    return (radius_sort_key(getattr(stored, "radius", 0)), stored.last_reader, stored.conditional_only)


def _output_until(column: Sequence[Cell], step: int) -> int | None:
    """The end of the chain of reusing steps, or the step after it, where that takes the slope to its own output."""
    end = _reuse_chain_end(column, step)
    if end + 1 < len(column) and _slope_until(column, end + 1) is not None:
        return end + 1
    return end if end > step else None


def _slope_until(column: Sequence[Cell], step: int) -> int | None:
    chain = range(step + 1, _reuse_chain_end(column, step) + 1)
    return max((later for later in chain if extrapolates(column[later])), default=None)


def _reuse_chain_end(column: Sequence[Cell], step: int) -> int:
    end = step
    while end + 1 < len(column) and isinstance(column[end + 1], Reuse):
        end += 1
    return end


def _residuals(column: Sequence[Cell], step: int) -> tuple[Residual, ...]:
    if not refreshes_residual(column[step]):
        return ()
    readers: dict[Radius, list[int]] = {}
    for later in range(step + 1, len(column)):
        if refreshes_residual(column[later]):
            break
        radius = residual_radius(column[later])
        if radius is not None:
            readers.setdefault(radius, []).append(later)
    return tuple(
        Residual(radius, steps[-1], all(getattr(column[s], "share_cfg", False) for s in steps))
        for radius, steps in sorted(readers.items(), key=lambda item: radius_sort_key(item[0]))
    )


def _head_outputs(column: Sequence[Cell], step: int) -> tuple[HeadOutput, ...]:
    if reads_head_output(column[step]):
        return ()
    readers: list[int] = []
    for later in range(step + 1, len(column)):
        if reads_head_output(column[later]):
            readers.append(later)
        elif isinstance(column[later], Attend):
            break
    if not readers:
        return ()
    return (HeadOutput(readers[-1], all(getattr(column[s], "share_cfg", False) for s in readers)),)


def first_fault(column: Sequence[Cell], switch: int | None = None) -> str | None:
    """Why the column cannot run: it reads what no earlier step wrote. None when it can.

    Nothing that was written before the step `switch` may be read from there on.
    """
    heads = head_count(column)
    views = [column] if heads is None else [of_head(column, head) for head in range(heads)]
    faults = [(fault, head) for head, view in enumerate(views) if (fault := _fault(view, switch)) is not None]
    if not faults:
        return None
    (step, what), head = min(faults)
    whose = "" if heads is None else f"head {head}: "
    return f"{whose}step {step} {what}"


def _fault(column: Sequence[Cell], switch: int | None) -> tuple[int, str] | None:
    """The first fault of a column of one head."""
    computed, full, attended = 0, False, False
    for step, cell in enumerate(column):
        if step == switch:
            computed, full, attended = 0, False, False
        if isinstance(cell, Reuse) and not computed:
            return step, "reuses an output, but no earlier step computes one"
        if extrapolates(cell) and computed < 2:
            return step, "extrapolates from two outputs, but only one earlier step computes one"
        if residual_radius(cell) is not None and not full:
            return step, "adds a residual, but no earlier step has full attention"
        if reads_head_output(cell) and not attended:
            return step, "repeats a head's output, but no earlier step computes it"
        computed += not isinstance(cell, Reuse)
        attended = attended or (isinstance(cell, Attend) and not reads_head_output(cell))
        full = full or refreshes_residual(cell)
    return None
