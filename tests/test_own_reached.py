"""How attention of one's own modules is reached, what is refused, and budgets' tables beside those of a pipeline."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from families import wan
from own import HEADS, WIDTH, Own, STDiT2, left_alone
from pipelines import dit_transformer, pixart_sigma, scheduler
from test_own import SEPARATE, fused, plan_of, sites_of
from test_refusals import SomebodysPipeline
from torch import nn

import arrowhead as ah
from arrowhead.errors import ArrowheadError, InputsInvalid, NotIntercepted, PlanMismatch, UnsupportedPipeline
from arrowhead.plans.cells import ASC, AST, FULL, Arrow, Attend, wa_rs
from arrowhead.plans.layout import ATTENTION_KINDS

PIXART = ah.Adapter(
    {r"transformer_blocks\.\d+\.attn1": ah.Attention(heads="heads")},
    tokens=lambda _, call: ah.Tokens(call["hidden_states"][0, 0].numel() // 4),
    cfg="uncond_first",
    feed_forward=r"transformer_blocks\.\d+\.ff",
    guidance_scale=3.0,
    latent_channels=4,
)
EXTENT = ah.Extent(kinds=("self_attention", "feed_forward"), radii=(2, 5))


def as_own(bench):
    """A pipeline as a mere callable."""
    return lambda: bench.pipe(**bench.inputs(images=2))[0]


def test_a_table_is_the_pipeline_s():
    """The same model through its pipeline and through an adapter; the loop is replayed, the scheduler stepped by hand."""
    bench = pixart_sigma()
    bench.pipe.scheduler = DDIMScheduler(clip_sample=False)
    wanted = ah.calibrate(bench.pipe, bench.inputs(images=2), extent=EXTENT, progress=False)
    given = ah.calibrate(bench.pipe.transformer, as_own(bench), adapter=PIXART, extent=EXTENT, progress=False)
    assert given.target.sites == wanted.target.sites
    torch.testing.assert_close(given.outputs, wanted.outputs)
    torch.testing.assert_close(given.residuals, wanted.residuals)
    assert given.final == pytest.approx(wanted.final)
    assert given.other_flops == pytest.approx(wanted.other_flops)
    assert given.model_feedback == pytest.approx(wanted.model_feedback, rel=1e-3)
    assert given.sampler_gains == pytest.approx(wanted.sampler_gains, rel=1e-3)


def test_gains_of_a_scheduler_with_a_memory():
    """What the sampler makes of an error is measured, whatever it remembers."""
    bench = pixart_sigma()
    extent = replace(EXTENT, feedback=0.0)
    wanted = ah.calibrate(bench.pipe, bench.inputs(images=2), extent=extent, progress=False)
    given = ah.calibrate(bench.pipe.transformer, as_own(bench), adapter=PIXART, extent=extent, progress=False)
    assert given.sampler_gains == pytest.approx(wanted.sampler_gains, rel=1e-3)


@pytest.mark.parametrize("strategy", ["greedy", "headwise"])
def test_searches_find_what_they_find_through_the_pipeline(strategy):
    bench = pixart_sigma()
    settings = {"strategy": strategy, "threshold": 0.6, "progress": False}
    wanted = ah.search(bench.pipe, bench.inputs(images=2), **settings)
    given = ah.search(bench.pipe.transformer, as_own(bench), adapter=PIXART, **settings)
    assert given.cells == wanted.cells
    assert len({cell for row in given.cells for cell in row}) > 2
    with ah.applied(bench.pipe.transformer, given, PIXART):
        through_the_model = as_own(bench)()
    with ah.applied(bench.pipe, wanted) as run:
        with pytest.raises(ArrowheadError, match="got step 0 in a pipeline's run"):
            run.step(0)
        torch.testing.assert_close(through_the_model, as_own(bench)(), rtol=1e-8, atol=1e-8)


def test_two_calls_of_one_s_own():
    """Wan's sampler calls its transformer twice a step, conditional first, which its pipeline's search knows."""
    bench = wan()
    adapter = ah.Adapter(
        {r"blocks\.\d+\.attn1": ah.Attention(heads="heads")},
        tokens=lambda _, call: ah.Tokens(call["hidden_states"][0, 0].numel() // 4),
        cfg="two_calls",
    )
    settings = {"threshold": 0.6, "progress": False}
    wanted = ah.search(bench.pipe, bench.inputs(), **settings)
    given = ah.search(bench.pipe.transformer, lambda: bench.pipe(**bench.inputs())[0], adapter=adapter, **settings)
    assert given.cells == wanted.cells
    assert given.calls == 2
    assert wanted.flops().attention < 1


def some_plan(own):
    sites = sites_of(own)
    row = [wa_rs(2), ASC] * len(sites)
    return plan_of(own, [[FULL] * len(sites)] + [row[: len(sites)]] * (own.steps - 2) + [[AST] * len(sites)])


def test_a_forward_of_one_s_own_is_as_good_as_parts():
    """The same attention, told in another way, gives the same plan and the same video."""
    own = fused()
    for block in own.model.blocks:
        block.attn.processor = "what diffusers calls so is something else"

    def forward(module, attend, x):
        return module.joined(attend(*module.projected(x)))

    told = replace(
        own, adapter=replace(own.adapter, attention={r"blocks\.\d+\.attn": ah.Attention(over="space", forward=forward)})
    )
    videos = []
    for each in (own, told):
        plan = some_plan(each)
        with ah.applied(each.model, plan, each.adapter):
            videos.append(each.sample())
    torch.testing.assert_close(*videos)
    assert not torch.allclose(videos[0], own.sample(), rtol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotary_first": False},
        {"rotary": None},
        {"q_norm": None},
        {"qkv": "proj"},
    ],
    ids=str,
)
def test_parts_that_do_not_make_the_module_are_refused(wrong):
    own = fused(temporal=True)
    turned = replace(own.adapter.attention[r"blocks\.\d+\.attn_temp"], **wrong)
    own = replace(own, adapter=replace(own.adapter, attention={r"blocks\.\d+\.attn_temp": turned}))
    before = left_alone(own.model)
    with pytest.raises((NotIntercepted, RuntimeError)) as caught:
        ah.search(own.model, own.sample, adapter=own.adapter, threshold="D4", progress=False)
    if wrong != {"qkv": "proj"}:
        assert "blocks.0.attn_temp" in str(caught.value)
        assert "order of norms and rotary" in str(caught.value)
    assert left_alone(own.model) == before


def test_attention_that_no_function_computes_is_not_silently_full():
    own = Own(STDiT2(), replace(SEPARATE, cfg="cond_first", attention={r"blocks\.\d+\.attn": ah.Attention(over="space")}))
    with pytest.raises(NotIntercepted, match=r"blocks.0.attn: SelfAttention did not call .*give arrowhead.Attention a forward"):
        ah.search(own.model, own.sample, adapter=own.adapter, threshold="D4", progress=False)
    with ah.applied(own.model, some_plan(own), own.adapter), pytest.raises(NotIntercepted, match="did not call"):
        own.sample()


def test_modules_and_adapters_go_together():
    own = fused()
    plan = some_plan(own)
    for refused in (
        lambda: ah.apply(own.model, plan),
        lambda: ah.search(own.model, own.sample, progress=False),
        lambda: ah.calibrate(own.model, own.sample, progress=False),
    ):
        with pytest.raises(UnsupportedPipeline, match=r"STDiT2, a module, without an adapter; wanted .*Adapter"):
            refused()
    pipe = pixart_sigma().pipe
    with pytest.raises(UnsupportedPipeline, match="of a pipeline give its transformer"):
        ah.apply(pipe, plan, own.adapter)
    with pytest.raises(InputsInvalid, match="got inputs of type dict, wanted a callable"):
        ah.search(own.model, {"steps": 5}, adapter=own.adapter)
    with pytest.raises(InputsInvalid, match="wanted a mapping"):
        ah.search(pipe, own.sample)


@pytest.mark.parametrize("unknown", [SimpleNamespace, SomebodysPipeline], ids=lambda cls: cls.__name__)
def test_what_is_unknown_is_told_of_adapters(unknown):
    class NobodysTransformer(nn.Module):
        """Of no family."""

    known = unknown is SomebodysPipeline
    pipe = unknown(transformer=dit_transformer() if known else NobodysTransformer(), scheduler=scheduler())
    with pytest.raises(UnsupportedPipeline, match=r"^describe the transformer with an arrowhead\.Adapter"):
        ah.apply(pipe, some_plan(fused()))


def test_patterns_and_sizes_that_fit_nothing():
    own = fused()
    with pytest.raises(UnsupportedPipeline, match=r"'blocks\.attn', which no path in a STDiT2 matches"):
        ah.search(own.model, own.sample, adapter=replace(own.adapter, attention={"blocks.attn": ah.Attention()}))
    odd = {r"blocks\.\d+\.attn": ah.FusedQKV(heads=5)}
    with pytest.raises(UnsupportedPipeline, match=r"blocks.0.attn: got linear layers .* for 5 heads"):
        ah.search(own.model, own.sample, adapter=replace(own.adapter, attention=odd))
    wide = {r"blocks\.\d+\.attn": ah.FusedQKV(head_dim=WIDTH, channels=WIDTH)}
    with pytest.raises(UnsupportedPipeline, match=r"blocks.0.attn: got .* 1024 weights in linear layers, wanted 2048"):
        ah.search(own.model, own.sample, adapter=replace(own.adapter, attention=wide))
    sized = {r"blocks\.\d+\.attn": ah.FusedQKV(heads=HEADS, head_dim=WIDTH // HEADS, channels=WIDTH)}
    (first, *_) = sites_of(replace(own, adapter=replace(own.adapter, attention=sized)), ATTENTION_KINDS)
    assert (first.heads, first.head_dim, first.channels) == (HEADS, WIDTH // HEADS, WIDTH)


@pytest.mark.parametrize("wrong", ["half of them", "twice as many", "one sequence"])
def test_tokens_that_are_not_those_attended_over_are_refused(wrong):
    """Kernels would not notice, and costs be those of something else."""
    own = fused()
    visual = {"half of them": own.tokens.visual // 2, "twice as many": 2 * own.tokens.visual}.get(wrong, own.tokens.visual)
    tokens = ah.Tokens(visual, frames=1 if wrong == "one sequence" else own.frames)
    own = replace(own, adapter=replace(own.adapter, tokens=lambda *_: tokens))
    sites = sites_of(own)
    cells = [[FULL] * len(sites)] + [[Attend(Arrow(2))] * len(sites)] * (own.steps - 1)
    plan = replace(plan_of(own, cells), tokens=tokens)
    with (
        ah.applied(own.model, plan, own.adapter),
        pytest.raises(PlanMismatch, match=r"got \(2, 10, 10, 8\), wanted .* `head_dim` of the adapter"),
    ):
        own.sample()


def test_loops_that_budgets_cannot_go_by():
    own = fused(torch.float32)
    generator = torch.Generator().manual_seed(0)

    def other_noise():
        return own.sample(int(torch.randint(1000, (), generator=generator)))

    with pytest.raises(InputsInvalid, match=r"others by .* when the loop runs again"):
        ah.search(own.model, other_noise, adapter=own.adapter, budget=ah.Budget(module_flops=0.5), progress=False)
    with pytest.raises(InputsInvalid, match="got a tuple from the callable"):
        ah.calibrate(own.model, lambda: (own.sample(),), adapter=own.adapter, progress=False)


def test_a_loop_in_inference_mode():
    """Nothing that a search needs is lost there, gradients neither."""
    own, how = fused(), {"budget": ah.Budget(module_flops=0.5), "progress": False}
    wanted = ah.search(own.model, own.sample, adapter=own.adapter, **how)
    given = ah.search(own.model, torch.inference_mode()(own.sample), adapter=own.adapter, **how)
    assert given.cells == wanted.cells
    assert not torch.is_inference_mode_enabled()
