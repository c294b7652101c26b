"""A profile at other noise levels than the watched ones, by interpolation between the steps that were watched.

What the stack gives changes smoothly with the noise level. So an output between two watched steps is taken to lie on the line
between theirs, and likewise the derivatives of the model's last layers. A step that is longer counts for more.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def positions_of(levels: Sequence[float], watched: Sequence[float]) -> list[float]:
    """Where noise levels lie among the watched ones, which decrease: 0 is the first step, and so on.

    >>> positions_of([1.0, 0.75, 0.5], [1.0, 0.5])
    [0.0, 0.5, 1.0]
    """
    axis = np.arange(len(watched) + 1.0)
    return np.interp([-level for level in levels], [-level for level in (*watched, 0.0)], axis).tolist()


def ages_at(positions: Sequence[float], ages: int) -> int:
    """How many steps old what is read may be, where no more than `ages` watched steps may lie between."""

    def within(last: int) -> int:
        return sum(positions[last] - position <= ages - 1 for position in positions[:last])

    limited = [within(t) for t in range(1, len(positions)) if within(t) < t]
    return max(1, min(limited, default=len(positions) - 1))


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
