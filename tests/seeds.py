"""Seeds of random tests: the first ones in every run, the others in the slow set."""

from typing import Any

import pytest


def seeds(count: int, quick: int = 1) -> list[Any]:
    """The seeds 0 to count − 1, of which all but the first `quick` are slow."""
    return [*range(quick), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(quick, count))]
