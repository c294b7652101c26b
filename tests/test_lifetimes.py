"""What a column has to remember: everything that is read, nothing that is not, and not a step longer."""

import pytest
from hypothesis import given
from independent import any_columns, few, is_full, reads_residual

from arrowhead.lifetimes import Residual, Writes, first_fault, lifetimes
from arrowhead.methods import ASC, AST, FULL, Arrow, Attend, Reuse, wa_rs

WA = Attend(Arrow(3))


def replay(column):
    """Follow the writes: (step written, key) -> (last reader promised, steps that read it, whether each shares CFG)."""
    entries, latest = {}, {}
    for step, (cell, writes) in enumerate(zip(column, lifetimes(column), strict=True)):
        key = "output" if isinstance(cell, Reuse) else cell.method.radius if reads_residual(cell) else None
        if key is not None:
            assert key in latest, f"step {step} reads {key}, which nothing wrote"
            promised, readers, shared = entries[latest[key]]
            assert promised >= step, f"step {step} reads {key}, which was kept until step {promised}"
            readers.append(step)
            shared.append(getattr(cell, "share_cfg", False))
        if is_full(cell):  # residuals of an earlier full step are void
            latest = {name: written for name, written in latest.items() if name == "output"}
        if not isinstance(cell, Reuse):  # so is an earlier output
            latest.pop("output", None)
        stored = [("output", writes.output_until)] if writes.output_until is not None else []
        for name, last_reader in [*stored, *((r.radius, r.last_reader) for r in writes.residuals)]:
            latest[name] = (step, name)
            entries[step, name] = (last_reader, [], [])
    return entries


@few
@given(column=any_columns)
def test_every_read_has_a_live_entry(column):
    reads = sum(isinstance(cell, Reuse) or reads_residual(cell) for cell in column)
    assert sum(len(readers) for _, readers, _ in replay(column).values()) == reads


@few
@given(column=any_columns)
def test_nothing_is_written_in_vain_or_kept_too_long(column):
    for promised, readers, _ in replay(column).values():
        assert readers
        assert promised == readers[-1]


@few
@given(column=any_columns)
def test_a_residual_is_for_the_conditional_branch_alone_when_every_reader_shares(column):
    entries = replay(column)
    for step, writes in enumerate(lifetimes(column)):
        for residual in writes.residuals:
            assert residual.conditional_only == all(entries[step, residual.radius][2])


@few
@given(column=any_columns)
def test_only_full_steps_make_residuals_and_reusing_steps_write_nothing(column):
    for cell, writes in zip(column, lifetimes(column), strict=True):
        assert is_full(cell) or writes.residuals == ()
        assert not isinstance(cell, Reuse) or writes == Writes()


def test_a_chain_of_reuse_reads_the_output_before_it():
    assert lifetimes((FULL, WA, AST, AST, FULL, AST)) == (Writes(), Writes(3), Writes(), Writes(), Writes(5), Writes())


def test_a_residual_lasts_until_its_last_reader_before_the_next_full_step():
    column = (FULL, wa_rs(3), AST, WA, wa_rs(3, share_cfg=True), ASC, wa_rs(3, share_cfg=True), wa_rs(5))
    made = [writes.residuals for writes in lifetimes(column)]
    assert made[0] == (Residual(3, 4, conditional_only=False),)
    assert made[5] == (Residual(3, 6, conditional_only=True), Residual(5, 7, conditional_only=False))
    assert not any(made[i] for i in (1, 2, 3, 4, 6, 7))


@few
@given(column=any_columns)
def test_a_column_that_can_run_has_no_fault(column):
    assert first_fault(column) is None


@pytest.mark.parametrize(
    ("column", "step", "word"),
    [
        ((AST,), 0, "reuses"),
        ((AST, FULL), 0, "reuses"),
        ((AST, wa_rs(3)), 0, "reuses"),
        ((wa_rs(3),), 0, "residual"),
        ((wa_rs(3, share_cfg=True), FULL), 0, "residual"),
        ((WA, wa_rs(3)), 1, "residual"),
        ((WA, AST, wa_rs(3), FULL), 2, "residual"),
        ((WA, AST, AST, wa_rs(3, share_cfg=True)), 3, "residual"),
        ((Attend(Arrow(3), share_cfg=True), wa_rs(3)), 1, "residual"),
    ],
)
def test_the_first_read_of_what_nothing_wrote_is_named(column, step, word):
    fault = first_fault(column)
    assert fault is not None
    assert fault.startswith(f"step {step} ")
    assert word in fault


@pytest.mark.parametrize(
    "column",
    [
        (ASC, wa_rs(3)),
        (FULL, AST, wa_rs(3)),
        (FULL, wa_rs(3), AST, wa_rs(3)),
        (WA, AST, ASC, AST, wa_rs(3, share_cfg=True)),
        (FULL, ASC, wa_rs(3), AST),
    ],
)
def test_what_lies_between_a_full_step_and_its_reader_is_no_fault(column):
    assert first_fault(column) is None
