"""Blocks and cross-attention of custom models: what is refused, searches that choose them, and torch.compile."""

from dataclasses import replace

import pytest
import torch
from authored import MODELS, dit_model, flux_model, pixart_model, wan_model

import arrowhead as ah
from arrowhead.errors import InputsInvalid, NotIntercepted, UnsupportedPipeline
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Attend, Full
from arrowhead.plans.layout import ALL_KINDS

SHARED = Attend(Full(), share_cfg=True)


def applied(own, kind, cell):
    model = own.found(ALL_KINDS).filtered(lambda site: site.kind == kind)
    cells = [[FULL] * len(model.sites), *[[cell] * len(model.sites)] * (own.steps - 1)]
    plan = ah.Plan(tuple(map(tuple, cells)), target_of(model), own.tokens, own.guided, calls=own.calls)
    return ah.applied(own.model, plan, own.adapter)


def with_blocks(own, **changes):
    return replace(own, adapter=replace(own.adapter, **changes))


def refused(own, kind, cell, error, match):
    with pytest.raises(error, match=match), applied(own, kind, cell):
        own.sample()


def test_what_a_block_is_said_to_continue_is_checked():
    own = flux_model()
    single = r"single_blocks\.\d+"
    for inputs in ("vec", "context", 1, ("x", "vec"), 7):
        wrong = with_blocks(own, blocks={single: ah.Block(inputs=inputs, joint=True)})
        refused(wrong, "block", AST, NotIntercepted, r"single_blocks\.0: got \(2, 23, 16\) from a SingleStreamBlock, wanted")
    wrong = with_blocks(own, blocks={r"double_blocks\.\d+": ah.Block(inputs="img", joint=True)})
    refused(wrong, "block", AST, NotIntercepted, r"double_blocks\.0: got \(2, 20, 16\), \(2, 3, 16\)")


@pytest.mark.parametrize("kind", ["block", "cross_attention"])
def test_what_cannot_run_for_one_branch_alone_is_refused_where_it_has_to(kind):
    """PixArt packs the texts of all samples into one row."""
    own, cross = pixart_model(), {r"blocks\.\d+\.cross_attn": "kv_linear"}
    own = replace(with_blocks(own, cross_attention=cross, blocks={r"blocks\.\d+": ah.Block()}), tokens=TEXT)
    own = with_blocks(own, tokens=lambda *_: TEXT)
    untouched = own.sample()
    with applied(own, kind, AST):
        assert not torch.equal(own.sample(), untouched)
    refused(own, kind, SHARED, NotIntercepted, r"rows of one CFG branch alone; .* share_cfg=False")
    assert torch.equal(own.sample(), untouched)


TEXT = ah.Tokens.of_grid(1, 4, 5, text=3)


def test_a_block_that_runs_alone_is_checked_without_its_sites():
    """The sites within it are another plan's, or counted once."""
    own = dit_model()
    with applied(own, "block", SHARED) as run:
        own.sample()
    assert sum(run.summary().cells.values()) == 2 * own.steps
    assert run.summary().flops == run.plan.flops()


def test_errors_of_descriptions():
    own = wan_model()
    for wrong in ({"inputs": ()}, {"inputs": -1}, {"inputs": ("x", 1.5)}, {"joint": "x"}, {"text": "("}, {"per_sample": 3}):
        with pytest.raises(InputsInvalid, match="wanted"):
            ah.Block(**wrong)
    for wrong in ({"blocks": {"x": None}}, {"blocks": "x"}, {"cross_attention": "x"}, {"cross_attention": {"x": "("}}):
        with pytest.raises(InputsInvalid, match="wanted"):
            with_blocks(own, **wrong)
    for wrong, said in (
        ({"cross_attention": {r"blocks\.\d+\.cross_attn": "x"}}, r"cross_attn: got 'x' .* wanted some of q, k, v, o"),
        ({"cross_attention": {r"blocks\.\d+\.cross_attn": ".*"}}, "and not all"),
        ({"blocks": {r"blocks\.\d+": ah.Block(joint=lambda _: 1)}}, "got 1 from joint"),
        ({"blocks": {r"blocks\.\d+(\.ffn)?": ah.Block()}}, "only blocks may be around others"),
        ({"blocks": {r"blocks\.0\.norm1": ah.Block()}}, "without linear layers for a block"),
        ({"blocks": {r"stages\.\d+": ah.Block()}}, "which no path in a WanModel matches"),
    ):
        with pytest.raises(UnsupportedPipeline, match=said):
            with_blocks(own, **wrong).found(ALL_KINDS)
    own.model.blocks[0].cross_attn.k_img = torch.nn.Linear(1, 1)
    with pytest.raises(InputsInvalid, match="image_to_video=True"):
        ah.adapters.wan().tokens(own.model, {})


@pytest.mark.parametrize(
    "name", ["flux", pytest.param("wan", marks=pytest.mark.slow), pytest.param("sd3", marks=pytest.mark.slow)]
)
def test_a_budget_reuses_blocks(name):
    own = MODELS[name]()
    own = replace(own, model=own.model.float(), steps=6)
    untouched = own.sample()
    plan = ah.search(own.model, own.sample, adapter=own.adapter, budget=ah.Budget(transformer_flops=0.5), progress=False)
    kinds = {site.kind for site, column in zip(plan.target.sites, plan.columns, strict=True) if {*column} - {FULL}}
    assert "block" in kinds
    with ah.applied(own.model, plan, own.adapter) as run:
        compressed = own.sample()
    assert run.summary().flops == plan.flops()
    error = ((compressed - untouched).norm() / untouched.norm()).item()
    assert plan.about["search"]["measured_error"] == pytest.approx(error, rel=1e-2)
    assert torch.equal(own.sample(), untouched)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self_attention", "block"])
def test_compiled_models_leave_functions_and_blocks_out_of_their_graphs(kind):
    own = flux_model()
    with applied(own, kind, AST):
        wanted = own.sample()
    compiled = torch.compile(own.model, backend="eager")
    with applied(own, kind, AST):
        torch.testing.assert_close(own.loop(_Called(own.model, compiled), steps=own.steps), wanted)
    torch.testing.assert_close(own.loop(_Called(own.model, compiled), steps=own.steps), own.sample())


class _Called:
    """The compiled model's call, with the attributes of the model."""

    def __init__(self, model, compiled):
        self._model, self._compiled = model, compiled

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, **kwargs):
        return self._compiled(**kwargs)
