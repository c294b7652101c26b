"""The multiple-choice knapsack of one site: an option for each head, with the greatest savings within a bound of errors."""

from collections.abc import Sequence

import numpy as np


def solve_multiple_choice(
    errors: Sequence[Sequence[float]], savings: Sequence[int], bound: float
) -> tuple[tuple[int, ...], int] | None:
    """Choose one option for each of H heads, with the greatest sum of savings among sums of errors of at most `bound`.

    `errors[h][m]` is the error of head h with option m, infinite or NaN where the option is not allowed; `savings[m]` is the
    same for all heads. Gives the option of each head, and the sum of savings; among equal savings the options with the least
    error. None if no choice stays within the bound.

    The solution is exact. Heads are added one by one, and of all partial choices those are kept that no other one beats in both
    sums (the Pareto front). Savings are whole numbers, so that equal sums are recognised; with few distinct savings the front
    stays short.
    """
    saved, spent = np.zeros(1, dtype=np.int64), np.zeros(1)  # the front: both sums rise along it
    # of each head: the points of the front before it that those of its front come from, and the options that they take
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    gain = np.asarray(savings, dtype=np.int64)
    for of_options in errors:
        total = spent[:, None] + np.asarray(of_options, dtype=np.float64)  # (front, options)
        sums = saved[:, None] + gain
        origin, option = np.nonzero(total <= bound)  # NaN is never within
        if not len(origin):
            return None
        total, sums = total[origin, option], sums[origin, option]
        order = np.lexsort((-sums, total))  # by error, and by savings where errors are equal
        best = np.maximum.accumulate(sums[order])
        front = order[np.concatenate([[True], best[1:] > best[:-1]])]
        saved, spent = sums[front], total[front]
        trail.append((origin[front], option[front]))
    point, options = len(saved) - 1, []
    for origin, option in reversed(trail):
        options.append(int(option[point]))
        point = origin[point]
    return tuple(reversed(options)), int(saved[-1])
