"""torch.compile, before or after a plan is put on: how many graphs there are, and that they give what uncompiled models give.

Graphs are counted where torch hands them to a backend, which runs them as they are: so results are the same to the last bit.
"""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from matrix import combines, states
from own import Own, STDiT2
from pipelines import dit
from subjects import STEPS, Subject, subject
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import arrowhead as ah
from arrowhead.engine import compile_boundary
from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.plans.cells import Reuse

GRAPHS = {"sd3": 2, "flux": 3, "own": 1}
"""Of the subjects' blocks without a plan: one for each form of a block, and of what it is given."""
GROUP = "torch.compile"


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of other tests, and nothing in the registry afterwards."""
    torch.compiler.reset()
    before = {*compile_boundary._registry}
    yield
    assert not {*compile_boundary._registry} - before
    torch.compiler.reset()


@pytest.fixture
def counter():
    return CompileCounterWithBackend("eager")


def blocks_of(model):
    lists = (getattr(model, name, ()) for name in ("blocks", "transformer_blocks", "single_transformer_blocks"))
    return [block for blocks in lists for block in blocks]


def compile_blocks(model, backend, *, fullgraph=True):
    """As diffusers' compile_repeated_blocks does, which SD3 has no list for."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=fullgraph, backend=backend)
        return
    for block in blocks_of(model):
        block.compile(fullgraph=fullgraph, backend=backend)


def compile_whole(model, backend):
    model.compile(fullgraph=True, backend=backend)


def two_plans(here, **settings):
    """With more cells than torch compiles anew for one place in the code."""
    plans = [here.plan(seed, **settings) for seed in (1, 2)]
    assert len({cell for plan in plans for row in plan.cells for cell in row}) > torch._dynamo.config.recompile_limit
    return plans


def compiled_first(here, compile_, counter, graphs):
    """So many graphs without a plan, as many at most with one, of all plans and seeds; and the same results."""
    plans, plain = two_plans(here), here.generate(5)
    wanted = [here.compressed(plan, seed) for seed, plan in enumerate(plans)]
    compile_(here.transformer, counter)
    assert torch.equal(here.generate(5), plain)
    assert counter.frame_count == graphs
    for _ in range(2):
        for seed, plan in enumerate(plans):
            assert torch.equal(here.compressed(plan, seed), wanted[seed])
            assert not torch.equal(wanted[seed], here.generate(seed))
    made = counter.frame_count
    assert graphs < made <= 2 * graphs
    assert torch.equal(here.generate(5), plain)
    assert counter.frame_count == made


def compiled_later(here, compile_, counter, graphs):
    """While a plan is applied."""
    plans, plain = two_plans(here), here.generate(5)
    wanted = [here.compressed(plan, seed) for seed, plan in enumerate(plans)]
    with here.applied(plans[0]) as run:
        assert torch.equal(here.generate(0), wanted[0])
        compile_(here.transformer, counter)
        assert torch.equal(here.generate(0), wanted[0])
        assert not run.summary().notes
    assert 0 < counter.frame_count <= graphs
    assert torch.equal(here.compressed(plans[1], 1), wanted[1])
    assert counter.frame_count <= graphs
    assert torch.equal(here.generate(5), plain)
    assert counter.frame_count <= 2 * graphs


def outcomes(graphs):
    return {name: f"works: {count} graphs untouched, at most {2 * count} in all" for name, count in graphs.items()}


@combines(GROUP, "`compile_repeated_blocks(fullgraph=True)`, then plans in turn", outcomes(GRAPHS))
def test_blocks_before(mechanism, outcome, counter):
    compiled_first(subject(mechanism), compile_blocks, counter, GRAPHS[mechanism])


@combines(GROUP, "`compile_repeated_blocks(fullgraph=True)` while a plan is applied", outcomes(GRAPHS))
def test_blocks_after(mechanism, outcome, counter):
    compiled_later(subject(mechanism), compile_blocks, counter, GRAPHS[mechanism])


WHOLE = outcomes(dict.fromkeys(GRAPHS, 1))
TOO_LATE = "refused: the model is called before the plan can notice; compile first, say `run.step(0)`, or without `fullgraph`"


@combines(GROUP, "`transformer.compile(fullgraph=True)`, then plans in turn", WHOLE)
def test_whole_before(mechanism, outcome, counter):
    compiled_first(subject(mechanism), compile_whole, counter, 1)


@combines(GROUP, "`transformer.compile(fullgraph=True)` while a plan is applied", WHOLE | {"own": TOO_LATE})
def test_whole_after(mechanism, outcome, counter):
    here = subject(mechanism)
    if not outcome.startswith("refused"):
        compiled_later(here, compile_whole, counter, 1)
        return
    plain, plan = here.generate(5), here.plan(1)
    wanted = here.compressed(plan, 0)
    with here.applied(plan) as run:
        compile_whole(here.transformer, counter)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model itself, before the plan is applied"):
            here.generate(0)
        assert torch.equal(Own(here.transformer, here.adapter).sample(0, run, by_call=True), wanted)
        assert counter.frame_count == 1
    assert torch.equal(here.generate(5), plain)


def hidden(here, counter):
    """The subject with a transformer that torch.compile hides."""
    if here.adapter is None:
        here.pipe.transformer = torch.compile(here.pipe.transformer, fullgraph=True, backend=counter)
        return here
    loop = Own(torch.compile(here.transformer, fullgraph=True, backend=counter), here.adapter)
    sample = lambda seed=0: loop.sample(seed, by_call=True)  # noqa: E731
    return Subject(loop.model, here.transformer, here.tokens, sample, here.adapter)


@combines(GROUP, "`pipe.transformer = torch.compile(pipe.transformer)`, or a plan on `torch.compile(model)`", WHOLE)
def test_hidden_by_compile(mechanism, outcome, counter):
    here = subject(mechanism)
    plans, plain = two_plans(here), here.generate(5)
    wanted = [here.compressed(plan, seed) for seed, plan in enumerate(plans)]
    here = hidden(here, counter)
    own = vars(here.transformer).copy()
    assert torch.equal(here.generate(5), plain)
    for _ in range(2):
        for seed, plan in enumerate(plans):
            assert torch.equal(here.compressed(plan, seed), wanted[seed])
    assert torch.equal(here.generate(5), plain)
    assert counter.frame_count == 2
    assert vars(here.transformer) == own


@states(GROUP, "`pipe.transformer = torch.compile(...)` while a plan is applied", mechanism="processor with SDPA")
def test_hidden_while_applied(counter):
    here = subject("sd3")
    plan, plain = here.plan(1), here.generate(5)
    wanted = here.compressed(plan, 0)
    with here.applied(plan):
        here.generate(3)
        hidden(here, counter)
        assert torch.equal(here.generate(0), wanted)
    assert torch.equal(here.generate(5), plain)
    assert counter.frame_count == 2


@states(GROUP, "blocks that are `torch.compile(block)`", mechanism="custom model")
def test_hidden_blocks(counter):
    here = subject("own")
    plan, plain = here.plan(1, {"self_attention", "feed_forward"}), here.generate(5)
    wanted = here.compressed(plan, 0)
    for i, block in enumerate(here.transformer.blocks):
        here.transformer.blocks[i] = torch.compile(block, fullgraph=True, backend=counter)
    assert here.plan(1, {"self_attention", "feed_forward"}) == plan
    assert torch.equal(here.compressed(plan, 0), wanted)
    assert torch.equal(here.generate(5), plain)
    assert counter.frame_count == 2


@pytest.mark.parametrize("compile_", [compile_blocks, compile_whole])
@combines(GROUP, "plans that skip whole blocks", {"sd3": "works", "flux": "works"})
def test_blocks_that_a_plan_skips(mechanism, outcome, compile_, counter):
    """Compiled by themselves they are run, or not, as they are, perhaps for half a batch. Within a graph they run eagerly."""
    here = subject(mechanism)
    plan, plain = here.plan(1, {"block"}), here.generate(5)
    wanted = here.compressed(plan, 0)
    assert any(isinstance(cell, Reuse) for row in plan.cells for cell in row)
    compile_(here.transformer, counter)
    assert torch.equal(here.generate(5), plain)
    graphs = counter.frame_count
    with here.applied(plan) as run:
        for _ in range(2):
            assert torch.equal(here.generate(0), wanted)
        assert not run.summary().notes
    assert counter.frame_count <= 2 * graphs
    assert torch.equal(here.generate(5), plain)
    with here.applied(plan):  # compiled again meanwhile
        here.generate(1)
        compile_(here.transformer, counter)
        assert torch.equal(here.generate(0), wanted)
        outside = [hasattr(block._compiled_call_impl, "arrowhead_around") for block in blocks_of(here.transformer)]
        assert all(outside) if compile_ is compile_blocks else not any(outside)
    assert torch.equal(here.generate(5), plain)


@pytest.mark.parametrize("compile_", [compile_blocks, compile_whole])
@combines(GROUP, "a plan on another pipeline of the same family", "works: no new graph")
def test_a_plan_elsewhere(mechanism, outcome, compile_, counter):
    """What a plan changes is its pipeline's own: graphs of a pipeline beside it stay valid."""
    there, here = subject(mechanism), subject(mechanism)
    compile_(there.transformer, counter)
    wanted, plan = there.generate(5), here.plan(1)
    graphs = counter.frame_count
    with here.applied(plan):
        assert torch.equal(there.generate(5), wanted)
        here.generate(0)
        assert torch.equal(there.generate(5), wanted)
    assert torch.equal(there.generate(5), wanted)
    here.search(threshold=0.3)
    assert torch.equal(there.generate(5), wanted)
    assert counter.frame_count == graphs > 0


@states(GROUP, "feed-forwards that are compiled by themselves", mechanism="custom model")
def test_feed_forwards_compiled_by_themselves(counter):
    here = subject("own")
    for block in here.transformer.blocks:
        block.mlp = Widening(block.mlp, nn.Identity())  # torch makes no graph of a Sequential by itself
    plan, plain = here.plan(1, {"self_attention", "feed_forward"}), here.generate(5)
    wanted = here.compressed(plan, 0)
    for when in ("before", "meanwhile"):
        for block in here.transformer.blocks if when == "before" else ():
            block.mlp.compile(fullgraph=True, backend=counter)
        before = [vars(block.mlp).copy() for block in here.transformer.blocks]
        with here.applied(plan):
            assert torch.equal(here.generate(0), wanted)
            for block in here.transformer.blocks if when == "meanwhile" else ():
                block.mlp.compile(fullgraph=True, backend=counter)
            assert torch.equal(here.generate(0), wanted)
        if when == "before":
            assert [vars(block.mlp) for block in here.transformer.blocks] == before
        assert torch.equal(here.generate(5), plain)
    assert 0 < counter.frame_count <= 3  # a batch, half of one, and any


@states(GROUP, "ten blocks are one graph", "works: 1 graph without a plan, 2 in all")
@pytest.mark.parametrize("own", [False, True])
def test_many_blocks(own, counter):
    if own:
        loop = Own(STDiT2(layers=10).double(), ah.open_sora(guidance_scale=3.0))
        sample = lambda seed=0: loop.sample(seed, by_call=True)  # noqa: E731
        here = Subject(loop.model, loop.model, loop.tokens, sample, loop.adapter)
    else:
        bench = dit(num_layers=10)
        sample = lambda seed=0: torch.as_tensor(bench.pipe(**bench.inputs(seed, steps=STEPS))[0])  # noqa: E731
        here = Subject(bench.pipe, bench.pipe.transformer, ah.Tokens(bench.visual), sample)
    plan = here.plan(1)
    wanted, plain = here.compressed(plan, 0), here.generate(5)
    for block in blocks_of(here.transformer):
        block.compile(fullgraph=True, backend=counter)
    assert torch.equal(here.generate(5), plain)
    graphs = counter.frame_count
    assert torch.equal(here.compressed(plan, 0), wanted)
    assert counter.frame_count == 2 * graphs


@combines(GROUP, "`summary()`, and torch's counter of FLOPs (without `fullgraph`)")
def test_counters(mechanism, outcome, counter):
    here = subject(mechanism)
    plan = here.plan(1)
    found = []
    for _ in range(2):
        with here.applied(plan) as run:
            here.generate(0)
            summary = run.summary()
            with FlopCounterMode(display=False) as flops:
                here.generate(0)
            found.append((summary, flops.get_total_flops()))
        compile_blocks(here.transformer, counter, fullgraph=False)  # under a counter torch runs what is compiled eagerly
    assert found[0] == found[1]
    assert counter.frame_count > 0


@pytest.mark.parametrize(
    "settings",
    [{"threshold": 0.3}, pytest.param({"strategy": "budget", "budget": ah.Budget(error=0.3)}, marks=pytest.mark.slow)],
    ids=["threshold", "budget"],
)
@combines(GROUP, "searches, which run eagerly")
def test_searches_run_eagerly(mechanism, outcome, settings, counter):
    """And find what they find without."""
    here = subject(mechanism)
    wanted = here.search(**settings)
    compile_blocks(here.transformer, counter)
    compile_whole(here.transformer, counter)
    assert here.search(**settings).cells == wanted.cells
    assert counter.frame_count == 0
    here.generate(0)
    assert counter.frame_count > 0


@states(GROUP, "mixed precision by `torch.autocast`")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast(backend):
    here = subject("own", torch.float32)
    plan = here.plan(1)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, plain = here.compressed(plan, 0), here.generate(0)
        compile_blocks(here.transformer, backend)
        assert torch.equal(here.compressed(plan, 0), wanted)
        assert torch.equal(here.generate(0), plain)


@states(GROUP, "gradients through a plan", "refused: gradients want an uncompiled model")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_gradients(backend):
    """Where they are recorded a generation runs all the same."""
    here = subject("own")
    here.transformer.requires_grad_(True)
    plan = here.plan(1)
    wanted = here.compressed(plan, 0)
    compile_blocks(here.transformer, backend)
    with here.applied(plan):
        got = here.generate(0)
        torch.testing.assert_close(got, wanted)
        with pytest.raises(InputsInvalid, match="gradient through a site"):
            got.sum().backward()


@states(GROUP, "a loop's step, compiled with the model's call in it", "works: the graph ends where the model is called")
def test_a_compiled_step(counter):
    """Refused by name where the graph has to be whole."""
    here = subject("own")
    plan = here.plan(1)
    wanted = here.compressed(plan, 0)
    model = here.transformer
    loop = SimpleNamespace(called=None)

    def call(*args, **kwargs):
        return model(*args, **kwargs) * 1.0

    class Around(nn.Module):
        def forward(self, *args, **kwargs):
            return loop.called(*args, **kwargs)

    sampled = Own(Around(), here.adapter)
    sampled.model.weight = model.x_embedder.weight  # whose dtype the loop asks for
    loop.called = torch.compile(call, backend=counter)
    with here.applied(plan) as run:
        assert torch.equal(sampled.sample(0, by_call=True), wanted)
        made = counter.frame_count
        assert torch.equal(sampled.sample(0, by_call=True), wanted)
        assert counter.frame_count == made
        assert run.summary().steps == STEPS
    torch.compiler.reset()
    loop.called = torch.compile(call, backend=counter, fullgraph=True)
    with here.applied(plan), pytest.raises(torch._dynamo.exc.Unsupported, match="arrowhead counts calls of the model"):
        sampled.sample(0, by_call=True)


class Widening(nn.Module):
    """A feed-forward that does not give what feed-forwards do."""

    def __init__(self, inner, out):
        super().__init__()
        self.inner, self.out = inner, out

    def forward(self, x):
        return self.out(self.inner(x))


@pytest.mark.parametrize(
    "out",
    [lambda x: (x,), lambda x: x.float(), lambda x: torch.cat([x, x], 1)],
    ids=["a tuple", "another dtype", "another shape"],
)
def test_a_site_with_other_outputs_than_expected(out, counter):
    """The compiler was told beforehand what the site gives."""
    here = subject("own")
    for block in here.transformer.blocks:
        block.mlp = Widening(block.mlp, out)
        block.forward = lambda x, y, frames, block=block: (block.attn(x), block.mlp(x))[0]
    plan = here.plan(1, {"feed_forward"})
    here.compressed(plan, 0)
    compile_blocks(here.transformer, counter)
    with here.applied(plan), pytest.raises(NotIntercepted, match=r"blocks.0.mlp: got .* wanted .* torch.compile made"):
        here.generate(0)


def test_arguments_that_are_no_plain_values(counter):
    here = subject("own")
    for block in here.transformer.blocks:
        block.mlp.forward = lambda x, how, block=block: how(x)
        block.forward = lambda x, y, frames, block=block: block.mlp(x, torch.sin)
    plan = here.plan(1, {"feed_forward"})
    compile_blocks(here.transformer, counter)
    with here.applied(plan), pytest.raises(Exception, match="among the arguments of a module"):
        here.generate(0)


def test_a_graph_that_outlives_its_plan(counter):
    """Somebody kept the processor."""
    here = subject("sd3")
    compile_blocks(here.transformer, counter)
    attn = here.transformer.transformer_blocks[0].attn
    own = attn.processor
    with here.applied(here.plan(1)):
        here.generate(0)
        kept = attn.processor
    attn.processor = kept
    with pytest.raises(NotIntercepted, match="from which the plan has been taken off"):
        here.generate(0)
    attn.processor = own


@pytest.mark.slow
@combines(GROUP, "by inductor")
def test_inductor(mechanism, outcome):
    here = subject(mechanism, torch.float32)
    plans = [here.plan(seed) for seed in (1, 2)]
    plain, wanted = here.generate(5), [here.compressed(plan, seed) for seed, plan in enumerate(plans)]
    compile_blocks(here.transformer, "inductor")
    untouched = here.generate(5)
    torch.testing.assert_close(untouched, plain, rtol=1e-3, atol=1e-3)
    for _ in range(2):
        for seed, plan in enumerate(plans):
            torch.testing.assert_close(here.compressed(plan, seed), wanted[seed], rtol=1e-3, atol=1e-3)
    assert torch.equal(here.generate(5), untouched)


def test_a_pipeline_that_is_dropped_with_its_plan_is_freed():
    """A graph's way to a site keeps nothing alive."""
    before = {*compile_boundary._registry}
    here = subject("sd3")
    ah.apply(here.pipe, here.plan(1))
    assert {*compile_boundary._registry} - before
    transformer = weakref.ref(here.transformer)
    del here
    gc.collect()
    assert transformer() is None
    assert not {*compile_boundary._registry} - before
