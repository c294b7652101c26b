"""FLOPs and bytes in closed form against counting, and against the table that DiTFastAttn prints."""

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from independent import dense_mask, few, is_full, plans, reads_residual, token_layouts

from arrowhead.cost import pairs, site_flops
from arrowhead.layout import Site, Tokens
from arrowhead.lifetimes import Writes
from arrowhead.methods import ASC, AST, FULL, Arrow, Attend, Full, Reuse, wa_rs
from arrowhead.plan import Plan, Target

DIT = Site("blocks.0.attn1", heads=16, head_dim=72, channels=1152)
TABLE_2 = {1024: (50, 77, 38, 0), 4096: (50, 51, 26, 0), 16384: (50, 33, 16, 0)}  # % left by ASC, WA-RS, WA-RS + ASC, AST


@pytest.mark.parametrize(("tokens", "printed"), TABLE_2.items())
def test_table_2_of_the_paper(tokens, printed):
    cells = ASC, wa_rs(tokens // 8), wa_rs(tokens // 8, share_cfg=True), AST
    full = site_flops(DIT, Tokens(tokens), FULL, Writes(), samples=2).module
    left = [100 * site_flops(DIT, Tokens(tokens), cell, Writes(), samples=2).module / full for cell in cells]
    assert left == pytest.approx(printed, abs=1)


@pytest.mark.parametrize(("tokens", "printed"), TABLE_2.items())
def test_table_2_as_the_second_step_of_a_plan(tokens, printed):
    band = Arrow(tokens // 8)  # without its residual, whose making the table does not count
    cells = ASC, Attend(band), Attend(band, share_cfg=True), AST
    target = Target("DiTTransformer2DModel", "Scheduler", {}, (DIT,))
    both_steps = [Plan(((FULL,), (cell,)), target, Tokens(tokens), guided=True).flops().module for cell in cells]
    assert [100 * (2 * left - 1) for left in both_steps] == pytest.approx(printed, abs=1)


def test_a_step_by_hand():
    n, d, w = 1024, 1152, 128
    projections, matmuls, band = 8 * n * d * d, 4 * n * n * d, 4 * (n * (2 * w + 1) - w * (w + 1)) * d
    target = Target("DiTTransformer2DModel", "Scheduler", {}, (DIT,))
    left = Plan(((FULL,), (wa_rs(w, share_cfg=True),), (AST,)), target, Tokens(n), guided=True).flops()
    spent = 2 * (projections + matmuls) + band + projections + band  # the residual is made for the conditional half alone
    assert left.module == pytest.approx(spent / (6 * (projections + matmuls)))
    assert left.attention == pytest.approx((2 * matmuls + 2 * band) / (6 * matmuls))


@few
@given(tokens=token_layouts, radius=st.integers(0, 30))
def test_pairs_are_what_a_mask_keeps(tokens, radius):
    assert pairs(Arrow(radius), tokens) == pairs(Arrow(radius, residual=True), tokens) == int(dense_mask(tokens, radius).sum())
    assert pairs(Full(), tokens) == dense_mask(tokens, radius).numel()


def kept(method, tokens):
    return int(dense_mask(tokens, method.radius if isinstance(method, Arrow) else 10**6).sum())


def before_next_full(column, step):
    return list(takewhile(lambda cell: not is_full(cell), column[step + 1 :]))


def counted_flops(plan):
    """Fractions left of (attention, module): walk the plan, look ahead for residuals that have to be made, count pairs."""
    n, spent, whole = plan.tokens.visual + plan.tokens.text, [0, 0], [0, 0]
    for row, site in enumerate(plan.target.sites):
        width = site.heads * site.head_dim
        projections = 4 * 2 * n * site.channels * width  # Q, K, V and output: a multiply–add for each weight and token
        column = [cells[row] for cells in plan.cells]
        for step, cell in enumerate(column):
            everything = 2 * 2 * width * n * n * plan.samples
            whole = [whole[0] + everything, whole[1] + everything + projections * plan.samples]
            if isinstance(cell, Reuse):
                continue
            rows = 1 if cell.share_cfg else plan.samples
            looked_at = kept(cell.method, plan.tokens) * rows
            if is_full(cell):
                readers = [later for later in before_next_full(column, step) if reads_residual(later)]
                for radius in {reader.method.radius for reader in readers}:
                    for_one = all(reader.share_cfg for reader in readers if reader.method.radius == radius)
                    looked_at += kept(Arrow(radius), plan.tokens) * (1 if for_one else rows)
            spent = [spent[0] + 4 * width * looked_at, spent[1] + 4 * width * looked_at + projections * rows]
    return spent[0] / whole[0], spent[1] / whole[1]


@few
@given(plan=plans())
def test_flops_of_a_plan_are_what_walking_it_counts(plan):
    left = plan.flops()
    assert (left.attention, left.module) == pytest.approx(counted_flops(plan), rel=1e-12)


@few
@given(plan=plans())
def test_sharing_costs_half_under_guidance_and_nothing_changes_without(plan):
    site, tokens = plan.target.sites[0], plan.tokens
    shared, both = (site_flops(site, tokens, Attend(Full(), share), Writes(), plan.samples).module for share in (True, False))
    assert both == (2 if plan.guided else 1) * shared > 0


def simulated_bytes(plan, images, itemsize):
    """The most bytes at any moment of each step, and the bytes at its end: entries are stored, read and freed one by one."""
    held, peaks, ends = {}, [], []
    n, v = plan.tokens.visual + plan.tokens.text, plan.tokens.visual
    for step, cells in enumerate(plan.cells):
        moments = [sum(held.values())]
        for row, (site, cell) in enumerate(zip(plan.target.sites, cells, strict=True)):
            column = [cells[row] for cells in plan.cells]
            again = isinstance(column[step + 1], Reuse) if step + 1 < plan.steps else False
            readers = [later for later in before_next_full(column, step) if reads_residual(later)]
            if isinstance(cell, Reuse):
                if not again:
                    del held[site, "output"]
            else:
                rows = (1 if cell.share_cfg else plan.samples) * images
                if reads_residual(cell) and all(later.method.radius != cell.method.radius for later in readers):
                    del held[site, cell.method.radius]
                if is_full(cell):
                    for radius in {reader.method.radius for reader in readers}:
                        for_one = all(reader.share_cfg for reader in readers if reader.method.radius == radius)
                        held[site, radius] = (images if for_one else rows) * v * site.heads * site.head_dim * itemsize
                if again:
                    held[site, "output"] = rows * n * site.channels * itemsize
            moments.append(sum(held.values()))
        peaks.append(max(moments))
        ends.append(moments[-1])
    assert not held
    return peaks, ends


@few
@given(plan=plans(), images=st.integers(1, 4), itemsize=st.sampled_from([2, 4]))
def test_the_greatest_cache_is_what_storing_and_freeing_holds(plan, images, itemsize):
    assert max(plan.cache_bytes(images, itemsize)) == max(simulated_bytes(plan, images, itemsize)[0])


@few
@given(plan=plans(), images=st.integers(1, 4), itemsize=st.sampled_from([2, 4]))
def test_cache_of_each_step_is_what_storing_and_freeing_holds_at_any_moment(plan, images, itemsize):
    assert list(plan.cache_bytes(images, itemsize)) == simulated_bytes(plan, images, itemsize)[0]


@few
@given(plan=plans())
def test_cache_of_a_step_is_never_below_what_the_step_leaves_behind(plan):
    for peak, left in zip(plan.cache_bytes(1, 2), simulated_bytes(plan, 1, 2)[1], strict=True):
        assert peak >= left


def test_a_cached_output_counts_in_the_step_that_reads_it():
    target = Target("Transformer", "Scheduler", {}, (Site("attn", heads=2, head_dim=4, channels=8),))
    plan = Plan(((FULL,), (AST,)), target, Tokens(10), guided=True)
    assert plan.cache_bytes(images=1, itemsize=4) == (2 * 10 * 8 * 4, 2 * 10 * 8 * 4)


def test_a_plan_that_remembers_nothing_holds_nothing():
    target = Target("Transformer", "Scheduler", {}, (DIT,))
    assert Plan(((FULL,), (ASC,), (FULL,)), target, Tokens(64), guided=True).cache_bytes() == (0, 0, 0)
