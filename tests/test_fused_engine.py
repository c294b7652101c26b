"""Plans through the fused kernel, where it is asked for by name: bands, int8, residuals, cached heads."""

import torch
from launches import interpreted
from pipelines import dit
from replay import compressed, distance
from test_int8 import ROWS, replayed

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import ASC, FULL, Arrow, Attend, Cached, Full
from arrowhead.plans.layout import Tokens

pytestmark = interpreted
NEAR, FAR, WINDOW = Arrow(2, residual=True), Arrow(5, residual=True), Arrow(3)
RESIDUALS = (
    (FULL, FULL, FULL),
    (Attend(NEAR), Attend((NEAR, FAR, WINDOW)), Attend((Cached(), NEAR, Full()))),
    (Attend(FAR, share_cfg=True), Attend((Cached(), WINDOW, NEAR), share_cfg=True), ASC),
    (Attend((NEAR, Cached(), NEAR)), Attend(Cached()), Attend((FAR, NEAR, Cached()))),
)


def generated(rows):
    """The trace of a plan by the fused kernel, with the bench, the plan and the inputs that gave it."""
    bench = dit(torch.float32, attention_head_dim=64)
    target, inputs = target_of(find(bench.pipe)), {"steps": len(rows)}
    plan = ah.Plan(rows, target, Tokens(bench.visual), guided=True)
    return compressed(bench, plan, bench.inputs(**inputs), kernel="fused"), bench, plan, inputs


def test_a_plan_with_residuals_gives_what_other_kernels_give():
    """The fused kernel adds residuals while it writes; heads have residuals of different radii, or none."""
    got, bench, plan, inputs = generated(RESIDUALS)
    assert distance(got, compressed(bench, plan, bench.inputs(**inputs), kernel="chunked")) < 1e-5


def test_a_plan_in_int8_gives_nearly_what_the_formulas_give():
    """In float32 a few numbers round to the other side; the reference kernel is as far from float64."""
    got, bench, plan, inputs = generated(ROWS)
    near, native = (distance(got, replayed(bench, ROWS, plan.target, inputs, native=kind)) for kind in (False, True))
    assert near < 0.4 * native
