"""Chooses the steps in which the stack is computed, and the coefficients by which it is extrapolated in the others.

A run of skipped steps reads the outputs of the last two steps that were computed, i < j. Its error is the norm of the *sum* of
its steps' changes of the final latents, because a run errs in the same direction from step to step. Errors of different runs
are taken as independent: their squares add up. So the best steps for each number of computed steps are a shortest path over the
pairs (i, j), found exactly by a dynamic program.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowhead.plans.cells import AST, FULL, Cell, Reuse
from arrowhead.searches.stack.profile import Profile

SLOPE, SCALE = 0.75, 1.0
"""The coefficients that a fit is drawn to: most of the slope, because outputs hold noise, and the output as it is."""
DRAWN = {"slope": 0.05, "scale": 1e-3}
"""How strongly, in parts of what the generation itself says."""
Pair = tuple[int | None, int]
"""The last two computed steps, i < j; None where one was computed."""


@dataclass(frozen=True)
class Schedule:
    """The cells of the stack, one for each step, and the predicted square of the norm of the final latents' change."""

    cells: tuple[Cell, ...]
    error: float

    @property
    def computed(self) -> int:
        """The number of steps that are computed."""
        return sum(cell == FULL for cell in self.cells)


@dataclass(frozen=True)
class _Runs:
    """The runs of skipped steps after a pair: `errors[n]` is that of n steps, `cells[n]` what the n-th does."""

    errors: tuple[float, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class _Path:
    """Computed steps up to a pair, as a chain: the error of the runs before it, and the path before its last step."""

    error: float
    pair: Pair
    before: "_Path | None"


def schedules(profile: Profile, feedback: float = 1.0) -> dict[int, Schedule]:
    """The best schedule for each number of computed steps that has one.

    `feedback` is the power of the model feedback in the gains, from 0 to 1.
    """
    gains = torch.tensor(profile.sampler_gains) * torch.tensor(profile.model_feedback) ** feedback
    changes = profile.changes * gains[:, None, None, None]
    switch = profile.switch
    spans = [(0, profile.steps)] if switch is None else [(0, switch), (switch, profile.steps)]
    found = {0: Schedule((), 0.0)}
    for begin, end in spans:
        of_span = _of_span(changes[begin:end], profile.products[begin:end])
        joined: dict[int, Schedule] = {}
        for before in found.values():
            for after in of_span.values():
                both = Schedule(before.cells + after.cells, before.error + after.error)
                count = both.computed
                if count not in joined or both.error < joined[count].error:
                    joined[count] = both
        found = joined
    return found


def _of_span(changes: Tensor, products: Tensor) -> dict[int, Schedule]:
    """The best schedules for the steps of one transformer, from the changes (S, ages + 1, branches, M) of the final latents."""
    steps, ages = changes.shape[0], changes.shape[1] - 1
    runs: dict[Pair, _Runs] = {}
    paths: dict[Pair, dict[int, _Path]] = {(None, 0): {1: _Path(0.0, (None, 0), None)}}
    for j in range(steps):
        for i in [None] if j == 0 else range(max(0, j - ages - 1), j):
            runs[i, j] = _runs(changes, products, i, j)
            for length, error in enumerate(runs[i, j].errors[: steps - 1 - j]):
                later = paths.setdefault((j, j + 1 + length), {})
                for count, path in paths.get((i, j), {}).items():
                    if count + 1 not in later or path.error + error < later[count + 1].error:
                        later[count + 1] = _Path(path.error + error, (j, j + 1 + length), path)
    best: dict[int, _Path] = {}
    for pair, by_count in paths.items():
        left = steps - 1 - pair[1]
        for count, path in by_count.items():
            if left < len(runs[pair].errors):
                whole = _Path(path.error + runs[pair].errors[left], pair, path.before)
                if count not in best or whole.error < best[count].error:
                    best[count] = whole
    return {count: Schedule(_cells(path, runs, steps), path.error) for count, path in best.items()}


def _cells(path: _Path, runs: dict[Pair, _Runs], steps: int) -> tuple[Cell, ...]:
    """The cells of a whole path."""
    pairs, place = list[Pair](), path
    while True:
        pairs.append(place.pair)
        if place.before is None:
            break
        place = place.before
    pairs.reverse()
    cells = list[Cell]()
    for pair, end in zip(pairs, [*(j for _, j in pairs[1:]), steps], strict=True):
        cells += [FULL, *runs[pair].cells[: end - pair[1] - 1]]
    return tuple(cells)


def _runs(changes: Tensor, products: Tensor, i: int | None, j: int) -> _Runs:
    """The runs after the steps i and j: as long as all that they read is no older than the profile's ages."""
    steps, ages = changes.shape[0], changes.shape[1] - 1
    last = min(steps, (j if i is None else i) + ages + 1)
    reading = list(range(j + 1, last))  # T steps
    if not reading:
        return _Runs((0.0,), ())
    ages_j = torch.tensor([step - j for step in reading])
    now, later = changes[reading, 0], changes[reading, ages_j]  # (T, branches, M)
    if i is None:
        errors, cells = later.sum(1), [AST] * len(reading)
    else:
        ahead = ages_j[:, None, None] / (j - i) * (later - changes[reading, ages_j + (j - i)])
        scale, slope = _fitted(products[reading], ages_j, j - i)  # (T, branches)
        errors = (scale[:, :, None] * (later + now) + slope[:, :, None] * ahead - now).sum(1)
        cells = [Reuse(_pair(b), _pair(a)) for a, b in zip(scale.tolist(), slope.tolist(), strict=True)]
    summed = errors.cumsum(0).square().sum(1)  # (T,): a run's changes are added before they are squared
    return _Runs((0.0, *summed.tolist()), tuple(cells))


def _fitted(products: Tensor, ages: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """The scale and the slope for each step and branch, (T, branches): least squares of the extrapolated outputs to the real.

    `products` are those of T steps, `ages` those of the later output that they read, and `gap` lies between it and the earlier
    one. The fit is drawn to `SCALE` and `SLOPE` by parts of the squares themselves.
    """
    steps, ahead = torch.arange(len(ages)), (ages / gap)[:, None].double()  # a change is taken so many times

    def product(a: Tensor, b: Tensor | int) -> Tensor:
        return products.double()[steps, :, a, b]  # (T, branches)

    later, before = ages, ages + gap
    whole = product(later, later)
    across = ahead * (whole - product(later, before))
    square = ahead**2 * (whole - 2 * product(later, before) + product(before, before))
    wanted = product(later, 0), ahead * (product(later, 0) - product(before, 0))
    drawn = DRAWN["scale"] * whole + 1e-30, DRAWN["slope"] * square.clamp_min(0) + 1e-30
    gram = torch.stack([whole + drawn[0], across, across, square + drawn[1]], -1)
    gram = gram.view(*whole.shape, 2, 2)  # (T, branches, 2, 2)
    right = torch.stack([wanted[0] + drawn[0] * SCALE, wanted[1] + drawn[1] * SLOPE], -1)
    scale, slope = torch.linalg.solve(gram, right).float().unbind(-1)
    return scale.clamp(0.5, 1.5), slope.clamp(-1, 2)


def _pair(values: Sequence[float]) -> tuple[float, float]:
    """Coefficients for both branches, to four decimals; without guidance there is one."""
    rounded = [round(value, 4) for value in values]
    return rounded[0], rounded[-1]
