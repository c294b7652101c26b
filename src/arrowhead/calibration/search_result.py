"""What a search hands over: cells, and what they are for."""

from dataclasses import dataclass

from arrowhead.plans.cells import Cell
from arrowhead.plans.layout import Branches, Tokens
from arrowhead.plans.target import Target


@dataclass(frozen=True)
class SearchResult:
    """The cells that a search chose (steps × sites), and what they are for.

    `passes` are the transformer's runs that the search took. `cost` are the attention FLOPs that it took, in uncompressed
    generations of its inputs.
    """

    cells: tuple[tuple[Cell, ...], ...]
    target: Target
    tokens: Tokens
    branches: Branches
    passes: int
    cost: float
    switch: int | None
