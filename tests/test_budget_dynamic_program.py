"""The dynamic program against trying every column, with what each gives and writes kept account of here."""

import math

import numpy as np
import pytest
from budget import SLOPES, Past, continued, described, every_column
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowhead.plans.cells import AST, Attend, Reuse
from arrowhead.searches.budget.sensitivity.site_outputs import ComputedOutput, ExtrapolatedOutput
from arrowhead.searches.budget.solver.dynamic_program import DynamicProgram
from arrowhead.searches.budget.solver.states import START, Choices


@st.composite
def problems(draw):
    """Choices, steps, errors (some infinite) and costs of two columns, prices of what is held, if any, and a multiplier."""
    share_cfg, residual, reuse = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    radii = draw(st.sampled_from([(), (3,), (8, 3)]))
    precisions = draw(st.sampled_from([(), ("int8",)]))
    choices = Choices(
        radii, draw(st.integers(0, 3)), share_cfg, residual, reuse, draw(st.sampled_from([(), SLOPES])), precisions
    )
    steps = draw(st.integers(2, 3 if precisions else 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    program = DynamicProgram(choices)
    shape = (steps, len(program.outputs), 2)
    error = rng.random(shape) * rng.choice([0.0, 0.3, 1.0], shape)
    closed = rng.random(shape) < draw(st.sampled_from([0.0, 0.2]))
    error[closed] = math.inf
    plain = [g for g, of in enumerate(program.outputs) if of == ComputedOutput()]
    error[:, plain] = rng.random((steps, 1, 2))  # full attention is open
    cost = rng.random((len(program.writings), 2))
    held = rng.random(shape[1:]) if draw(st.booleans()) else None
    return choices, steps, program, error, cost, held, draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))


def values(columns, program, error, cost, place):
    """Error and cost of every column."""
    number_of_output = {given: g for g, given in enumerate(program.outputs)}
    number_of_writing = {spending: s for s, spending in enumerate(program.writings)}
    outputs = np.array([[number_of_output[given] for given in column.gave] for column in columns])
    writings = np.array([[number_of_writing[spent] for spent in column.spent] for column in columns])
    steps = np.arange(outputs.shape[1])
    return error[steps, outputs, place].sum(1), cost[writings, place].sum(1)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_is_the_best_of_all_columns(problem):
    choices, steps, program, error, cost, held, multiplier = problem
    columns = every_column(choices, steps)
    solution = program.solve(error, cost, multiplier, held)
    for place in range(2):
        errors, spent = values(columns, program, error, cost, place)
        total = errors + multiplier * spent
        if held is not None:
            total += values(columns, program, np.broadcast_to(held, error.shape), cost, place)[0]
        transitions = [program.transitions[transition] for transition in solution.transitions[:, place]]
        mine = [i for i, c in enumerate(columns) if c.spent == tuple((t.cell, t.writes) for t in transitions)]
        assert len(mine) == 1, "the column is one of those that may be chosen"
        assert program.cells(solution.transitions[:, place]) == tuple(cell for cell, _ in columns[mine[0]].spent)
        assert tuple(transition.output for transition in transitions) == columns[mine[0]].gave
        assert solution.error[place] == pytest.approx(errors[mine[0]])
        assert solution.cost[place] == pytest.approx(spent[mine[0]])
        assert total[mine[0]] == pytest.approx(total.min())


@pytest.mark.parametrize("slopes", [(), SLOPES])
@pytest.mark.parametrize("ages", [1, 2])
def test_five_steps_with_everything(ages, slopes):
    choices = Choices((4,), ages, share_cfg=True, slopes=slopes)
    program, rng = DynamicProgram(choices), np.random.default_rng(ages)
    error, cost = rng.random((5, len(program.outputs), 1)), rng.random((len(program.writings), 1))
    errors, spent = values(every_column(choices, 5), program, error, cost, 0)
    for multiplier in (0.0, 0.5, 2.0):
        solution = program.solve(error, cost, multiplier)
        assert solution.error[0] + multiplier * solution.cost[0] == pytest.approx((errors + multiplier * spent).min())


def open_transitions(choices, state):
    return (*choices.from_any_state(), *choices.from_state(state))


@pytest.mark.parametrize("share_cfg", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("slopes", [(), SLOPES])
@pytest.mark.parametrize(("ages", "precisions"), [(0, ()), (1, ()), (3, ()), (2, ("int8",))])
def test_neither_less_nor_more_may_follow_a_column_than_should(share_cfg, residual, reuse, slopes, ages, precisions):
    """Side by side with the account kept here, for six steps; and the program knows of each transition, and of no other."""
    choices = Choices((4, 2), ages, share_cfg, residual, reuse, slopes, precisions)
    seen, frontier = set(), {(Past(), START)}
    for _ in range(6):
        found = {}
        for past, state in frontier:
            mine = {(*longer.spent[-1], longer.gave[-1]): longer for longer in continued(past, choices)}
            theirs = {(t.cell, t.writes, t.output): t.after for t in open_transitions(choices, state)}
            assert theirs.keys() == mine.keys()
            seen |= theirs.keys()
            for key, longer in mine.items():
                step = len(longer.gave)
                full = longer.full and (min(step - longer.full[0], ages + 1), *longer.full[1:])
                before = longer.before and (min(step - longer.before[0], ages + 1), *longer.before[1:])
                found[described(longer.output, step), full, before, theirs[key]] = longer  # what follows depends on this alone
        frontier = {(longer, key[-1]) for key, longer in found.items()}
    program = DynamicProgram(choices)
    assert {(t.cell, t.writes, t.output) for t in program.transitions} == seen
    assert set(program.outputs) == {given for _, _, given in seen}
    assert set(program.writings) == {(cell, writes) for cell, writes, _ in seen}


def test_at_no_price_full_attention_and_at_a_high_one_the_cheapest_column():
    """Of seven steps with outputs of up to three steps ago."""
    program = DynamicProgram(Choices((4,), 3, share_cfg=False))
    aged = np.array([given.lag + (given.source.radius is not None) for given in program.outputs], dtype=float)
    error = np.tile(aged[:, None], (7, 1, 1))
    dear = np.array([[float(isinstance(cell, Attend)) + (cell == Attend())] for cell, _ in program.writings])
    careful = program.solve(error, dear, 0.0)
    assert set(program.cells(careful.transitions[:, 0])) == {Attend()}
    bold = program.cells(program.solve(error, dear, 1e6).transitions[:, 0])
    assert bold.count(AST) == 5
    assert bold.count(Attend()) == 1, "an arrow costs less, while something is remembered"


@pytest.mark.parametrize("slope", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("share", [False, True])
def test_what_is_extrapolated_is_chosen_where_it_alone_has_no_error(share, slope):
    """Through two outputs of full attention, both shared or both not, the second of which may be some steps old."""
    program = DynamicProgram(Choices((4,), 4, share_cfg=True, slopes=SLOPES))
    on_line = np.array(
        [
            isinstance(g, ExtrapolatedOutput) and g.earlier.share == g.later.share == share and g.slope == slope
            for g in program.outputs
        ]
    )
    error = np.tile(np.where(on_line, 0.0, 1.0)[:, None], (6, 1, 1))
    solution = program.solve(error, np.zeros((len(program.writings), 1)), 1.0)
    cells = program.cells(solution.transitions[:, 0])
    assert (cells.count(Reuse(slope)), solution.error[0]) == (3, 3.0)
    for step, gives in enumerate(program.outputs_of(solution.transitions[:, 0])):
        if isinstance(gives, ExtrapolatedOutput):
            assert cells[step - gives.later.lag] == cells[step - gives.earlier.lag] == Attend(share_cfg=share)
            assert gives.later.lag < gives.earlier.lag <= 4
