"""Plans derived for other steps and tokens: they can run, and do what the plan did in the same part of the run."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from independent import columns, few, grid_layouts, plans, reads, renews, tokens_of
from pipelines import sd3, tiny
from typer.testing import CliRunner
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.cli import main
from arrowhead.errors import InputsInvalid, PlanDerived, PlanInvalid, PlanMismatch
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans import resample
from arrowhead.plans.cells import ASC, AST, EXTRAPOLATE, FULL, Arrow, Attend, Box, Cached, Full, Reuse, wa_rs
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import Target

SITE = Site("attn", heads=2, head_dim=4, channels=8)


def plan_of(rows, tokens=Tokens(64), sites=(SITE,), **more):  # noqa: B008  # frozen
    return Plan(tuple(map(tuple, rows)), Target("Transformer", "Scheduler", {}, tuple(sites)), tokens, True, **more)


def require_runs(plan):
    """Check that an earlier step of the same transformer computed all that is read; for extrapolation, two steps."""
    for site, column in zip(plan.target.sites, plan.columns, strict=True):
        for step, cell in enumerate(column):
            begin = plan.switch if plan.switch is not None and step >= plan.switch else 0
            before = range(begin, step)
            for what in reads(column, step, site.heads):
                assert any(renews(column[earlier], what, site.heads) for earlier in before), (step, what)
            if isinstance(cell, Reuse) and cell.extrapolate:
                assert sum(not isinstance(column[earlier], Reuse) for earlier in before) > 1


@st.composite
def two_transformers(draw):
    """A plan whose second transformer takes over in the middle."""
    parts = [draw(columns(draw(st.integers(1, 5)), 2)) for _ in range(2)]
    return plan_of([(cell,) for part in parts for cell in part], switch=len(parts[0]))


@few
@given(plan=plans() | two_transformers(), steps=st.integers(1, 60))
def test_any_plan_can_run_in_any_number_of_steps(plan, steps):
    if plan.switch and steps == 1:
        return
    found = plan.resample(steps=steps)
    assert found.steps == steps
    assert (found.target, found.guided, found.calls) == (plan.target, plan.guided, plan.calls)
    assert found.tokens in (plan.tokens, plan.tokens.flat)  # the latter if no box is left
    assert found.cells[0] == plan.cells[0]
    if plan.switch:
        assert 0 < found.switch < steps
        assert found.cells[found.switch] == plan.cells[plan.switch]
    require_runs(found)


@few
@given(plan=plans(), steps=st.integers(1, 60))
def test_the_same_steps_and_tokens_change_nothing(plan, steps):
    assert plan.resample(steps=plan.steps) is plan
    assert plan.resample(tokens=plan.tokens) is plan
    assert plan.resample(steps, plan.tokens) == plan.resample(steps)


@few
@given(plan=plans(), steps=st.integers(1, 60))
def test_a_derived_plan_is_written_and_read(plan, steps, tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    found = plan.resample(steps).resample(steps + 1)
    found.save(path)
    assert Plan.load(path) == found
    assert Plan.load(path).about == found.about


in_step = st.lists(st.sampled_from([FULL, FULL, ASC, AST]), min_size=0, max_size=30).map(lambda cells: [FULL, *cells])


@few
@given(column=in_step.filter(lambda column: AST not in column), steps=st.integers(1, 60))
def test_flops_up_to_each_step_are_those_of_the_plan(column, steps):
    """Up to each step, the FLOPs are those of the plan up to the same part of the run, to one full step."""
    plan = plan_of([(cell,) for cell in column])
    found = plan.resample(steps=steps)
    worth = {FULL: Fraction(1), ASC: Fraction(1, 2)}
    for done in range(1, steps + 1):
        part = Fraction(done * len(column), steps)
        whole = int(part)
        by_then = sum(worth[cell] for cell in column[:whole]) + (part - whole) * (worth[column[whole]] if part > whole else 0)
        now = sum(worth[cell] for (cell,) in found.cells[:done])
        assert abs(now - by_then * Fraction(steps, len(column))) <= 1


@few
@given(column=in_step, steps=st.integers(1, 60), data=st.data())
def test_computed_steps_lie_where_those_of_the_plan_do(column, steps, data):
    """Along the noise, counted evenly between two computed steps, times the new steps by the old ones: one for each count."""
    if AST not in column:
        return
    size = {"min_size": len(column), "max_size": len(column), "unique": True}
    old = sorted(data.draw(st.lists(st.floats(0.01, 1), **size)), reverse=True)
    new = np.linspace(old[0], 0, steps, endpoint=False).tolist()
    found = levelled([(cell,) for cell in column], old).resample(levels=new)
    computed = [-level for level, cell in zip(old, column, strict=True) if cell != AST]
    count = np.interp([-level for level in new], [*computed, 0.0], range(len(computed) + 1)) * steps / len(column)
    assert found.cells[0] == (column[0],)
    for step in range(1, steps):
        if abs(count[step] - round(count[step])) > 1e-9 < abs(count[step - 1] - round(count[step - 1])):  # no tie
            assert (found.cells[step] != (AST,)) == (np.floor(count[step]) > np.floor(count[step - 1])), step


@few
@given(column=in_step, steps=st.integers(1, 60), draw=st.data())
def test_each_row_is_a_row_of_the_plan_from_the_same_stretch(column, steps, draw):
    """So sites that did the same in a step still do. Where all sites reuse in some steps, it is the nearest row of its kind."""
    others = draw.draw(st.permutations(column[1:]))
    rows = [*zip(column, [FULL, *others], strict=True)]
    found = plan_of(rows, sites=(SITE, replace(SITE, path="attn2"))).resample(steps=steps)
    for new, row in enumerate(found.cells[1:], 1):
        begin, end = Fraction(new * len(rows), steps), Fraction((new + 1) * len(rows), steps)
        if (AST, AST) in rows:
            kind = [place for place, old in enumerate(rows) if (old == (AST, AST)) == (row == (AST, AST))]
            nearest = min(abs(2 * place + 1 - begin - end) for place in kind)
            assert row in [rows[place] for place in kind if abs(2 * place + 1 - begin - end) == nearest]
        else:
            assert row in [old for place, old in enumerate(rows) if place < end and place + 1 > begin]


@few
@given(column=in_step, data=st.data())
def test_what_is_linear_in_the_noise_is_extrapolated_as_well_as_before(column, data):
    """Slopes that were exact for an output linear in the noise level are exact at other levels."""
    size = {"min_size": len(column), "max_size": len(column), "unique": True}
    grid = st.lists(st.integers(1, 40).map(lambda level: level / 40), **size) if len(column) < 40 else st.just([])
    old = sorted(data.draw(grid), reverse=True)
    new = sorted(data.draw(st.lists(st.integers(1, 40).map(lambda level: level / 40), min_size=1, max_size=30, unique=True)))[
        ::-1
    ]

    def exact(levels, cells):
        computed = []
        for step, cell in enumerate(cells):
            if isinstance(cell, Reuse):
                later, earlier = computed[-1], computed[-2] if len(computed) > 1 else None
                yield step, later, earlier
            else:
                computed.append(step)

    cells = list(column)
    for step, later, earlier in exact(old, column):
        if earlier is not None:
            along = (old[step] - old[later]) / (old[later] - old[earlier])
            slope = along * (later - earlier) / (step - later)
            cells[step] = Reuse(extrapolate=slope) if slope <= 4 else AST
    found = [row[0] for row in levelled([(cell,) for cell in cells], old).resample(levels=new).cells]
    for step, later, earlier in exact(new, found):
        slope = found[step].extrapolate
        if earlier is not None and 0 < slope < 4:
            assert slope * (step - later) / (later - earlier) == pytest.approx(
                (new[step] - new[later]) / (new[later] - new[earlier])
            )


@pytest.mark.parametrize(("before", "steps", "after"), [
    ("FRFRFRFR", 4, "FRFR"),
    ("FRRFRRFRR", 3, "FRR"),
    ("FFRR", 8, "FFFRRFRR"),
    ("FRFR", 8, "FRFRFRFR"),
    ("F", 3, "FFF"),
    ("FRRRRRRR", 1, "F"),
])  # fmt: skip
def test_steps_by_hand(before, steps, after):
    cells = {"F": FULL, "R": AST}
    found = plan_of([(cells[letter],) for letter in before]).resample(steps=steps)
    assert found.cells == tuple((cells[letter],) for letter in after)


def test_what_would_read_something_not_computed_is_computed_in_full():
    """No new step takes the full step that made the residual, or the second output that extrapolation needs."""
    narrow, band, heads = Attend(Arrow(2)), wa_rs(2), Attend((Arrow(2, residual=True), Cached()))
    assert plan_of([(narrow,), (FULL,), (band,), (band,)]).resample(steps=2).cells == ((narrow,), (FULL,))
    found = plan_of([(narrow,), (FULL,), (heads,), (heads,)]).resample(steps=2)
    assert found.cells == ((narrow,), (Attend((Full(), Cached())),))
    assert plan_of([(FULL,), (FULL,), (EXTRAPOLATE,), (EXTRAPOLATE,)]).resample(steps=2).cells == ((FULL,), (FULL,))


def test_where_the_second_transformer_takes_over():
    plan = plan_of([(FULL,), (AST,), (FULL,), (AST,), (AST,)], switch=2)
    assert [plan.resample(steps=steps).switch for steps in (2, 3, 10, 50)] == [1, 1, 4, 20]
    found = plan.resample(steps=10, switch=7)
    assert (found.switch, found.cells[7]) == (7, (FULL,))
    require_runs(found)
    for wrong in ({"steps": 1}, {"steps": 10, "switch": 0}, {"steps": 10, "switch": 10}, {"steps": 10, "switch": -1}):
        with pytest.raises(InputsInvalid, match="wanted steps for each transformer"):
            plan.resample(**wrong)
    with pytest.raises(InputsInvalid, match="wanted steps for each transformer"):
        plan_of([(FULL,), (AST,)]).resample(steps=4, switch=2)


@few
@given(plan=plans(), tokens=grid_layouts(), steps=st.integers(1, 12))
def test_bands_reach_over_the_same_part_of_other_tokens(plan, tokens, steps):
    before = plan.tokens
    sees_text = any(site.joint for site in plan.target.sites) and before.text > 0
    tokens = replace(tokens, text=3 if sees_text else 0, text_first=sees_text and before.text_first)
    if (before.text and not sees_text) or (before.text_first and not before.text):
        return  # no call of such a model has text that no site sees
    found = plan.resample(steps, tokens)
    require_runs(found)
    for site, was, new in zip(plan.target.sites, plan.resample(steps).columns, found.columns, strict=True):
        own, other = tokens_of(site, before), tokens_of(site, tokens)
        for cell, scaled in zip(was, new, strict=True):
            if not isinstance(cell, Attend):
                assert scaled == cell
                continue
            assert scaled.share_cfg == cell.share_cfg
            for a, b in zip(cell.methods(site.heads), scaled.methods(site.heads), strict=True):
                if not isinstance(a, Arrow):
                    assert a == b
                    continue
                assert replace(a, radius=0) == replace(b, radius=0)
                if isinstance(a.radius, Box):
                    sizes = [(getattr(own.grid, n), getattr(other.grid, n)) for n in ("frames", "rows", "columns")]
                    pairs = [*zip(a.radius.reaches, b.radius.reaches, sizes, strict=True)]
                else:
                    pairs = [(a.radius, b.radius, (own.visual, other.visual))]
                for reach, now, (size, size_now) in pairs:
                    if not reach:
                        assert now == reach
                    else:
                        assert now >= 1
                        assert abs(now - reach * size_now / size) <= 0.5 or now == 1


def test_radii_at_four_times_the_tokens():
    image, band, box = Tokens.of_grid(1, 8, 8), wa_rs(8), Attend(Arrow(Box(rows=2, columns=4)))
    found = plan_of([(FULL,), (band,)], image).resample(tokens=Tokens.of_grid(1, 16, 16))
    assert found.cells == ((FULL,), (wa_rs(32),))
    assert found.tokens == Tokens(256)
    found = plan_of([(FULL,), (box,)], image).resample(tokens=Tokens.of_grid(1, 16, 32))
    assert found.cells == ((FULL,), (Attend(Arrow(Box(rows=4, columns=16))),))
    assert found.tokens == Tokens.of_grid(1, 16, 32)


def test_tokens_that_the_plan_cannot_have_are_refused():
    box = plan_of([(FULL,), (Attend(Arrow(Box(rows=2, columns=4))),)], Tokens.of_grid(1, 8, 8))
    with pytest.raises(InputsInvalid, match="wanted a grid"):
        box.resample(tokens=Tokens(256))
    joint = plan_of([(FULL,), (wa_rs(8),)], Tokens(64, 7), sites=(replace(SITE, joint=True),))
    assert joint.resample(tokens=Tokens(256, 9)).tokens == Tokens(256, 9)
    assert joint.resample(tokens=Tokens(256)).tokens == Tokens(256)
    with pytest.raises(InputsInvalid, match="wanted text on the same side"):
        joint.resample(tokens=Tokens(256, 7, text_first=True))


@pytest.mark.parametrize(
    "asked", [{}, {"steps": 0}, {"steps": -3}, {"steps": 2.5}, {"steps": True}, {"steps": "9"}, {"switch": 1}]
)
def test_invalid_steps_are_refused(asked):
    with pytest.raises(InputsInvalid, match="wanted a number of steps"):
        plan_of([(FULL,), (AST,)]).resample(**asked)


def test_a_derived_plan_says_so_in_about():
    plan = plan_of([(FULL,), (AST,)] * 10)
    plan = replace(plan, about={"model": "x", "search": {"asked": "y"}})
    found = plan.resample(steps=50)
    assert found.about == {**plan.about, "derived": [{"steps": "50, was 20", "module_flops": "0.500, was 0.500"}]}
    again = found.resample(tokens=Tokens(16))
    assert [list(change) for change in again.about["derived"]] == [["steps", "module_flops"], ["tokens", "module_flops"]]
    assert "visual=16" in again.about["derived"][1]["tokens"]


def test_from_the_command_line(tmp_path):
    plan = plan_of([(FULL,), (AST,)] * 5)
    plan.save(tmp_path / "plan.json")
    asked = ["resample", tmp_path / "plan.json", "--steps", 20, "--out", tmp_path / "new.json"]
    said = CliRunner().invoke(main.app, list(map(str, asked)), env={"COLUMNS": "120"}, catch_exceptions=False)
    assert said.exit_code == 0
    assert "derived: steps 20, was 10" in said.output
    assert Plan.load(tmp_path / "new.json") == plan.resample(steps=20)


def pipeline_plan(bench, rows):
    model = find(bench.pipe)
    cells = tuple((cell,) * len(model.sites) for cell in rows)
    return Plan(cells, target_of(model), Tokens(bench.visual, bench.text), guided=True)


def test_a_derived_plan_is_warned_of_once_and_runs():
    bench = sd3()
    plan = pipeline_plan(bench, [FULL, wa_rs(4), AST, FULL, ASC])
    found = plan.resample(steps=8)
    with left_as_it_was(bench, steps=8):
        with pytest.warns(PlanDerived, match=r"steps 8, was 5, module_flops 0\.\d+, was 0\.\d+; search again") as warned:
            run = ah.apply(bench.pipe, found, changes="refuse")
        bench.pipe(**bench.inputs(steps=8))
        bench.pipe(**bench.inputs(1, steps=8))
        assert run.summary().flops.module == pytest.approx(found.flops().module)
        with pytest.raises(PlanMismatch, match="plan is for 8 steps, pipeline runs 5"):
            bench.pipe(**bench.inputs(steps=5))
        ah.remove(bench.pipe)
    assert len([one for one in warned if one.category is PlanDerived]) == 1


def test_a_larger_picture():
    """A plan for 16 tokens, on 64 of the same model, which computes positions for any size."""
    bench = sd3(pos_embed_max_size=16)
    found = pipeline_plan(bench, [FULL, wa_rs(2), AST, wa_rs(2), FULL]).resample(tokens=Tokens(64, bench.text))
    assert found.cells[1][0] == wa_rs(8)
    with pytest.warns(PlanDerived, match="tokens Tokens"):
        run = ah.apply(bench.pipe, found, changes="refuse")
    bench.pipe(**bench.inputs(height=32, width=32))
    assert run.summary().flops.attention == pytest.approx(found.flops().attention)
    with pytest.raises(PlanMismatch, match="search again at this resolution"):
        bench.pipe(**bench.inputs())
    ah.remove(bench.pipe)


def test_full_plans_stay_bit_for_bit():
    bench = tiny()
    full = pipeline_plan(bench, [FULL] * 3).resample(steps=7)
    untouched = bench.pipe(**bench.inputs(steps=7)).images
    with pytest.warns(PlanDerived), ah.applied(bench.pipe, full):
        assert torch.equal(bench.pipe(**bench.inputs(steps=7)).images, untouched)


levels_of = st.lists(st.floats(0.001, 1), min_size=1, max_size=30, unique=True).map(
    lambda found: tuple(sorted(found, reverse=True))
)


def levelled(rows, levels, **more):
    plan = plan_of(rows, **more)
    return replace(plan, target=replace(plan.target, levels=tuple(levels)))


@few
@given(levels=levels_of, repeats=st.data())
def test_spans_of_steps_lie_one_after_another_from_the_first_level_to_none(levels, repeats):
    counts = [repeats.draw(st.integers(1, 3)) for _ in levels]
    repeated = [level for level, count in zip(levels, counts, strict=True) for _ in range(count)]
    spans = resample.spans(repeated)
    assert spans[0][0] == -Fraction(levels[0])
    assert spans[-1][1] == 0
    assert all(end == begin for (_, end), (begin, _) in pairwise(spans))
    for level, count in zip(levels, counts, strict=True):
        own = [end - begin for (begin, end), at in zip(spans, repeated, strict=True) if at == level]
        assert len(set(own)) == 1
        assert len(own) == count


@few
@given(plan=plans(), data=st.data())
def test_at_its_own_levels_a_plan_is_itself_and_at_the_last_ones_its_end(plan, data):
    """As from an image: what a row would read of the steps left out is computed in full."""
    size = {"min_size": plan.steps, "max_size": plan.steps, "unique": True}
    levels = sorted(data.draw(st.lists(st.floats(0.001, 1), **size)), reverse=True)
    plan = replace(plan, target=replace(plan.target, levels=tuple(levels)))
    assert plan.resample(levels=levels) is plan
    begin = data.draw(st.integers(0, plan.steps - 1))
    found = plan.resample(levels=levels[begin:])
    require_runs(found)
    for site, column, old in zip(plan.target.sites, found.columns, plan.columns, strict=True):
        for step, cell in enumerate(column):
            before = range(begin, begin + step)
            kept = all(any(renews(old[i], what, site.heads) for i in before) for what in reads(old, begin + step, site.heads))
            slope = isinstance(old[begin + step], Reuse) and old[begin + step].extrapolate
            if kept and not slope:
                assert cell == old[begin + step]


@few
@given(plan=plans(), levels=levels_of, data=st.data())
def test_each_step_takes_a_row_of_the_noise_that_it_removes(plan, levels, data):
    size = {"min_size": plan.steps, "max_size": plan.steps, "unique": True}
    old = sorted(data.draw(st.lists(st.floats(0.001, 1), **size)), reverse=True)
    plan = replace(plan, target=replace(plan.target, levels=tuple(old)))
    found = plan.resample(levels=levels)
    assert (found.steps, found.target.levels) == (len(levels), levels)
    require_runs(found)
    taken = resample.rows_taken([1] * len(old), resample.spans(old), resample.spans(levels))
    for (begin, end), row in zip(resample.spans(levels), taken, strict=True):
        nearest = min(abs(begin + end - sum(span)) for span in resample.spans(old))
        first, last = resample.spans(old)[row]
        assert min(end, last) > max(begin, first) or abs(begin + end - first - last) == nearest


@few
@given(column=in_step, data=st.data())
def test_noise_that_the_plan_did_not_have_is_computed(column, data):
    """As when a plan of image-to-image is used from pure noise on. What follows is the plan."""
    size = {"min_size": len(column), "max_size": len(column), "unique": True}
    old = sorted(data.draw(st.lists(st.floats(0.001, 0.5), **size)), reverse=True)
    more = sorted(data.draw(st.lists(st.floats(0.51, 1), min_size=1, max_size=20, unique=True)), reverse=True)
    found = levelled([(cell,) for cell in column], old).resample(levels=[*more, *old])
    assert AST not in [cell for (cell,) in found.cells[: len(more)]]
    if AST in column:
        assert [cell for (cell,) in found.cells[len(more) :]] == column


def test_a_last_step_at_no_noise():
    rows, levels = [[FULL], [AST]] * 4 + [[AST]] * 2, [level / 9 for level in range(9, -1, -1)]
    plan = levelled(rows, levels)
    assert plan.resample(levels=levels) is plan
    doubled = plan.resample(levels=[level / 18 for level in range(19, -1, -1)])
    assert sum(cell != AST for (cell,) in doubled.cells) <= 9
    assert doubled.cells[-2:] == ((AST,), (AST,))
    assert resample.spans([1.0, 0.5, 0.0])[-1] == (0, Fraction(1, 2))


def test_levels_by_hand():
    rows = [[FULL], [AST], [FULL], [AST]]
    plan = levelled(rows, [1.0, 0.75, 0.5, 0.25])
    assert plan.resample(levels=[1.0, 0.5]).cells == ((FULL,), (AST,))
    assert plan.resample(levels=[0.75, 0.5, 0.25]).cells == ((FULL,), (FULL,), (AST,))
    assert plan.resample(levels=[0.3, 0.2]).cells == ((FULL,), (AST,))
    heun = [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert plan.resample(levels=heun).cells == tuple(zip([FULL, AST, FULL, AST, FULL, AST, FULL], strict=True))


@few
@given(plan=plans(), begin=st.integers(0, 5))
def test_a_plan_that_begins_on_the_way_reads_nothing_older(plan, begin):
    begin = min(begin, plan.steps - 1)
    found = plan.begun_at(begin)
    assert all(cell == FULL for row in found.cells[:begin] for cell in row)
    require_runs(replace(found, cells=found.cells[begin:], target=replace(found.target, levels=None)))


@pytest.mark.parametrize("wrong", [
    {"levels": []}, {"levels": [1.0, 0.5], "steps": 3}, *({"levels": [float(level)]} for level in ("nan", "inf", "-1")),
])  # fmt: skip
def test_levels_that_are_none(wrong):
    with pytest.raises((InputsInvalid, ValueError), match="wanted"):
        plan_of([(FULL,), (AST,)]).resample(**wrong)


def test_levels_are_written_and_read_and_as_many_as_the_steps(tmp_path):
    plan = levelled([[FULL], [AST], [FULL]], torch.rand(3, dtype=torch.float64).tolist())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").target.levels == plan.target.levels
    with pytest.raises(PlanInvalid, match="got 2 noise levels for 3 steps"):
        levelled([[FULL], [AST], [FULL]], [1.0, 0.5])
