"""Derives a plan's cells for another number of steps, or for other tokens, without a search.

Each new step takes a whole row of cells (all sites of one old step) from its own stretch of the run; bands keep the part of the
tokens that they reach over. What could then not run is computed in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import FULL, Arrow, Attend, Box, Cell, Full, Method, Radius, Reuse
from arrowhead.plans.flops import site_flops
from arrowhead.plans.layout import Site, Tokens, relevant_tokens
from arrowhead.plans.lifetimes import Computed, head_count, lifetimes

Rows = tuple[tuple[Cell, ...], ...]
"""Steps × sites."""


@dataclass(frozen=True)
class Conditions:
    """What cells are made for. From the step `switch` on another transformer is called; None where there is one transformer."""

    steps: int
    tokens: Tokens
    switch: int | None

    def changes(self, other: "Conditions") -> dict[str, str]:
        """The fields that differ in `other`, each as "new, was old", for people to read."""
        pairs = ((name, getattr(other, name), old) for name, old in vars(self).items())
        return {name: f"{new}, was {old}" for name, new, old in pairs if new != old}


def resampled(
    cells: Rows,
    sites: Sequence[Site],
    samples: int,
    old: Conditions,
    steps: int | None,
    tokens: Tokens | None,
    switch: int | None,
) -> tuple[Rows, Conditions]:
    """Returns cells for other steps or tokens, with the conditions that they are for.

    None for `steps` or `tokens` leaves them as they are; None for `switch` keeps the part of the steps before it.

    Raises:
        InputsInvalid: neither steps nor tokens are given, or a value is none that a plan can have.
    """
    if (steps is None and tokens is None) or not (steps is None or (type(steps) is int and steps > 0)):
        raise InputsInvalid(f"got steps={steps!r} and tokens={tokens}, wanted a number of steps of at least 1, or tokens")
    steps = old.steps if steps is None else steps
    new = Conditions(steps, old.tokens, _new_switch(switch, old, steps))
    cells = _in_steps(cells, sites, samples, old, new)
    if tokens not in (None, old.tokens):
        new = replace(new, tokens=_relevant(tokens, old.tokens, sites))
        cells = tuple(
            tuple(_with_radii(cell, site, old.tokens, new.tokens) for cell, site in zip(row, sites, strict=True))
            for row in cells
        )
    return cells, new


def _new_switch(asked: int | None, old: Conditions, steps: int) -> int | None:
    """The new step in which the other transformer takes over: each transformer keeps its own steps' cells."""
    if old.switch and asked is None and steps > 1:
        return min(max(1, _scaled(old.switch, old.steps, steps)), steps - 1)
    switch = old.switch if asked is None else asked
    same_transformers = (switch is None) == (old.switch is None) and bool(switch) == bool(old.switch)
    if same_transformers and (switch or 0) in range(steps):
        return switch
    raise InputsInvalid(
        f"got switch={asked} and steps={steps} for a plan of {old.steps} steps with switch={old.switch}; wanted steps for each "
        "transformer that the plan speaks of, and for no other"
    )


def _in_steps(cells: Rows, sites: Sequence[Site], samples: int, old: Conditions, new: Conditions) -> Rows:
    """The cells for another number of steps.

    A new step takes a whole old row, so that sites which did the same in a step still do: of the rows in the same stretch of
    the run, the one after which the new cells' FLOPs are nearest to those of the old plan up to there. The first step takes
    the first row. What would read something that no step computed is computed in full instead.
    """
    spent = [0] * old.steps
    for site, column in zip(sites, zip(*cells, strict=True), strict=True):
        for step, (cell, writes) in enumerate(zip(column, lifetimes(column), strict=True)):
            spent[step] += int(site_flops(site, old.tokens, cell, writes, samples).module)
    old_switch, new_switch = old.switch or 0, new.switch or 0
    rows = _rows_taken(spent[:old_switch], new_switch)
    rows += [old_switch + row for row in _rows_taken(spent[old_switch:], new.steps - new_switch)]
    columns = zip(*(cells[row] for row in rows), strict=True)
    return tuple(zip(*(_that_can_run(column, new.switch) for column in columns), strict=True))


def _rows_taken(spent: Sequence[int], steps: int) -> list[int]:
    """The old step whose row each of `steps` new steps takes; `spent` are the old steps' FLOPs.

    All in whole numbers, so that ties are exact.
    """
    old, before, taken = len(spent), [0, *accumulate(spent)], list[int]()
    for new in range(steps):
        first, last = new * old // steps, -(-(new + 1) * old // steps)
        whole, part = divmod((new + 1) * old, steps)  # the stretch ends `part` / `steps` into the old step `whole`
        due = before[whole] * steps + (spent[whole] * part if part else 0)  # the old plan's FLOPs up to there, times `steps`
        missing = due - sum(spent[step] for step in taken) * old
        middle = (2 * new + 1) * old
        distance = {
            step: (abs(spent[step] * old - missing), abs((2 * step + 1) * steps - middle)) for step in range(first, last)
        }
        taken.append(min(distance, key=distance.__getitem__) if new else 0)
    return taken


def _that_can_run(column: Sequence[Cell], switch: int | None) -> tuple[Cell, ...]:
    """The column of a site in which whatever reads something that no earlier step computed is computed in full."""
    heads = head_count(column) or 1
    computed = [Computed()] * heads
    found = list[Cell]()
    for step, cell in enumerate(column):
        if step == switch:
            computed = [Computed()] * heads
        if isinstance(cell, Reuse):
            found.append(FULL if computed[0].fault(cell) else cell)
        else:
            methods = zip(computed, cell.methods(heads), strict=True)
            runnable = (Full() if before.fault(Attend(method)) else method for before, method in methods)
            found.append(Attend(tuple(runnable), cell.share_cfg))
        computed = [before.after(found[-1].of_head(head)) for head, before in enumerate(computed)]
    return tuple(found)


def _relevant(asked: Tokens, old: Tokens, sites: Sequence[Site]) -> Tokens:
    """The tokens asked for, without the text where no site sees it.

    Raises:
        InputsInvalid: there is text where the plan has none, or none where it has some, or it is on the other side.
    """
    after, before = relevant_tokens(asked, sites), relevant_tokens(old, sites)
    if (bool(after.text), after.text_first) != (bool(before.text), before.text_first):
        raise InputsInvalid(f"got {asked} for a plan for {old}, wanted text on the same side; change the visual tokens alone")
    return after


def _with_radii(cell: Cell, site: Site, before: Tokens, after: Tokens) -> Cell:
    """The cell for other tokens of a call: bands reach over the same part of the site's tokens, boxes over that of the grid.

    Radii are rounded to whole tokens, and at least 1 unless they were 0.

    Raises:
        InputsInvalid: a box needs a grid that is not known.
    """
    if not isinstance(cell, Attend):
        return cell

    def scaled(method: Method) -> Method:
        if not isinstance(method, Arrow):
            return method
        return replace(method, radius=_radius(method.radius, site.tokens(before), site.tokens(after)))

    methods = cell.method if isinstance(cell.method, tuple) else (cell.method,)
    return Attend(tuple(map(scaled, methods)), cell.share_cfg)


def _radius(radius: Radius, before: Tokens, after: Tokens) -> Radius:
    """The radius that reaches over the same part of other tokens."""
    if not isinstance(radius, Box):
        return _scaled(radius, before.visual, after.visual)
    old, new = before.grid, after.grid
    if old is None or new is None:
        raise InputsInvalid(f"got {after} for a plan with boxes, wanted a grid; make it by Tokens.of_grid")
    sizes = (old.frames, new.frames), (old.rows, new.rows), (old.columns, new.columns)
    return Box(*(None if reach is None else _scaled(reach, *size) for reach, size in zip(radius.reaches, sizes, strict=True)))


def _scaled(reach: int, before: int, after: int) -> int:
    """`reach` · `after` / `before`, rounded; at least 1 unless `reach` is 0."""
    return max(1, (2 * reach * after + before) // (2 * before)) if reach else 0
