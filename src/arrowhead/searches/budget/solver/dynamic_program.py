"""The dynamic programme: for every column of a plan the cells of least damage plus multiplier × cost, over all steps."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.plans.cells import Attend, Cell, Reuse
from arrowhead.plans.lifetimes import Writes
from arrowhead.searches.budget.sensitivity.table import Floats
from arrowhead.searches.budget.solver.states import START, Choices, SiteOutput, State, Transition

Spending = tuple[Cell, Writes]
"""What a move's cost follows from."""
Moves = NDArray[np.int64]


@dataclass(frozen=True)
class Solution:
    """For each of C columns its cells over S steps, as numbers of moves (S, C), with their damage and cost (C,)."""

    moves: Moves
    damage: Floats
    cost: Floats


class DynamicProgram:
    """All memories that a site can have, and the moves between them; at the step `switch` all is forgotten."""

    def __init__(self, choices: Choices, switch: int | None = None) -> None:
        self.choices, self._switch = choices, switch
        refreshing = tuple(choices.refreshing())
        number: dict[State, int] = {START: 0}
        others: list[tuple[int, Transition]] = []
        pending = [START]
        while pending:
            memory = pending.pop()
            open_moves = tuple(choices.moves(memory))
            for move in (*refreshing, *open_moves):
                if move.after not in number:
                    number[move.after] = len(number)
                    pending.append(move.after)
            others += [(number[memory], move) for move in open_moves]
        others.sort(key=lambda pair: pair[0])  # each memory's lie together
        self.moves = (*refreshing, *(move for _, move in others))
        self.givens: tuple[SiteOutput, ...] = tuple(dict.fromkeys(move.given for move in self.moves))
        self.spendings: tuple[Spending, ...] = tuple(dict.fromkeys((move.cell, move.writes) for move in self.moves))
        given_of = {given: i for i, given in enumerate(self.givens)}
        spending_of = {spending: i for i, spending in enumerate(self.spendings)}
        self._to = np.array([number[move.after] for move in self.moves])
        self._given = np.array([given_of[move.given] for move in self.moves])
        self._spending = np.array([spending_of[move.cell, move.writes] for move in self.moves])
        self._always = len(refreshing)
        self.reuses = np.array([isinstance(move.cell, Reuse) for move in self.moves])
        self.shares = np.array([isinstance(move.cell, Attend) and move.cell.share_cfg for move in self.moves])
        start = np.array([start for start, _ in others], dtype=np.int64)
        self._first = self._always + np.searchsorted(start, np.arange(len(number) + 1))
        self._begun = 0 if 0 in start else 1  # from nothing at all, memory 0, there may be no others

    def solve(self, damage: Floats, cost: Floats, multiplier: float, held: Floats | None = None) -> Solution:
        """Exact for this multiplier: the least Σ damage + multiplier · Σ cost of each column.

        Args:
            damage: (S, givens, C), infinite where something is not open.
            cost: (spendings, C), of one step.
            multiplier: damage that a unit of cost is worth, 0 or more.
            held: (givens, C), the price of what has to be held for a step to give that; no part of the damage.
        """
        real, damage = damage, damage if held is None else damage + held
        steps, _, columns = damage.shape
        price, always = multiplier * cost, self._always
        memories, each = len(self._first) - 1, np.arange(columns)
        ahead = np.zeros((steps + 1, memories, columns))  # the least that the steps to come add
        for step in range(steps - 1, -1, -1):
            total = damage[step, self._given] + price[self._spending] + ahead[step + 1, self._to]  # (moves, C)
            ahead[step] = total[:always].min(0)
            if len(total) > always:
                others = np.minimum.reduceat(total[always:], self._first[self._begun : -1] - always, axis=0)
                np.minimum(ahead[step, self._begun :], others, out=ahead[step, self._begun :])
            if step == self._switch:
                ahead[step] = ahead[step, 0]  # START's
        chosen = np.zeros((steps, columns), dtype=np.int64)
        harmed, spent, memory = np.zeros(columns), np.zeros(columns), np.zeros(columns, dtype=np.int64)
        most = int(np.diff(self._first).max(initial=0))
        for step in range(steps):
            if step == self._switch:
                memory = np.zeros_like(memory)
            others = self._first[memory] + np.arange(most)[:, None]
            others = np.where(others < self._first[memory + 1], others, 0)
            moves = np.concatenate([np.broadcast_to(np.arange(always)[:, None], (always, columns)), others])  # (moves, C)
            total = damage[step, self._given[moves], each] + price[self._spending[moves], each]
            total += ahead[step + 1, self._to[moves], each]
            best = moves[total.argmin(0), each]
            chosen[step], memory = best, self._to[best]
            harmed += real[step, self._given[best], each]
            spent += cost[self._spending[best], each]
        return Solution(chosen, harmed, spent)

    def givens_of(self, moves: Moves) -> tuple[SiteOutput, ...]:
        """What the cells of one column give (S,)."""
        return tuple(self.moves[move].given for move in moves)

    def cells(self, moves: Moves) -> tuple[Cell, ...]:
        """The cells of one column (S,)."""
        return tuple(self.moves[move].cell for move in moves)
