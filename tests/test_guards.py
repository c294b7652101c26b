"""What would go wrong unseen: named instead, or right all the same."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from pipelines import dit, sd3
from replay import plan as uniform_plan
from test_flux import bench as flux_fixture
from test_flux import flux_plan, random_cells
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.paired_calls import run_paired, wait_for_pair
from arrowhead.engine.site_calls import AttentionSiteCall
from arrowhead.errors import ArrowheadError, InputsInvalid, NotIntercepted
from arrowhead.evaluation.side_by_side import evaluate
from arrowhead.plans.layout import Site
from arrowhead.searches.greedy import greedy_search
from arrowhead.searches.headwise import Headwise

flux = flux_fixture


class Twice(JointAttnProcessor2_0):
    """As an IP-Adapter's: attends again, to something else."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        image, *text = super().__call__(attn, hidden_states, *args, **kwargs)
        q = torch.ones(len(hidden_states), attn.heads, 3, 8, dtype=hidden_states.dtype)
        extra = F.scaled_dot_product_attention(q, q, q).mean()
        return image + 0.1 * extra, *text


@pytest.mark.parametrize("grid", [["FFF"] * 5, ["FFF", "www", "WWW", "RRR", "FFF"]], ids=["full", "mixed"])
def test_a_processor_that_attends_twice(grid):
    bench = sd3()
    bench.attentions[1].processor = Twice()
    with left_as_it_was(bench), ah.applied(bench.pipe, uniform_plan(bench, grid)) as run:
        with pytest.raises(NotIntercepted, match="attn: Twice computes attention twice"):
            bench.pipe(**bench.inputs())
        assert run.cache_bytes == 0


@pytest.mark.parametrize("seed", range(3))
def test_projections_that_are_fused_after_the_plan_was_applied(flux, seed):
    plan = flux_plan(flux, random_cells(seed))
    with ah.applied(flux.pipe, plan):
        apart = flux.pipe(**flux.inputs())[0]
    with ah.applied(flux.pipe, plan) as run:
        flux.pipe.transformer.fuse_qkv_projections()
        fused = flux.pipe(**flux.inputs())[0]
        assert run.summary().flops.module > plan.flops().module  # what was projected after all is counted
    torch.testing.assert_close(fused, apart, rtol=1e-6, atol=1e-6)


def test_skipped_guidance_layers():
    bench = sd3()
    inputs = bench.inputs(skip_guidance_layers=[1])
    with left_as_it_was(bench):
        with pytest.raises(InputsInvalid, match="skip_guidance_layers"):
            ah.search(bench.pipe, inputs, progress=False)
        with (
            ah.applied(bench.pipe, uniform_plan(bench, ["FFF"] * 5), changes="refuse"),
            pytest.raises(InputsInvalid, match="skip_guidance_layers"),
        ):
            bench.pipe(**inputs)


@pytest.mark.parametrize("grid", [["FFF"] * 5, ["FFF", "FFF", "RRR", "WWW", "RRR"]], ids=["full", "mixed"])
def test_a_call_for_skipped_layers_runs_in_full_beside_the_plan(grid):
    """As a copy of the transformer that carries no plan gives it."""
    bench = sd3()
    transformer = bench.pipe.transformer
    untouched, forward, skipped = deepcopy(transformer), transformer.forward, []

    def by_copy(*args, **kwargs):
        if kwargs.get("skip_layers") is None:
            return forward(*args, **kwargs)
        skipped.append(kwargs["skip_layers"])
        return untouched(*args, **kwargs)

    def generate():
        return bench.pipe(
            **bench.inputs(skip_guidance_layers=[1], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.9)
        )[0]

    raw = generate()
    plan = uniform_plan(bench, grid)
    with left_as_it_was(bench), ah.applied(bench.pipe, plan) as run:
        given = generate()
        notes, flops = run.summary().notes, run.summary().flops
        assert run.cache_bytes == 0
    transformer.forward = by_copy
    with ah.applied(bench.pipe, plan):
        wanted = generate()
    del transformer.forward
    assert torch.equal(given, wanted)
    assert torch.equal(given, raw) is (grid[-1] == "FFF")
    assert skipped
    assert notes == (f"{len(skipped)} calls of the transformer beside the steps' own ran in full, and are not counted",)
    assert flops.module == pytest.approx(plan.flops().module)


@pytest.mark.parametrize("settings", [{"loss": "signed"}, {"threshold": "D6"}], ids=str)
@pytest.mark.parametrize("strategy", ["headwise", Headwise()], ids=["name", "value"])
def test_settings_of_another_strategy(strategy, settings):
    bench = dit()
    with left_as_it_was(bench), pytest.raises(InputsInvalid, match=r"greedy's"):
        ah.search(bench.pipe, bench.inputs(), strategy=strategy, progress=False, **settings)


def test_a_transformer_called_from_outside_while_it_is_searched():
    bench = dit()
    called = []

    def call(*_):
        called.append(1)
        with pytest.raises(ArrowheadError, match="called from outside while a search runs on it"):
            bench.pipe.transformer(
                torch.zeros(1, 4, 8, 8).double(), timestep=torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.long)
            )

    with left_as_it_was(bench):
        wanted = ah.search(bench.pipe, bench.inputs(), threshold=0.5, progress=False)
        found = greedy_search(driver_of(bench.pipe, bench.inputs()), threshold=0.5, on_trial=call)
        assert found.cells == wanted.cells
    assert called


def test_a_transformer_called_from_another_thread_while_it_is_searched():
    """Between two steps, where the pipeline's own next call would do."""
    bench, called = sd3(), []
    arguments = {}
    hook = bench.pipe.transformer.register_forward_pre_hook(lambda _m, _a, given: arguments.update(given), with_kwargs=True)

    def call():
        called.append(1)
        with pytest.raises(ArrowheadError, match="called from outside while a search runs on it"):
            bench.pipe.transformer.forward(**arguments)

    def elsewhere(*_):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call).result()
        return {}

    with left_as_it_was(bench):
        wanted = ah.search(bench.pipe, bench.inputs(), threshold=0.5, progress=False)
        inputs = bench.inputs(callback_on_step_end=elsewhere)
        assert ah.search(bench.pipe, inputs, threshold=0.5, progress=False).cells == wanted.cells
    hook.remove()
    assert len(called) == 5


def test_a_plan_named_as_the_baseline():
    bench = dit()
    plan = uniform_plan(bench, ["FFF"] * 5)
    with pytest.raises(InputsInvalid, match="none of them named raw"):
        evaluate(bench.pipe, {"raw": plan}, {"class_labels": [1]}, seeds=[0], progress=False)


def test_two_calls_that_bring_different_extras():
    def passing(extra):
        return lambda: wait_for_pair(
            AttentionSiteCall(Site("a", 1, 1, 1), None, None, (None, torch.zeros(1, 2, 3)), {"extra": extra})
        )

    rope = torch.rand(4, 2), torch.rand(4, 2)
    run_paired([passing(rope), passing(tuple(part.clone() for part in rope))], lambda call: call.args[1])
    for other in ((rope[0], rope[1] + 1), None, [rope[0]]):
        with pytest.raises(NotIntercepted, match="a: the two calls of a step bring arguments that differ"):
            run_paired([passing(rope), passing(other)], lambda call: call.args[1])


def test_sharing_without_guidance_is_not_counted():
    bench = dit()
    with ah.applied(bench.pipe, uniform_plan(bench, ["FFF", "CCC", "VVV", "FFF", "CCC"])) as run:
        with pytest.warns(ah.errors.ShareCfgIgnored):
            bench.pipe(**bench.inputs(guidance=1.0))
        assert not any("ASC" in name for name in run.summary().cells)
