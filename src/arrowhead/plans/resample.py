"""Derives a plan's cells for other noise levels (steps, schedules, strengths), or for other tokens, without a search.

Rows are carried over by noise level, not by number: each new step takes a whole row of cells (all sites of one old step) from
the part of the old schedule that the new step denoises. Bands keep the part of the tokens that they reach over. What could then
not run is computed in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from math import floor

from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import FULL, Arrow, Attend, Box, Cell, Full, Method, Radius, Reuse
from arrowhead.plans.flops import site_flops
from arrowhead.plans.layout import Site, Tokens, counted_once, relevant_tokens, stack_around
from arrowhead.plans.lifetimes import Computed, head_count, lifetimes_of_all

Rows = tuple[tuple[Cell, ...], ...]
"""Steps × sites."""
Span = tuple[Fraction, Fraction]
"""Where a step begins and where it ends, on an axis along which the noise decreases."""


@dataclass(frozen=True)
class Conditions:
    """What cells are made for.

    `levels` are the noise levels of the steps, see `Plan.levels`; None where they are not known, which stands for steps of one
    length. From the step `switch` on another transformer is called; None where there is one transformer.
    """

    steps: int
    tokens: Tokens
    switch: int | None
    levels: tuple[float, ...] | None = None

    @property
    def of_transformers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The first step, and the one after the last, of the first transformer and of the second."""
        switch = self.steps if self.switch is None else self.switch
        return (0, switch), (switch, self.steps)

    def changes(self, other: "Conditions") -> dict[str, str]:
        """The fields that differ in `other`, each as "new, was old", for people to read."""
        pairs = ((name, getattr(self, name), old) for name, old in vars(other).items())
        found = {name: f"{new}, was {old}" for name, old, new in pairs if new != old and name != "levels"}
        if self.levels != other.levels and "steps" not in found:
            found["levels"] = f"{_range(other.levels)}, was {_range(self.levels)}"
        return found


TOLERANCE = 1e-4
"""Noise levels that differ by less are the same: devices and dtypes round them differently."""


def same_levels(levels: Sequence[float] | None, others: Sequence[float] | None) -> bool:
    """Whether noise levels are the same, or one of them is not known."""
    if levels is None or others is None:
        return True
    pairs = zip(levels, others, strict=False)
    return len(levels) == len(others) and all(abs(level - other) < TOLERANCE for level, other in pairs)


def _range(levels: tuple[float, ...] | None) -> str:
    return "not known" if levels is None else f"{levels[0]:.4g} to {levels[-1]:.4g}"


def resampled(cells: Rows, sites: Sequence[Site], samples: int, old: Conditions, new: Conditions) -> tuple[Rows, Conditions]:
    """Returns cells for other conditions, with the conditions that they are for: their tokens are those that the sites see.

    Raises:
        InputsInvalid: a transformer is called that the cells do not speak of, text stands on the other side, or boxes meet an
            unknown grid.
    """
    cells = _in_steps(cells, sites, samples, old, new)
    if new.tokens != old.tokens:
        new = replace(new, tokens=_relevant(new.tokens, old.tokens, sites))
        cells = tuple(
            tuple(_with_radii(cell, site, old.tokens, new.tokens) for cell, site in zip(row, sites, strict=True))
            for row in cells
        )
    return cells, new


def scaled_switch(old: Conditions, steps: int) -> int | None:
    """The step of a new number of steps in which the second transformer takes over: each keeps its part of the steps."""
    if not old.switch or steps < 2:
        return old.switch
    return min(max(1, _scaled(old.switch, old.steps, steps)), steps - 1)


def require_switch(new: Conditions, old: Conditions) -> None:
    """Check that each transformer that the old cells speak of has steps, and no other one.

    Raises:
        InputsInvalid: one has none, or there is another one.
    """
    same_transformers = (new.switch is None) == (old.switch is None) and bool(new.switch) == bool(old.switch)
    if not same_transformers or (new.switch or 0) not in range(new.steps):
        raise InputsInvalid(
            f"got switch={new.switch} and steps={new.steps} for a plan of {old.steps} steps with switch={old.switch}; wanted "
            "steps for each transformer that the plan speaks of, and for no other"
        )


def _in_steps(cells: Rows, sites: Sequence[Site], samples: int, old: Conditions, new: Conditions) -> Rows:
    """The cells for other noise levels; what would read something that no step computed is computed in full instead."""
    spent = [0] * old.steps
    columns = zip(*cells, strict=True)
    for site, column, stored in zip(counted_once(sites), columns, lifetimes_of_all(cells, sites), strict=True):
        for step, (cell, writes) in enumerate(zip(column, stored, strict=True)):
            spent[step] += int(site_flops(site, old.tokens, cell, writes, samples).module)
    skips = [all(isinstance(cell, Reuse) for cell in row) for row in cells]
    before, after = _spans(old, new)
    rows = list[int]()
    for (begin, end), (new_begin, new_end) in zip(old.of_transformers, new.of_transformers, strict=True):
        if begin == end < new_end > new_begin:
            raise InputsInvalid(
                f"got switch={new.switch} in {new.steps} steps, with switch={old.switch} in the plan's {old.steps}; wanted the "
                "plan's transformers, and no other one; search again"
            )
        there = after[new_begin:new_end]
        if any(skips[begin:end]):
            taken = rows_in_turn(skips[begin:end], before[begin:end], there)
        else:
            taken = rows_taken(spent[begin:end], before[begin:end], there)
        rows += [begin + row for row in taken]
    found = that_can_run([cells[row] for row in rows], sites, new.switch)
    slopes = [_slope_scales(column, before, old.switch) for column in zip(*cells, strict=True)]
    rescaled = [
        _rescaled(column, [scales[row] for row in rows], _slope_scales(column, after, new.switch))
        for column, scales in zip(zip(*found, strict=True), slopes, strict=True)
    ]
    return tuple(zip(*rescaled, strict=True))


def _slope_scales(column: Sequence[Cell], begins: Sequence[Span], switch: int | None) -> list[Fraction]:
    """For each step, how the noise since the last computed step, by that between the last two, compares with the same in steps.

    1 where fewer than two steps of the same transformer computed an output before.
    """
    found, computed = list[Fraction](), list[int]()
    for step, cell in enumerate(column):
        if step == switch:
            computed = []
        later, earlier = (computed[-1], computed[-2]) if len(computed) > 1 else (0, 0)
        gap = begins[later][0] - begins[earlier][0]
        since = begins[step][0] - begins[later][0]
        found.append(since / gap / Fraction(step - later, later - earlier) if gap and since else Fraction(1))
        if not isinstance(cell, Reuse):
            computed.append(step)
    return found


def _rescaled(column: Sequence[Cell], old: Sequence[Fraction], new: Sequence[Fraction]) -> tuple[Cell, ...]:
    """The column with slopes that reach as far along the noise as those that they were taken from."""
    return tuple(
        cell.sloped(float(after / before)) if isinstance(cell, Reuse) and before and after != before else cell
        for cell, before, after in zip(column, old, new, strict=True)
    )


def that_can_run(rows: Sequence[Sequence[Cell]], sites: Sequence[Site], switch: int | None) -> Rows:
    """The rows in which whatever reads something that no earlier step of the same transformer computed is computed in full."""
    columns = [_column_that_can_run(column, switch) for column in zip(*rows, strict=True)]
    for site, stack in stack_around(sites).items():  # it runs where the stack does
        place, around = sites.index(site), columns[sites.index(stack)]
        columns[place] = tuple(
            FULL if isinstance(cell, Reuse) and isinstance(outer, Attend) else cell
            for cell, outer in zip(columns[place], around, strict=True)
        )
    return tuple(zip(*columns, strict=True))


def _spans(old: Conditions, new: Conditions) -> tuple[list[Span], list[Span]]:
    """The spans of the old and of the new steps on one axis: noise levels where both are known, else parts of the run."""
    if old.levels is not None and new.levels is not None:
        return spans(old.levels), spans(new.levels)
    return _even_spans(old), _even_spans(new)


def _even_spans(conditions: Conditions) -> list[Span]:
    """Steps of one length: those of the first transformer from 0 to 1, those of the second from 1 to 2."""
    counts = (end - begin for begin, end in conditions.of_transformers)
    return [(n + Fraction(i, count), n + Fraction(i + 1, count)) for n, count in enumerate(counts) for i in range(count)]


def spans(levels: Sequence[float]) -> list[Span]:
    """The span of each step on the axis of minus the noise level: to the next step's level, or to 0 from the last one's.

    Steps at one level, such as the two calls of Heun's method, share what lies before the next level equally. A last step at
    level 0 is taken to be as long as the one before.

    >>> [tuple(map(float, span)) for span in spans([1.0, 0.5, 0.5])]
    [(-1.0, -0.5), (-0.5, -0.25), (-0.25, 0.0)]
    """
    found, runs = list[Span](), [(Fraction(level), len([*run])) for level, run in groupby(levels)]
    last = Fraction(0)
    if not runs[-1][0]:  # a step at no noise is as long as the one before
        last = -runs[-2][0] if len(runs) > 1 else Fraction(-1)
    for (level, count), (end, _) in zip(runs, [*runs[1:], (last, 0)], strict=True):
        step = (level - end) / count
        found += [(i * step - level, (i + 1) * step - level) for i in range(count)]
    return found


def rows_taken(spent: Sequence[int], before: Sequence[Span], after: Sequence[Span]) -> list[int]:
    """The old step whose row each new step takes. `spent` are the old steps' FLOPs, `before` and `after` the steps' spans.

    Of the rows whose steps share a part of the new step's span, or else are nearest to it: the one after which the new rows'
    FLOPs are nearest to those of the old ones up to there. The first step takes the earliest of them. All in whole numbers and
    fractions, so that ties are exact.
    """
    middles = [begin + end for begin, end in before]
    due, taken = Fraction(0), list[int]()
    for begin, end in after:
        shared = {old: part for old, span in enumerate(before) if (part := min(end, span[1]) - max(begin, span[0])) > 0}
        if not shared:
            nearest = min(range(len(before)), key=lambda old: abs(middles[old] - begin - end))
            shared = {nearest: Fraction(1)}
        whole = sum(shared.values(), Fraction(0))
        due += sum((part * spent[old] for old, part in shared.items()), Fraction(0)) / whole
        missing = due - sum(spent[old] for old in taken)
        distance = {old: (abs(spent[old] - missing), abs(middles[old] - begin - end)) for old in shared}
        taken.append(min(distance, key=distance.__getitem__) if taken else min(shared))
    return taken


def rows_in_turn(skips: Sequence[bool], before: Sequence[Span], after: Sequence[Span]) -> list[int]:
    """The old step whose row each new step takes, where some rows compute nothing (`skips`).

    Along the noise, the old run has computed so many steps; between two of them the count grows evenly. The new run computes a
    step whenever this count, times the new steps by the old ones over the same noise, has grown by one. So its computed steps
    lie where the old ones do. Each takes the row of the same kind whose step is nearest. Of noise that the old run did not have
    it says nothing: steps there are computed.
    """
    starts = [begin for (begin, _), skip in zip(before, skips, strict=True) if not skip]
    computed = [*zip(starts, [*starts[1:], before[-1][1]], strict=True)]
    known = [min(end, before[-1][1]) > max(begin, before[0][0]) for begin, end in after]
    inside = [span for span, within in zip(after, known, strict=True) if within]
    covered = _passed(before, inside[-1][1]) - _passed(before, inside[0][0]) if inside else Fraction(1)
    density = len(inside) / covered
    taken, due = list[int](), None
    for (begin, end), within in zip(after, known, strict=True):
        now = density * _passed(computed, begin)
        computes = not within or due is None or now >= due
        if computes and within:
            due = floor(now) + 1
        kind = [old for old, skip in enumerate(skips) if skip is not computes]
        shared = [old for old in kind if min(end, before[old][1]) > max(begin, before[old][0])]
        nearest = min(kind, key=lambda old: abs(sum(before[old]) - begin - end))
        taken.append(shared[0] if shared and not taken else nearest)
    return taken


def _passed(stretches: Sequence[Span], at: Fraction) -> Fraction:
    """How many stretches lie before `at`, with the part of the one that it is in."""
    parts = (Fraction(at >= end) if at >= end or at <= begin else (at - begin) / (end - begin) for begin, end in stretches)
    return sum(parts, Fraction(0))


def _column_that_can_run(column: Sequence[Cell], switch: int | None) -> tuple[Cell, ...]:
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
        InputsInvalid: the text is on the other side.
    """
    after, before = relevant_tokens(asked, sites), relevant_tokens(old, sites)
    if after.text and before.text and after.text_first != before.text_first:
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
