"""IP-Adapters: a module's attention is a site, and what it attends to an image prompt besides runs as it is."""

import pytest
import torch
from family_bench import FamilyBench
from family_replay import random_cells, replaying
from image_prompts import image_prompts, put_ip_adapter
from matrix import combines
from pipelines import CAPTION
from replay import assert_identical, distance, trace
from subjects import STEPS, subject
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import ProcessorReplaced, SiteNotReached
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL
from arrowhead.plans.layout import ATTENTION_KINDS

GROUP = "Processors"
PIPELINES = {"sd3": "works", "flux": "works"}
ORDERS = {"sd3": {"conditional_first": False}, "flux": {"conditional_first": True, "two_calls": True, "text_first": True}}
GUIDED = ATTENTION_KINDS | {"feed_forward"}


def adapted(mechanism, dtype=torch.float64):
    """A bench with an IP-Adapter, whose calls have image prompts."""
    here = subject(mechanism, dtype)
    put_ip_adapter(here.transformer, dtype)

    def inputs(seed=0, images=1, **more):
        return here.inputs(seed, images=images, **image_prompts(here.pipe, seed), **more)

    return FamilyBench(here.pipe, visual=16, inputs=inputs, text=CAPTION[0], **ORDERS[mechanism])


def plan_of(bench, model, cells):
    return ah.Plan(tuple(map(tuple, cells)), target_of(model), bench.tokens, guided=True, calls=1 + bench.two_calls)


def generate(bench, *args, **inputs):
    return bench.pipe(**bench.inputs(*args, **inputs))[0].clone()


@combines(GROUP, "an IP-Adapter, loaded before the plan", PIPELINES)
def test_a_full_plan_changes_no_bit(mechanism, outcome):
    bench = adapted(mechanism, torch.float32)
    model = find(bench.pipe, GUIDED)
    untouched = trace(bench, bench.inputs(images=2))
    plan = plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS)
    with left_as_it_was(bench, images=2), ah.applied(bench.pipe, plan) as run:
        assert_identical(trace(bench, bench.inputs(images=2)), untouched)
        assert run.summary().notes == ()


@combines(GROUP, "an IP-Adapter, loaded before the plan", PIPELINES)
@pytest.mark.parametrize("kinds", [GUIDED, {"block"}], ids=["modules", "blocks"])
def test_random_plans_are_what_a_replay_gives(mechanism, outcome, kinds):
    """A repeated output is the whole output, the image prompt's part included; a cached head is one of the site's attention."""
    bench = adapted(mechanism)
    model = find(bench.pipe, kinds)
    cells = random_cells(1, model.sites, STEPS, share=True)
    plan, inputs = plan_of(bench, model, cells), {"seed": 1, "images": 2}
    with ah.applied(bench.pipe, plan) as run:
        given, summary = trace(bench, bench.inputs(**inputs)), run.summary()
    with replaying(bench, model.modules, cells, guided=True) as sites:
        wanted = trace(bench, bench.inputs(**inputs))
    assert distance(given, wanted) < 1e-5
    assert distance(given, trace(bench, bench.inputs(**inputs))) > 1e-2
    assert all(site.passed == len(site.column) * plan.calls for site in sites)
    assert summary.notes == ()
    assert summary.flops.module == pytest.approx(plan.flops().module)


@combines(GROUP, "an IP-Adapter in a search", PIPELINES)
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "headwise", "threshold": 0.5},
        pytest.param({"strategy": "greedy", "threshold": 0.5}, marks=pytest.mark.slow),
        pytest.param({"budget": ah.Budget(module_flops=0.6), "extent": ah.Extent(gradients=False)}, marks=pytest.mark.slow),
        pytest.param({"budget": ah.Budget(transformer_flops=0.6)}, marks=pytest.mark.slow),
    ],
    ids=["headwise", "greedy", "by random vectors", "by gradients"],
)
def test_searches_compress_and_their_plans_run(mechanism, outcome, settings):
    bench = adapted(mechanism)
    with left_as_it_was(bench):
        plan = ah.search(bench.pipe, bench.inputs(), progress=False, **settings)
    with ah.applied(bench.pipe, plan) as run:
        generate(bench)
        assert run.summary().flops.module == pytest.approx(plan.flops().module)
        assert run.summary().flops.module < 1
        assert run.summary().notes == ()


@combines(GROUP, "an IP-Adapter, by a plan that was found without one", PIPELINES)
def test_a_plan_that_was_found_without(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(3)
    bench = adapted(mechanism)
    with_it = plan_of(bench, find(bench.pipe), plan.cells)
    given = []
    for each in (plan, with_it):
        with ah.applied(bench.pipe, each):
            given.append(generate(bench, 1))
    assert torch.equal(*given)


FULL_THERE = "works: full attention there, with a warning as the next generation begins"


@combines(GROUP, "an IP-Adapter, loaded or unloaded while a plan is applied", {"sd3": FULL_THERE, "flux": FULL_THERE})
def test_loaded_and_unloaded_while_a_plan_is_on(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(3)
    plain, wanted = here.generate(1), here.compressed(plan, 1)
    run = ah.apply(here.pipe, plan)
    put_ip_adapter(here.transformer)
    prompts = image_prompts(here.pipe, 1)
    for _ in range(2):
        with pytest.warns(ProcessorReplaced), pytest.warns(SiteNotReached):
            loaded = here.generate(1, **prompts)
    with pytest.warns(ProcessorReplaced):
        run.close()
    assert torch.equal(here.generate(1, **prompts), loaded)
    run = ah.apply(here.pipe, plan)
    assert not torch.equal(here.generate(1, **prompts), loaded)
    here.pipe.unload_ip_adapter()
    with pytest.warns(ProcessorReplaced), pytest.warns(SiteNotReached):
        assert torch.equal(here.generate(1), plain)
    with pytest.warns(ProcessorReplaced):
        run.close()
    assert torch.equal(here.generate(1), plain)
    assert torch.equal(here.compressed(plan, 1), wanted)


@pytest.mark.slow
@combines(GROUP, "an IP-Adapter under torch.compile", PIPELINES)
def test_compiled(mechanism, outcome):
    bench = adapted(mechanism)
    model = find(bench.pipe, GUIDED)
    plan = plan_of(bench, model, random_cells(1, model.sites, STEPS, share=True))
    with ah.applied(bench.pipe, plan):
        wanted = generate(bench, 1)
    bench.pipe.transformer.compile(backend="eager")
    with ah.applied(bench.pipe, plan):
        given = generate(bench, 1)
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)
