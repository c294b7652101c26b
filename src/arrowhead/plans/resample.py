"""A plan's cells for other circumstances than they were found in: another number of steps, or other tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import (
    FULL,
    Arrow,
    Attend,
    Box,
    Cached,
    Cell,
    Full,
    Method,
    Radius,
    Reuse,
    extrapolates,
    reads_head_output,
    refreshes_residual,
)
from arrowhead.plans.flops import site_flops
from arrowhead.plans.layout import Site, Tokens, relevant_tokens
from arrowhead.plans.lifetimes import head_count, lifetimes

Rows = tuple[tuple[Cell, ...], ...]
"""Steps × sites."""


@dataclass(frozen=True)
class Circumstances:
    """What cells are for; `switch` is the step from which on another transformer is called, or None."""

    steps: int
    tokens: Tokens
    switch: int | None

    def changes(self, other: "Circumstances") -> dict[str, str]:
        """What is otherwise there, for people to read."""
        pairs = ((name, getattr(other, name), own) for name, own in vars(self).items())
        return {name: f"{new}, was {own}" for name, new, own in pairs if new != own}


def derived(
    cells: Rows,
    sites: Sequence[Site],
    samples: int,
    was: Circumstances,
    steps: int | None,
    tokens: Tokens | None,
    switch: int | None,
) -> tuple[Rows, Circumstances]:
    """Cells for other circumstances; None: as it was, or for `switch` after the same part of the steps.

    Raises:
        InputsInvalid: nothing is asked for, or what cannot be.
    """
    if (steps is None and tokens is None) or not (steps is None or (type(steps) is int and steps > 0)):
        raise InputsInvalid(f"got steps={steps!r} and tokens={tokens}, wanted a number of steps of at least 1, or tokens")
    steps = was.steps if steps is None else steps
    new = Circumstances(steps, was.tokens, _switch(switch, was, steps))
    cells = _in_steps(cells, sites, samples, was, new)
    if tokens not in (None, was.tokens):
        new = replace(new, tokens=_seen(tokens, was.tokens, sites))
        cells = tuple(
            tuple(_reaching(cell, site, was.tokens, new.tokens) for cell, site in zip(row, sites, strict=True)) for row in cells
        )
    return cells, new


def _switch(asked: int | None, was: Circumstances, steps: int) -> int | None:
    """Where the other transformer takes over; the first steps remain the first's, and the last ones the other's."""
    if was.switch and asked is None and steps > 1:
        return min(max(1, _scaled(was.switch, was.steps, steps)), steps - 1)
    found = was.switch if asked is None else asked
    same = (found is None) == (was.switch is None) and bool(found) == bool(was.switch)
    if same and (found or 0) in range(steps):
        return found
    raise InputsInvalid(
        f"got switch={asked} and steps={steps} for a plan of {was.steps} steps with switch={was.switch}; wanted steps for each "
        "transformer that the plan speaks of, and for no other"
    )


def _in_steps(cells: Rows, sites: Sequence[Site], samples: int, was: Circumstances, new: Circumstances) -> Rows:
    """The same for another number of steps.

    Each new step takes all that some old step of the same stretch of the run did, so that sites which went together still do:
    of those within the stretch the one with which FLOPs so far are nearest to what the old plan had spent by then. The first
    takes the first. What would then read what no step has written is computed in full instead.
    """
    spent = [0] * was.steps
    for site, column in zip(sites, zip(*cells, strict=True), strict=True):
        for step, (cell, writes) in enumerate(zip(column, lifetimes(column), strict=True)):
            spent[step] += int(site_flops(site, was.tokens, cell, writes, samples).module)
    switch, later = was.switch or 0, new.switch or 0
    taken = _taken(spent[:switch], later)
    taken += [switch + old for old in _taken(spent[switch:], new.steps - later)]
    columns = zip(*(cells[old] for old in taken), strict=True)
    return tuple(zip(*(_sound(column, new.switch) for column in columns), strict=True))


def _taken(spent: Sequence[int], steps: int) -> list[int]:
    """Which old step each of `steps` new ones takes after; `spent` are the old ones' FLOPs. Whole numbers, so exact."""
    old, before, taken = len(spent), [0, *accumulate(spent)], list[int]()
    for new in range(steps):
        first, last = new * old // steps, -(-(new + 1) * old // steps)
        whole, part = divmod((new + 1) * old, steps)  # where the stretch ends, in old steps
        due = before[whole] * steps + (spent[whole] * part if part else 0)  # FLOPs by then, times `old` / `steps`
        still = due - sum(spent[step] for step in taken) * old
        middle = (2 * new + 1) * old
        near = {step: (abs(spent[step] * old - still), abs((2 * step + 1) * steps - middle)) for step in range(first, last)}
        taken.append(min(near, key=near.__getitem__) if new else 0)
    return taken


def _sound(column: Sequence[Cell], switch: int | None) -> tuple[Cell, ...]:
    """The column, computed in full where it reads what no earlier step wrote, with the same transformer: a site, or a head."""
    heads = head_count(column) or 1
    computed, full, attended = 0, [False] * heads, [False] * heads
    found = list[Cell]()
    for step, cell in enumerate(column):
        if step == switch:
            computed, full, attended = 0, [False] * heads, [False] * heads
        if isinstance(cell, Reuse):
            found.append(cell if computed > extrapolates(cell) else FULL)
        else:
            there = zip(cell.methods(heads), full, attended, strict=True)
            found.append(Attend(tuple(method if _has(method, *own) else Full() for method, *own in there), cell.share_cfg))
        if isinstance(own := found[-1], Attend):
            computed += 1
            views = [Attend(method) for method in own.methods(heads)]
            full = [was or refreshes_residual(view) for was, view in zip(full, views, strict=True)]
            attended = [was or not reads_head_output(view) for was, view in zip(attended, views, strict=True)]
    return tuple(found)


def _has(method: Method, full: bool, attended: bool) -> bool:
    """Whether what a head reads is there, once it has been full, or computed in any way."""
    if isinstance(method, Cached):
        return attended
    return full or not (isinstance(method, Arrow) and method.residual)


def _seen(asked: Tokens, was: Tokens, sites: Sequence[Site]) -> Tokens:
    """What of a call's tokens the sites see.

    Raises:
        InputsInvalid: the text is on another side, or not there any more.
    """
    after, before = relevant_tokens(asked, sites), relevant_tokens(was, sites)
    if (bool(after.text), after.text_first) != (bool(before.text), before.text_first):
        raise InputsInvalid(f"got {asked} for a plan for {was}, wanted text on the same side; change the visual tokens alone")
    return after


def _reaching(cell: Cell, site: Site, before: Tokens, after: Tokens) -> Cell:
    """The cell for other tokens of a call: bands reach over the same part of the site's tokens, boxes of its grid.

    To whole ones, and at least 1 unless it was 0.

    Raises:
        InputsInvalid: a grid is needed that is not known.
    """
    if not isinstance(cell, Attend):
        return cell
    own = [
        replace(method, radius=_radius(method.radius, site.tokens(before), site.tokens(after)))
        if isinstance(method, Arrow)
        else method
        for method in (cell.method if isinstance(cell.method, tuple) else (cell.method,))
    ]
    return Attend(tuple(own), cell.share_cfg)


def _radius(radius: Radius, before: Tokens, after: Tokens) -> Radius:
    if not isinstance(radius, Box):
        return _scaled(radius, before.visual, after.visual)
    was, new = before.grid, after.grid
    if was is None or new is None:
        raise InputsInvalid(f"got {after} for a plan with boxes, wanted a grid; make it by Tokens.of_grid")
    sizes = (was.frames, new.frames), (was.rows, new.rows), (was.columns, new.columns)
    return Box(*(None if own is None else _scaled(own, *size) for own, size in zip(radius.reaches, sizes, strict=True)))


def _scaled(reach: int, before: int, after: int) -> int:
    """As much of `after` as it is of `before`, rounded."""
    return max(1, (2 * reach * after + before) // (2 * before)) if reach else 0
