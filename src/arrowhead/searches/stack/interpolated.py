"""A profile at other noise levels than the watched ones, by interpolation between the steps that were watched.

What the stack gives changes smoothly with the noise level. So an output between two watched steps is taken to lie on the line
between theirs, and likewise the derivatives of the model's last layers. A step that is longer counts for more.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arrowhead.plans.resample import part_of_steps


def positions_of(levels: Sequence[float], watched: Sequence[float]) -> list[float]:
    """Where noise levels lie among the watched ones, which decrease: 0 is the first step, and so on.

    >>> positions_of([1.0, 0.75, 0.5], [1.0, 0.5])
    [0.0, 0.5, 1.0]
    """
    ends = watched if len(watched) > 1 and watched[-1] == 0 else (*watched, 0.0)  # the last step may be at 0 already
    return np.interp([-level for level in levels], [-level for level in ends], np.arange(float(len(ends)))).tolist()


def parts_of(
    steps: int | None, levels: Sequence[float] | None, watched: Sequence[float] | None, count: int, switch: int | None
) -> list[list[float]]:
    """The new steps' places among the `count` watched ones, for each transformer, as they lie along the noise.

    Each transformer keeps its part of the steps. By noise level, a step is the second one's if it is nearer to that one's first
    step than to the last one of the first transformer. See `within_own` for what such a step is read from.
    """
    ends = [(0, count)] if switch is None else [(0, switch), (switch, count)]
    if levels is None:
        assert steps is not None
        first = steps if switch is None else part_of_steps(switch, count, steps)
        news = [steps] if switch is None else [first, steps - first]
        return [[begin + i * (end - begin) / new for i in range(new)] for (begin, end), new in zip(ends, news, strict=True)]
    places = positions_of(levels, watched or ())
    if switch is None:
        return [places]
    earlier = sum(place < switch - 0.5 for place in places)
    return [places[:earlier], places[earlier:]]


def within_own(parts: Sequence[Sequence[float]], switch: int | None) -> list[list[float]]:
    """The places, where none is between the last step of the first transformer and the first of the second."""
    if switch is None:
        return [*map(list, parts)]
    earlier, later = parts
    return [[min(place, switch - 1.0) for place in earlier], [max(place, float(switch)) for place in later]]


def ages_at(parts: Sequence[Sequence[float]], ages: int) -> int:
    """How many steps old what is read may be, where no more than `ages` watched steps may lie between.

    `parts` has the places of each transformer's steps.
    """
    within = [(t, sum(part[t] - place <= ages - 1 for place in part[:t])) for part in parts for t in range(1, len(part))]
    limited = [number for t, number in within if number < t]
    return max(1, min(limited, default=max(map(len, parts)) - 1))


def changes_at(changes: Tensor, positions: Sequence[float], ages: int) -> Tensor:
    """The changes (S', ages + 1, branches, M) at these positions, from those of the watched steps (S, A + 1, branches, M)."""
    out = torch.zeros(len(positions), ages + 1, *changes.shape[2:])
    for t, position in enumerate(positions):
        out[t, 0] = sum(weight * changes[a, 0] for a, weight in _between(position, len(changes)))
        for age in range(1, min(ages, t) + 1):
            for a, weight in _between(position, len(changes)):
                for b, other in _between(positions[t - age], len(changes)):
                    out[t, age] += weight * other * _change(changes, a, b)
    return out


def products_at(products: Tensor, positions: Sequence[float], ages: int) -> Tensor:
    """The products (S', branches, ages + 1, ages + 1) at these positions, from those of the watched steps."""
    out = torch.zeros(len(positions), products.shape[1], ages + 1, ages + 1)
    for t in range(len(positions)):
        for first in range(min(ages, t) + 1):
            for second in range(first, min(ages, t) + 1):
                for a, weight in _between(positions[t - first], len(products)):
                    for b, other in _between(positions[t - second], len(products)):
                        out[t, :, first, second] += weight * other * _product(products, a, b)
                out[t, :, second, first] = out[t, :, first, second]
    return out


def _between(position: float, steps: int) -> list[tuple[int, float]]:
    """The watched steps around a position, each with its weight."""
    below = min(int(position), steps - 1)
    part = position - below if below < steps - 1 else 0.0
    return [(below, 1 - part), (below + 1, part)] if part else [(below, 1.0)]


def _change(changes: Tensor, a: int, b: int) -> Tensor:
    """J_a·(O_b − O_a); where b is later, J_b stands for J_a."""
    if b > a:
        return -_change(changes, b, a)
    return torch.zeros_like(changes[0, 0]) if a == b else changes[a, min(a - b, changes.shape[1] - 1)]


def _product(products: Tensor, a: int, b: int) -> Tensor:
    """⟨O_a, O_b⟩."""
    later, most = max(a, b), products.shape[-1] - 1
    return products[later, :, min(later - a, most), min(later - b, most)]
