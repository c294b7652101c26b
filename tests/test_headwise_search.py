"""DiTFastAttnV2's search: its errors, its choices and its trajectory, against a calculation by hand."""

from dataclasses import replace

import pytest
import torch
from pipelines import dit, pixart_sigma
from torch import Tensor
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.errors import InputsInvalid, NothingCompressed
from arrowhead.metrics.error import relative_squared_error
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL, Arrow, Cached, Full
from arrowhead.plans.layout import Tokens
from arrowhead.searches.headwise import Headwise, _savings, headwise_search

EVERYTHING = Headwise(radii=(1, 3), share_cfg=True, residual=True)


def outputs_of(pipe, call):
    """What the transformer gives in each step while `call` runs: the output of its last layer."""
    seen: list[Tensor] = []
    last = list(pipe.transformer.children())[-1]
    hook = last.register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    try:
        return call(), seen
    finally:
        hook.remove()


def searched(bench, settings=EVERYTHING, threshold=1.0, **inputs):
    return outputs_of(
        bench.pipe,
        lambda: ah.search(bench.pipe, bench.inputs(**inputs), strategy=settings, threshold=threshold, progress=False),
    )


@pytest.mark.parametrize("settings", [Headwise(), Headwise(residual=True), EVERYTHING, Headwise(caching=False)], ids=str)
@pytest.mark.parametrize("threshold", [0.2, 1.0])
def test_the_plan_gives_what_the_search_saw(either, settings, threshold):
    """The search goes on with compressed outputs: those that the plan gives afterwards."""
    settings = replace(settings, radii=(1, 3))
    plan, seen = searched(either, settings, threshold, images=2)
    with ah.applied(either.pipe, plan):
        _, given = outputs_of(either.pipe, lambda: either.pipe(**either.inputs(images=2)))
    assert len(seen) == len(given) == plan.steps
    assert plan.flops().module < 1
    for a, b in zip(seen, given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_errors_stay_within_the_threshold_and_first_steps_are_full(either):
    choices = []
    headwise_search(driver_of(either.pipe, either.inputs()), threshold=0.7, settings=EVERYTHING, on_choice=choices.append)
    assert [choice.cell for choice in choices if choice.step == 0] == [FULL] * either.layers
    assert all(choice.error <= 0.7 for choice in choices)
    assert any(choice.error > 0 for choice in choices)
    assert len(choices) == 5 * either.layers


def test_the_choice_of_a_step_by_hand():
    """One layer, two steps: the errors of the second follow from the first one's outputs, and so does the best choice."""
    bench = dit(num_layers=1)
    (attn,) = bench.attentions
    inputs: list[Tensor] = []
    hook = attn.register_forward_pre_hook(lambda _m, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    plan = ah.search(
        bench.pipe,
        bench.inputs(steps=2),
        strategy=Headwise(radii=(2,), prefilter=None),
        threshold=0.9,
        progress=False,
    )
    hook.remove()

    def heads(x):
        return [linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)]

    def attention(x, radius):
        q, k, v = heads(x)
        i = torch.arange(x.shape[1])
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill((i[:, None] - i).abs() > radius, -torch.inf)
        return scores.softmax(-1) @ v

    before, x = inputs
    full, band, kept = attention(x, 99), attention(x, 2), attention(before, 99)
    spread = ((full - full.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3))
    errors = torch.stack([((other - full) ** 2).mean((0, 2, 3)) / spread for other in (band, kept)], 1).tolist()
    n, d, c = x.shape[1], full.shape[-1], x.shape[-1]
    pairs = sum(min(n - 1, j + 2) - max(0, j - 2) + 1 for j in range(n))
    gains = {"full": 0, "band": 4 * d * (n * n - pairs), "kept": 4 * d * n * n + 6 * c * d * n}
    best, wanted = (-1, 0.0), None
    for a in gains:
        for b in gains:
            for third in gains:
                names = (a, b, third)
                error = sum(0 if m == "full" else errors[h][m == "kept"] for h, m in enumerate(names))
                if error <= 0.9 and (value := (sum(gains[m] for m in names), -error)) > best:
                    best, wanted = value, names
    spelled = {Full(): "full", Arrow(2): "band", Cached(): "kept"}
    assert tuple(spelled[m] for m in plan.cells[1][0].methods(3)) == wanted


def test_a_candidate_above_its_share_is_dropped_beforehand():
    """With a prefilter far below 1 nothing with an error is left; without one, more is saved than with it."""
    bench = dit()
    with pytest.warns(NothingCompressed):
        assert searched(bench, Headwise(prefilter=1e-9))[0].flops().module == 1
    tight = searched(bench, Headwise(radii=(1, 3), prefilter=0.5), 0.8)[0].flops().module
    loose = searched(bench, Headwise(radii=(1, 3), prefilter=None), 0.8)[0].flops().module
    assert loose < tight < 1


def test_threshold_zero_is_the_full_plan(either):
    plan = searched(either, EVERYTHING, 0.0)[0]
    assert all(cell == FULL for row in plan.cells for cell in row)


def test_sharing_needs_guidance(either):
    plan = searched(either, EVERYTHING, 5.0, guidance=1.0)[0]
    assert not any(getattr(cell, "share_cfg", False) for row in plan.cells for cell in row)


@pytest.mark.parametrize("settings", [EVERYTHING, Headwise(savings="paper", radii=(2,))], ids=str)
def test_nothing_else_changes(either, settings):
    with left_as_it_was(either):
        searched(either, settings)


def test_savings_are_what_the_plan_counts():
    """The sum over heads and the constant are the difference of FLOPs between the full cell and the cell."""
    bench = pixart_sigma()
    plan = searched(bench, Headwise(radii=(1, 3), share_cfg=True), 0.8, steps=2)[0]
    site, tokens = plan.target.sites[0], plan.tokens
    settings = Headwise(radii=(1, 3), share_cfg=True)
    methods = settings.methods(tokens)
    for share in (False, True):
        gains, constant = _savings(settings, site, tokens, methods, share)
        picked = [methods[h % len(methods)] for h in range(site.heads)]
        cell = ah.Plan(((FULL,), (type(FULL)(tuple(picked), share),)), replace(plan.target, sites=(site,)), tokens, True)
        whole = 2 * 2 * site.heads * (4 * site.head_dim * tokens.total**2 + 8 * site.channels * site.head_dim * tokens.total)
        saved = sum(gains[methods.index(method)] for method in picked) + constant
        assert cell.flops().module * whole == pytest.approx(whole - saved, rel=1e-12)


def test_the_paper_s_savings():
    tokens = Tokens(64, 16)
    site = replace(find(dit().pipe).sites[0], joint=True)
    methods = (Full(), Arrow(8), Cached())
    alone, _ = _savings(Headwise(savings="paper"), site, tokens, methods, False)
    shared, _ = _savings(Headwise(savings="paper"), site, tokens, methods, True)
    arrow = ((64 - 8) / 80) ** 2
    assert [gain / 1e9 for gain in alone] == pytest.approx([0, arrow, 1])
    assert [gain / 1e9 for gain in shared] == pytest.approx([0.5, 1 - (1 - arrow) / 2, 1])


def test_the_error_of_a_head_is_its_mean_square_by_its_variance():
    full, other = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for head, error in enumerate(relative_squared_error(full, other).tolist()):
        a, b = full[:, head].flatten().tolist(), other[:, head].flatten().tolist()
        mean = sum(a) / len(a)
        assert error == pytest.approx(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / sum((x - mean) ** 2 for x in a))
    constant = torch.ones(1, 1, 3, 2)
    assert relative_squared_error(constant, constant).tolist() == [0]
    assert relative_squared_error(constant, 2 * constant).tolist() == [float("inf")]


@pytest.mark.parametrize(
    "settings", [{"radii": (-1,)}, {"radii": (2.5,)}, {"prefilter": 0}, {"prefilter": -1.0}, {"savings": "time"}]
)
def test_settings_that_mean_nothing(settings):
    with pytest.raises(InputsInvalid, match=f"got {next(iter(settings))}=.*wanted"):
        Headwise(**settings)
