"""The dynamic programme against trying every column, with what each gives and writes kept account of here."""

import math

import numpy as np
import pytest
from budget import SLOPES, Past, continued, described, every_column
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowhead.plans.cells import AST, Attend, Reuse
from arrowhead.searches.budget.solver.dynamic_program import DynamicProgram
from arrowhead.searches.budget.solver.states import START, Choices, SiteOutput


@st.composite
def problems(draw):
    """Choices, steps, damages (some infinite) and costs of two columns, prices of what is held, if any, and a multiplier."""
    share_cfg, residual, reuse = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    radii = draw(st.sampled_from([(), (3,), (8, 3)]))
    precisions = draw(st.sampled_from([(), ("int8",)]))
    choices = Choices(
        radii, draw(st.integers(0, 3)), share_cfg, residual, reuse, draw(st.sampled_from([(), SLOPES])), precisions
    )
    steps = draw(st.integers(2, 3 if precisions else 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    programme = DynamicProgram(choices)
    shape = (steps, len(programme.givens), 2)
    damage = rng.random(shape) * rng.choice([0.0, 0.3, 1.0], shape)
    closed = rng.random(shape) < draw(st.sampled_from([0.0, 0.2]))
    damage[closed] = math.inf
    plain = [g for g, of in enumerate(programme.givens) if of == SiteOutput()]
    damage[:, plain] = rng.random((steps, 1, 2))  # full attention is open
    cost = rng.random((len(programme.spendings), 2))
    held = rng.random(shape[1:]) if draw(st.booleans()) else None
    return choices, steps, programme, damage, cost, held, draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))


def values(columns, programme, damage, cost, place):
    """Damage and cost of every column."""
    given_of = {given: g for g, given in enumerate(programme.givens)}
    spending_of = {spending: s for s, spending in enumerate(programme.spendings)}
    givens = np.array([[given_of[given] for given in column.gave] for column in columns])
    spendings = np.array([[spending_of[spent] for spent in column.spent] for column in columns])
    steps = np.arange(givens.shape[1])
    return damage[steps, givens, place].sum(1), cost[spendings, place].sum(1)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_is_the_best_of_all_columns(problem):
    choices, steps, programme, damage, cost, held, multiplier = problem
    columns = every_column(choices, steps)
    solution = programme.solve(damage, cost, multiplier, held)
    for place in range(2):
        harmed, spent = values(columns, programme, damage, cost, place)
        total = harmed + multiplier * spent
        if held is not None:
            total += values(columns, programme, np.broadcast_to(held, damage.shape), cost, place)[0]
        moves = [programme.moves[move] for move in solution.moves[:, place]]
        mine = [i for i, c in enumerate(columns) if c.spent == tuple((move.cell, move.writes) for move in moves)]
        assert len(mine) == 1, "the column is one of those that may be chosen"
        assert programme.cells(solution.moves[:, place]) == tuple(cell for cell, _ in columns[mine[0]].spent)
        assert tuple(move.given for move in moves) == columns[mine[0]].gave
        assert solution.damage[place] == pytest.approx(harmed[mine[0]])
        assert solution.cost[place] == pytest.approx(spent[mine[0]])
        assert total[mine[0]] == pytest.approx(total.min())


@pytest.mark.parametrize("slopes", [(), SLOPES])
@pytest.mark.parametrize("ages", [1, 2])
def test_five_steps_with_everything(ages, slopes):
    choices = Choices((4,), ages, share_cfg=True, slopes=slopes)
    programme, rng = DynamicProgram(choices), np.random.default_rng(ages)
    damage, cost = rng.random((5, len(programme.givens), 1)), rng.random((len(programme.spendings), 1))
    harmed, spent = values(every_column(choices, 5), programme, damage, cost, 0)
    for multiplier in (0.0, 0.5, 2.0):
        solution = programme.solve(damage, cost, multiplier)
        assert solution.damage[0] + multiplier * solution.cost[0] == pytest.approx((harmed + multiplier * spent).min())


def open_moves(choices, memory):
    return (*choices.refreshing(), *choices.moves(memory))


@pytest.mark.parametrize("share_cfg", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("slopes", [(), SLOPES])
@pytest.mark.parametrize(("ages", "precisions"), [(0, ()), (1, ()), (3, ()), (2, ("int8",))])
def test_neither_less_nor_more_may_follow_a_column_than_should(share_cfg, residual, reuse, slopes, ages, precisions):
    """Side by side with the account kept here, for six steps; and the programme knows of each move, and of no other."""
    choices = Choices((4, 2), ages, share_cfg, residual, reuse, slopes, precisions)
    seen, frontier = set(), {(Past(), START)}
    for _ in range(6):
        found = {}
        for past, memory in frontier:
            mine = {(*longer.spent[-1], longer.gave[-1]): longer for longer in continued(past, choices)}
            theirs = {(move.cell, move.writes, move.given): move.after for move in open_moves(choices, memory)}
            assert theirs.keys() == mine.keys()
            seen |= theirs.keys()
            for key, longer in mine.items():
                step = len(longer.gave)
                full = longer.full and (min(step - longer.full[0], ages + 1), *longer.full[1:])
                before = longer.before and (min(step - longer.before[0], ages + 1), *longer.before[1:])
                found[described(longer.output, step), full, before, theirs[key]] = longer  # what follows depends on this alone
        frontier = {(longer, key[-1]) for key, longer in found.items()}
    programme = DynamicProgram(choices)
    assert {(move.cell, move.writes, move.given) for move in programme.moves} == seen
    assert set(programme.givens) == {given for _, _, given in seen}
    assert set(programme.spendings) == {(cell, writes) for cell, writes, _ in seen}


def test_at_no_price_full_attention_and_at_a_high_one_the_cheapest_column():
    """Of seven steps with outputs of up to three steps ago."""
    programme = DynamicProgram(Choices((4,), 3, share_cfg=False))
    aged = np.array([given.lag + (given.radius is not None) for given in programme.givens], dtype=float)
    damage = np.tile(aged[:, None], (7, 1, 1))
    dear = np.array([[float(isinstance(cell, Attend)) + (cell == Attend())] for cell, _ in programme.spendings])
    careful = programme.solve(damage, dear, 0.0)
    assert set(programme.cells(careful.moves[:, 0])) == {Attend()}
    bold = programme.cells(programme.solve(damage, dear, 1e6).moves[:, 0])
    assert bold.count(AST) == 5
    assert bold.count(Attend()) == 1, "an arrow costs less, while something is remembered"


@pytest.mark.parametrize("slope", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("share", [False, True])
def test_lines_are_chosen_where_they_alone_do_no_damage(share, slope):
    """Through two outputs of full attention, both shared or both not, the second of which may be some steps old."""
    programme = DynamicProgram(Choices((4,), 4, share_cfg=True, slopes=SLOPES))
    line = [g.earlier is not None and g.earlier.share == g.share for g in programme.givens]
    on_line = np.array(line) & [g.share == share and g.slope == slope for g in programme.givens]
    damage = np.tile(np.where(on_line, 0.0, 1.0)[:, None], (6, 1, 1))
    solution = programme.solve(damage, np.zeros((len(programme.spendings), 1)), 1.0)
    cells = programme.cells(solution.moves[:, 0])
    assert (cells.count(Reuse(slope)), solution.damage[0]) == (3, 3.0)
    for step, gives in enumerate(programme.givens_of(solution.moves[:, 0])):
        if gives.earlier is not None:
            assert cells[step - gives.lag] == cells[step - gives.earlier.lag] == Attend(share_cfg=share)
            assert gives.lag < gives.earlier.lag <= 4
