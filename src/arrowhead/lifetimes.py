"""What a site must remember, and for how long: derived from its column of the plan, and from nothing else."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from arrowhead.methods import Cell, Reuse, refreshes_residual, residual_radius

FOREVER = sys.maxsize
"""A last reader that never comes: kept until overwritten."""


@dataclass(frozen=True)
class Residual:
    """A residual to make in a step; `conditional_only` when every reader shares the conditional branch."""

    radius: int
    last_reader: int
    conditional_only: bool


@dataclass(frozen=True)
class Writes:
    """What a site stores in a step. `output_until` is the step of the output's last reader, or None."""

    output_until: int | None = None
    residuals: tuple[Residual, ...] = ()


def lifetimes(column: Sequence[Cell]) -> tuple[Writes, ...]:
    """What one site writes in each step: only what a later step reads, until the step that reads it last.

    `column` holds the site's cells over the steps. A reusing step does not rewrite the output, so a chain of them reads
    the output computed before the chain. A residual made in a full step serves until the next full step.
    """
    return tuple(
        Writes() if isinstance(cell, Reuse) else Writes(_reuse_chain_end(column, step), _residuals(column, step))
        for step, cell in enumerate(column)
    )


def _reuse_chain_end(column: Sequence[Cell], step: int) -> int | None:
    end = step
    while end + 1 < len(column) and isinstance(column[end + 1], Reuse):
        end += 1
    return end if end > step else None


def _residuals(column: Sequence[Cell], step: int) -> tuple[Residual, ...]:
    if not refreshes_residual(column[step]):
        return ()
    readers: dict[int, list[int]] = {}
    for later in range(step + 1, len(column)):
        if refreshes_residual(column[later]):
            break
        radius = residual_radius(column[later])
        if radius is not None:
            readers.setdefault(radius, []).append(later)
    return tuple(
        Residual(radius, steps[-1], all(getattr(column[s], "share_cfg", False) for s in steps))
        for radius, steps in sorted(readers.items())
    )


def first_fault(column: Sequence[Cell]) -> str | None:
    """Why the column cannot run: it reads what no earlier step wrote. None when it can."""
    computed = full = False
    for step, cell in enumerate(column):
        if isinstance(cell, Reuse) and not computed:
            return f"step {step} reuses an output, but no earlier step computes one"
        if residual_radius(cell) is not None and not full:
            return f"step {step} adds a residual, but no earlier step has full attention"
        computed = computed or not isinstance(cell, Reuse)
        full = full or refreshes_residual(cell)
    return None
