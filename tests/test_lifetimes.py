"""What a column stores: all that is read, nothing else, and no step longer than it is read."""

import pytest
from hypothesis import given
from independent import WHOLE, any_columns, by_head, few, for_one_branch, reads, renews, told_apart

from arrowhead.plans.cells import ASC, AST, EXTRAPOLATE, FULL, Arrow, Attend, Cached, Full, Reuse, wa_rs
from arrowhead.plans.lifetimes import HeadOutput, Residual, Writes, first_fault, lifetimes

WA = Attend(Arrow(3))
BAND, RESIDUAL, CACHED = Arrow(3), Arrow(3, residual=True), Cached()


def stored(writes, heads):
    """The entries of `writes`, one a head: (name, last reader, for the conditional branch alone)."""
    whole = zip(WHOLE, (writes.output_until, writes.slope_until), strict=True)
    found = [(name, until, False) for name, until in whole if until is not None]
    for entry in writes.residuals + writes.head_outputs:
        name = ("residual", entry.radius) if isinstance(entry, Residual) else ("head",)
        whose = range(heads) if entry.heads is None else entry.heads
        found += [((*name, head), entry.last_reader, entry.conditional_only) for head in whose]
    return found


def replay(column):
    """Follow the writes step by step: (step written, name) -> (last reader, for one branch, {step: cell} of its readers)."""
    entries, latest, heads = {}, {}, told_apart(column)
    for step, (cell, writes) in enumerate(zip(column, lifetimes(column), strict=True)):
        for name in reads(column, step, heads):
            assert name in latest, f"step {step} reads {name}, which nothing wrote"
            promised, _, readers = entries[latest[name]]
            assert promised >= step, f"step {step} reads {name}, which was kept until step {promised}"
            readers[step] = cell
        latest = {name: written for name, written in latest.items() if not renews(cell, name, heads)}
        for name, promised, for_one in stored(writes, heads):
            assert name not in latest, f"step {step} writes {name} anew, though it has none"
            latest[name] = (step, name)
            entries[step, name] = (promised, for_one, {})
    return entries


@few
@given(column=any_columns)
def test_every_read_has_a_live_entry(column):
    needed = sum(len(reads(column, step, told_apart(column))) for step in range(len(column)))
    assert sum(len(readers) for _, _, readers in replay(column).values()) == needed


@few
@given(column=any_columns)
def test_every_entry_is_read_and_no_longer_stored_than_that(column):
    for promised, _, readers in replay(column).values():
        assert readers
        assert promised == max(readers)


@few
@given(column=any_columns)
def test_entries_for_the_conditional_branch_alone_have_only_readers_that_share(column):
    for (_, name), (_, for_one, readers) in replay(column).items():
        assert for_one == for_one_branch(name, list(readers.values()))


@few
@given(column=any_columns)
def test_full_heads_store_residuals_computed_heads_outputs_and_reusing_steps_nothing(column):
    heads = told_apart(column)
    for cell, writes in zip(column, lifetimes(column), strict=True):
        assert not isinstance(cell, Reuse) or writes == Writes()
        for (what, *_, head), _, _ in (entry for entry in stored(writes, heads) if entry[0] not in WHOLE):
            method = by_head(cell, heads)[head]
            assert isinstance(method, Full) if what == "residual" else not isinstance(method, Cached)


@few
@given(column=any_columns)
def test_heads_with_equal_entries_share_one(column):
    for writes in lifetimes(column):
        for kind in (writes.residuals, writes.head_outputs):
            alike = [(getattr(entry, "radius", None), entry.last_reader, entry.conditional_only) for entry in kind]
            assert len(set(alike)) == len(alike)
            assert all(entry.heads is None or 0 < len(entry.heads) < told_apart(column) for entry in kind)


def test_heads_that_differ_by_hand():
    column = (
        FULL,
        Attend((BAND, Full(), RESIDUAL)),  # renews the second head's residual, and the outputs of all
        Attend((CACHED, RESIDUAL, CACHED), share_cfg=True),
        AST,
        Attend((CACHED, CACHED, RESIDUAL)),
    )
    assert lifetimes(column) == (
        Writes(residuals=(Residual(3, 4, conditional_only=False, heads=(2,)),)),
        Writes(
            residuals=(Residual(3, 2, conditional_only=True, heads=(1,)),),
            head_outputs=(HeadOutput(2, conditional_only=True, heads=(2,)), HeadOutput(4, conditional_only=False, heads=(0,))),
        ),
        Writes(output_until=3, head_outputs=(HeadOutput(4, conditional_only=False, heads=(1,)),)),
        Writes(),
        Writes(),
    )


def test_a_chain_of_cached_steps_reads_the_output_before_it():
    cached = Attend(CACHED)
    wanted = HeadOutput(4, conditional_only=False), HeadOutput(6, conditional_only=True)
    column = (WA, cached, AST, cached, cached, FULL, Attend(CACHED, share_cfg=True))
    assert [writes.head_outputs for writes in lifetimes(column)] == [wanted[:1], (), (), (), (), wanted[1:], ()]
    assert [writes.output_until for writes in lifetimes(column)] == [None, 2, None, None, None, None, None]


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
        ((Attend(CACHED),), 0, "repeats"),
        ((Attend(CACHED, share_cfg=True), FULL), 0, "repeats"),
        ((EXTRAPOLATE,), 0, "reuses"),
        ((FULL, EXTRAPOLATE), 1, "extrapolates"),
        ((ASC, AST, AST, EXTRAPOLATE), 3, "extrapolates"),
        ((WA, EXTRAPOLATE, FULL), 1, "extrapolates"),
    ],
)
def test_the_first_read_of_something_not_computed_is_named(column, step, word):
    fault = first_fault(column)
    assert fault is not None
    assert fault.startswith(f"step {step} ")
    assert word in fault


@pytest.mark.parametrize(
    ("column", "head", "step", "word"),
    [
        ((Attend((Full(), CACHED)),), 1, 0, "repeats"),
        ((Attend((CACHED, Full())), FULL), 0, 0, "repeats"),
        ((Attend((Full(), BAND)), AST, wa_rs(3)), 1, 2, "residual"),
        ((Attend((BAND, Full())), Attend((CACHED, RESIDUAL)), Attend((RESIDUAL, RESIDUAL))), 0, 2, "residual"),
        ((WA, Attend((BAND, BAND, Full())), Attend((CACHED, RESIDUAL, RESIDUAL)), wa_rs(3)), 1, 2, "residual"),
        ((AST, Attend((Full(), BAND))), 0, 0, "reuses"),
    ],
)
def test_the_first_head_that_reads_something_not_computed_is_named(column, head, step, word):
    fault = first_fault(column)
    assert fault is not None
    assert fault.startswith(f"head {head}: step {step} ")
    assert word in fault


@pytest.mark.parametrize(
    "column",
    [
        (ASC, wa_rs(3)),
        (FULL, AST, ASC, AST, EXTRAPOLATE, EXTRAPOLATE),
        (WA, Attend(CACHED), EXTRAPOLATE),
        (FULL, AST, wa_rs(3)),
        (FULL, wa_rs(3), AST, wa_rs(3)),
        (WA, AST, ASC, AST, wa_rs(3, share_cfg=True)),
        (FULL, ASC, wa_rs(3), AST),
        (WA, AST, Attend(CACHED), AST, Attend(CACHED, share_cfg=True)),
        (FULL, Attend((BAND, CACHED)), Attend((CACHED, RESIDUAL)), Attend((RESIDUAL, CACHED))),
        (Attend((Full(), BAND)), Attend((RESIDUAL, Full())), AST, Attend((CACHED, RESIDUAL))),
    ],
)
def test_columns_whose_reads_were_all_computed_have_no_fault(column):
    assert first_fault(column) is None
