"""The dynamic program: for every column of a plan the cells of least error plus multiplier × cost, over all steps."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrowhead.plans.cells import Attend, Cell, Reuse
from arrowhead.plans.lifetimes import Writes
from arrowhead.searches.budget.sensitivity.site_outputs import SiteOutput
from arrowhead.searches.budget.sensitivity.table import Floats
from arrowhead.searches.budget.solver.states import START, Choices, State, Transition

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Solution:
    """For each of C columns its transitions over S steps, as their numbers (S, C), with the column's error and cost (C,)."""

    transitions: Numbers
    error: Floats
    cost: Floats


class DynamicProgram:
    """All states that a site can be in, and the transitions between them.

    At the step `switch` a second transformer takes over: every column is in the state START again.

    `transitions` are numbered, those first that are open in every state. `outputs` are the distinct site outputs that they
    give, and `writings` the distinct pairs of a cell and what it writes, which a transition's cost follows from.
    """

    def __init__(self, choices: Choices, switch: int | None = None) -> None:
        self._switch = switch
        common = tuple(choices.from_any_state())
        own: dict[State, tuple[Transition, ...]] = {}  # START is the first state
        pending = [*(transition.after for transition in common), START]
        while pending:
            state = pending.pop()
            if state not in own:
                own[state] = tuple(choices.from_state(state)) or common[:1]  # never empty: a second copy is never chosen
                pending += [transition.after for transition in own[state]]
        self.transitions = (*common, *(transition for of_state in own.values() for transition in of_state))
        self.outputs: tuple[SiteOutput, ...] = tuple(dict.fromkeys(t.output for t in self.transitions))
        self.writings: tuple[tuple[Cell, Writes], ...] = tuple(dict.fromkeys((t.cell, t.writes) for t in self.transitions))
        states = {state: i for i, state in enumerate(own)}
        outputs = {output: i for i, output in enumerate(self.outputs)}
        writings = {writing: i for i, writing in enumerate(self.writings)}
        self.output_of = np.array([outputs[t.output] for t in self.transitions])
        self._writing_of = np.array([writings[t.cell, t.writes] for t in self.transitions])
        self._after = np.array([states[t.after] for t in self.transitions])
        self.reuses = np.array([isinstance(t.cell, Reuse) for t in self.transitions])
        self.shares = np.array([isinstance(t.cell, Attend) and t.cell.share_cfg for t in self.transitions])
        counts = np.array([len(of_state) for of_state in own.values()])
        self._common = len(common)
        self._first = self._common + np.cumsum(counts) - counts  # of each state's own transitions
        self._open = _padded(self._common, self._first, counts)

    def solve(self, error: Floats, cost: Floats, multiplier: float, held: Floats | None = None) -> Solution:
        """The least Σ error + multiplier · Σ cost of each column, exact for this multiplier.

        Args:
            error: (S, outputs, C), infinite where an output is not open.
            cost: (writings, C), of one step.
            multiplier: the error that a unit of cost is worth, 0 or more.
            held: (outputs, C), a price for what the caches have to hold for a step to give the output. It is minimised, too,
                but is no part of the error that the solution states.
        """
        priced, price = error if held is None else error + held, multiplier * cost
        to_come = self._least_to_come(priced, price)
        steps, _, columns = error.shape
        each, state = np.arange(columns), np.zeros(columns, dtype=np.int64)
        chosen, errors, spent = np.zeros((steps, columns), dtype=np.int64), np.zeros(columns), np.zeros(columns)
        for step in range(steps):
            if step == self._switch:
                state = np.zeros_like(state)
            options = self._open[state].T  # (options, C)
            total = priced[step, self.output_of[options], each] + price[self._writing_of[options], each]
            total += to_come[step + 1, self._after[options], each]
            best = options[total.argmin(0), each]
            chosen[step], state = best, self._after[best]
            errors += error[step, self.output_of[best], each]
            spent += cost[self._writing_of[best], each]
        return Solution(chosen, errors, spent)

    def _least_to_come(self, error: Floats, price: Floats) -> Floats:
        """The least that a step and those after it add, from each state: (S + 1, states, C), 0 after the last step."""
        steps, _, columns = error.shape
        found = np.zeros((steps + 1, len(self._first), columns))
        for step in range(steps - 1, -1, -1):
            total = error[step, self.output_of] + price[self._writing_of] + found[step + 1, self._after]  # (transitions, C)
            common, own = total[: self._common], total[self._common :]
            found[step] = np.minimum(common.min(0), np.minimum.reduceat(own, self._first - self._common, axis=0))
            if step == self._switch:
                found[step] = found[step, 0]  # START's
        return found

    def outputs_of(self, numbers: Numbers) -> tuple[SiteOutput, ...]:
        """What a column of transitions (S,) gives in each step."""
        return tuple(self.transitions[number].output for number in numbers)

    def cells(self, numbers: Numbers) -> tuple[Cell, ...]:
        """The cells of a column of transitions (S,)."""
        return tuple(self.transitions[number].cell for number in numbers)


def _padded(common: int, first: Numbers, counts: Numbers) -> Numbers:
    """The numbers of the transitions that are open in each state: (states, most), padded with 0, which is open in all."""
    places = np.arange(counts.max())
    own = np.where(places < counts[:, None], first[:, None] + places, 0)
    return np.concatenate([np.broadcast_to(np.arange(common), (len(counts), common)), own], 1)
