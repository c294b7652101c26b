"""The choice among heads' methods: against trying every combination."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from independent import few

from arrowhead.searches.multiple_choice import solve_multiple_choice

SOME_ERRORS = st.sampled_from([0.0, 0.1, 0.1, 0.25, math.inf, math.nan]) | st.floats(0, 1)


@st.composite
def problems(draw):
    """Errors of heads × options, what the options save, and a bound."""
    heads, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    errors = draw(st.lists(st.lists(SOME_ERRORS, min_size=options, max_size=options), min_size=heads, max_size=heads))
    savings = draw(st.lists(st.integers(0, 10**15) | st.integers(0, 3), min_size=options, max_size=options))
    return errors, savings, draw(st.floats(0, 3))


def total(errors, options):
    return sum(of_head[option] for of_head, option in zip(errors, options, strict=True))


@few
@given(problem=problems())
def test_is_the_best_of_all_combinations(problem):
    errors, savings, bound = problem
    within = [c for c in product(range(len(savings)), repeat=len(errors)) if total(errors, c) <= bound]
    found = solve_multiple_choice(errors, savings, bound)
    if not within:
        assert found is None
        return
    options, saved = found
    assert total(errors, options) <= bound
    assert saved == sum(savings[option] for option in options) == max(sum(savings[o] for o in c) for c in within)
    least = min(total(errors, c) for c in within if sum(savings[o] for o in c) == saved)
    assert total(errors, options) == pytest.approx(least, abs=1e-12)


def test_greedy_by_gain_would_lose():
    """Taking the best ratio first leaves no room for the two that together save more."""
    errors, savings = [[0, 0.6, 0.5], [0, 0.6, 0.5]], [0, 70, 50]
    assert solve_multiple_choice(errors, savings, 1.0) == ((2, 2), 100)
