"""The choice among methods for the heads of one site: the most saved with a bounded sum of errors, solved exactly."""

from collections.abc import Sequence

import numpy as np


def solve_multiple_choice(
    errors: Sequence[Sequence[float]], savings: Sequence[int], bound: float
) -> tuple[tuple[int, ...], int] | None:
    """One option for each of H heads: the greatest sum of savings whose sum of errors is at most `bound`.

    `errors[h][m]` is head h's with option m, infinite or NaN where the option is not open; `savings[m]` is alike for all
    heads. Gives the option of each head, and the sum of savings; among equal savings the one of least error. None when no
    choice stays within the bound.

    Exact: heads are added one by one, and of all partial choices those stay that no other one beats in both sums (the Pareto
    front). Savings are whole numbers, so that equal sums meet; with few distinct savings the front stays short.
    """
    saved, spent = np.zeros(1, dtype=np.int64), np.zeros(1)  # the front: rising errors, rising savings
    trail: list[
        tuple[np.ndarray, np.ndarray]
    ] = []  # for each head: where on the last front a point comes from, by which option
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
