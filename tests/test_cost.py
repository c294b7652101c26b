"""FLOPs and bytes in closed form against counting, and against the table that DiTFastAttn prints."""

import pytest
from holding import simulated_bytes
from hypothesis import given
from hypothesis import strategies as st
from independent import by_head, dense_mask, few, for_one_branch, made, plans, sequences_of, token_layouts, tokens_of

from arrowhead.plans.cells import ASC, AST, FULL, Arrow, Attend, Cached, Full, Reuse, wa_rs
from arrowhead.plans.flops import pairs, site_flops
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import Writes
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import Target

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


def test_a_step_of_heads_by_hand():
    v, t, heads, d, c, w = 12, 4, 3, 8, 20, 2
    site = Site("attn", heads, d, c, joint=True, projects_out="visual")
    cells = ((FULL,), (Attend((Cached(), Full(), Arrow(w, residual=True))),), (Attend(Cached(), share_cfg=True),))
    left = Plan(cells, Target("Transformer", "Scheduler", {}, (site,)), Tokens(v, t), guided=False).flops()
    n, band = v + t, v * (2 * w + 1) - w * (w + 1) + t * (2 * v + t)
    qkv, out = 2 * 3 * n * c * d, 2 * v * c * heads * d  # of a head, of all heads
    full, attended = 4 * heads * n * n * d, 4 * d * (n * n + band)
    spent = full + 4 * d * band + attended
    assert left.attention == pytest.approx(spent / (3 * full))
    projected = (heads * qkv + out) + (2 * qkv + out) + (qkv + out)  # one head is projected where all are cached
    assert left.module == pytest.approx((spent + projected) / (3 * (full + heads * qkv + out)))
    bytes_held = Plan(cells, Target("Transformer", "Scheduler", {}, (site,)), Tokens(v, t), guided=False).cache_bytes(1, 2)
    assert bytes_held == (2 * d * (v + n), 2 * d * 3 * n, 2 * d * 3 * n)


@few
@given(tokens=token_layouts, radius=st.integers(0, 30))
def test_pairs_are_what_a_mask_keeps(tokens, radius):
    assert pairs(Arrow(radius), tokens) == pairs(Arrow(radius, residual=True), tokens) == int(dense_mask(tokens, radius).sum())
    assert pairs(Full(), tokens) == dense_mask(tokens, radius).numel()
    assert pairs(Cached(), tokens) == 0


def test_a_step_in_int8_by_hand():
    """Half of the first matmul: a full head is left with 3/4, and a band with 3/4 of its own."""
    v, heads, d, w = 100, 2, 8, 7
    site = Site("attn", heads, d, 16)
    cells = ((FULL,), (Attend(Full("int8")),), (Attend((Arrow(w, True, "int8"), Full("int8"))),))
    left = Plan(cells, Target("Transformer", "Scheduler", {}, (site,)), Tokens(v), guided=False).flops()
    band = v * (2 * w + 1) - w * (w + 1)
    assert left.attention == pytest.approx((8 * v**2 + 4 * band + 6 * v**2 + 3 * band + 3 * v**2) / (3 * 8 * v**2))


def kept(method, tokens):
    """The query–key pairs of a method: those of its mask, all, or none."""
    if isinstance(method, Cached):
        return 0
    return int(dense_mask(tokens, method.radius if isinstance(method, Arrow) else 10**6).sum())


def multiplied(method, tokens):
    """Multiply–adds for each channel: two for each pair, of its score and its value; that of an int8 score counts half."""
    return kept(method, tokens) * (1.5 if getattr(method, "precision", "native") == "int8" else 2)


def projected(site, cell, tokens):
    """Multiply–adds of the projections of one sample: Q, K, V of the computed heads, and the output from all heads.

    K and V are all projected where several heads share them. A feed-forward in the same layers adds the site's weights.
    """
    own, sequences = tokens_of(site, tokens), sequences_of(site, tokens)
    working = [head for head, method in enumerate(by_head(cell, site.heads)) if not isinstance(method, Cached)]
    heads = max(len(working), 1) if site.separable_heads else site.heads
    image, text = own.visual * sequences * site.channels, own.text * (site.text_channels or site.channels)
    inward = (image + text) * (heads + 2 * (site.kv_heads or heads))
    outward = {"all": image + text, "visual": image, "none": 0}[site.projects_out] * site.heads
    return (inward + outward) * site.head_dim + site.weights * (own.visual * sequences + own.text)


def counted_flops(plan):
    """Fractions left of (attention, module): walk the plan, look ahead for residuals that have to be made, count pairs."""
    spent, whole = [0, 0], [0, 0]
    for row, site in enumerate(plan.target.sites):
        own, width = tokens_of(site, plan.tokens), site.head_dim * sequences_of(site, plan.tokens)
        column = tuple(cells[row] for cells in plan.cells)
        for step, cell in enumerate(column):
            everything = kept(Full(), own) * site.heads * width * plan.samples
            whole = [whole[0] + 2 * everything, whole[1] + 2 * everything + projected(site, FULL, plan.tokens) * plan.samples]
            if isinstance(cell, Reuse):
                continue
            rows = 1 if cell.share_cfg else plan.samples
            matmuls = sum(multiplied(method, own) for method in by_head(cell, site.heads)) * rows
            for what, who in made(column, step, site.heads).items():
                if what[0] == "residual":
                    matmuls += multiplied(Arrow(what[1]), own) * (1 if for_one_branch(what, who) else rows)
            matmuls *= width  # and one multiply–add for a weight and token
            spent = [spent[0] + matmuls, spent[1] + matmuls + projected(site, cell, plan.tokens) * rows]
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


@few
@given(plan=plans(), images=st.integers(1, 4), itemsize=st.sampled_from([2, 4]))
def test_the_greatest_cache_is_what_storing_and_freeing_holds(plan, images, itemsize):
    assert max(plan.cache_bytes(images, itemsize)) == max(simulated_bytes(plan, images, itemsize).peaks)


@few
@given(plan=plans(), images=st.integers(1, 4), itemsize=st.sampled_from([2, 4]))
def test_cache_of_each_step_is_what_storing_and_freeing_holds_at_any_moment(plan, images, itemsize):
    assert list(plan.cache_bytes(images, itemsize)) == simulated_bytes(plan, images, itemsize).peaks


@few
@given(plan=plans())
def test_cache_of_a_step_is_never_below_what_the_step_leaves_behind(plan):
    for peak, left in zip(plan.cache_bytes(1, 2), simulated_bytes(plan, 1, 2).ends, strict=True):
        assert peak >= left


def test_a_stored_output_counts_in_the_step_that_reads_it():
    target = Target("Transformer", "Scheduler", {}, (Site("attn", heads=2, head_dim=4, channels=8),))
    plan = Plan(((FULL,), (AST,)), target, Tokens(10), guided=True)
    assert plan.cache_bytes(images=1, itemsize=4) == (2 * 10 * 8 * 4, 2 * 10 * 8 * 4)


def test_a_plan_that_stores_nothing_holds_no_bytes():
    target = Target("Transformer", "Scheduler", {}, (DIT,))
    assert Plan(((FULL,), (ASC,), (FULL,)), target, Tokens(64), guided=True).cache_bytes() == (0, 0, 0)
