"""Two threads that begin at the same instant on one pipeline or model: one of them has it, and the other one is told."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from own import Own, STDiT2, left_alone
from pipelines import dit, sd35
from replay import plan as uniform_plan
from test_own import plan_of, sites_of
from untouched import parts

import arrowhead as ah
from arrowhead.errors import AlreadyApplied, AlreadyGenerating, ArrowheadWarning
from arrowhead.plans.cells import AST, FULL

PAIRS = [20, pytest.param(200, marks=pytest.mark.slow)]
WAIT = 60  # seconds, for a thread that never comes


@pytest.fixture(autouse=True)
def turns_change_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def at_once():
    """Calls a function in two threads at the same instant; gives what each call gives, or its error."""
    together = threading.Barrier(2, timeout=WAIT)

    def outcome(work, which):
        together.wait()
        try:
            return work(which)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        yield lambda work: [done.result(WAIT) for done in [pool.submit(outcome, work, which) for which in (0, 1)]]


def require_one_winner(outcomes, wanted, refusal):
    """At least one has the right result, and nobody has another one: a loser may come when the winner is done."""
    assert any(isinstance(outcome, torch.Tensor) for outcome in outcomes), outcomes
    for outcome in outcomes:
        assert torch.equal(outcome, wanted) if isinstance(outcome, torch.Tensor) else type(outcome) is refusal, repr(outcome)
    return any(isinstance(outcome, refusal) for outcome in outcomes)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("bench", "grid"), [(dit, ["FFF", "RRR"]), (sd35, ["FFF", "RRR"])], ids=["dit", "sd35"])
def test_two_calls_of_one_pipeline(bench, grid, pairs, at_once):
    bench = bench()
    inputs = {"steps": 2, "output_type": "latent"}
    pipe, refused = bench.pipe, 0
    with warnings.catch_warnings(), ah.applied(pipe, uniform_plan(bench, grid)) as run:
        warnings.simplefilter("error", ArrowheadWarning)
        generate = lambda _: torch.as_tensor(pipe(**bench.inputs(**inputs))[0]).clone()  # noqa: E731
        wanted = generate(0)
        for _ in range(pairs):
            refused += require_one_winner(at_once(generate), wanted, AlreadyGenerating)
        assert run.summary().steps == 2
        assert torch.equal(generate(0), wanted)
    assert refused
    assert not torch.equal(generate(0), wanted)


def custom():
    """A custom model in a loop of two steps, its plan, and its video under the plan."""
    own = Own(STDiT2(layers=1, fused=False), ah.open_sora(guidance_scale=3.0), steps=2, images=1)
    sites = sites_of(own)
    return own, plan_of(own, [[FULL] * len(sites), [AST] * len(sites)])


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("by_call", [False, True], ids=["forward", "call"])
def test_two_loops_over_one_model(by_call, pairs, at_once):
    own, plan = custom()
    refused = 0
    with warnings.catch_warnings(), ah.applied(own.model, plan, own.adapter):
        warnings.simplefilter("error", ArrowheadWarning)
        wanted = own.sample(by_call=by_call)
        for _ in range(pairs):
            refused += require_one_winner(at_once(lambda _: own.sample(by_call=by_call)), wanted, AlreadyGenerating)
        assert torch.equal(own.sample(by_call=by_call), wanted)
    assert refused
    assert not torch.equal(own.sample(), wanted)


@pytest.mark.parametrize("pairs", PAIRS)
def test_two_plans_on_one_pipeline(pairs, at_once):
    bench = dit()
    plans = [uniform_plan(bench, ["FFF", letter * 3]) for letter in "RC"]
    before = parts(bench.pipe)
    for _ in range(pairs):
        outcomes = at_once(lambda which: ah.apply(bench.pipe, plans[which]))
        (run,) = (outcome for outcome in outcomes if isinstance(outcome, ah.Run))
        assert {type(outcome) for outcome in outcomes} == {ah.Run, AlreadyApplied}, outcomes
        assert run.on
        ah.remove(bench.pipe)
        assert parts(bench.pipe) == before


@pytest.mark.parametrize("pairs", PAIRS)
def test_plans_on_two_pipelines_that_share_a_transformer(pairs, at_once):
    bench, other = dit(), dit()
    other.pipe.transformer = bench.pipe.transformer
    plan = uniform_plan(bench, ["FFF", "RRR"])
    pipes = bench.pipe, other.pipe
    before = [*map(parts, pipes)]
    for _ in range(pairs):
        outcomes = at_once(lambda which: ah.apply(pipes[which], plan))
        assert {type(outcome) for outcome in outcomes} == {ah.Run, AlreadyApplied}, outcomes
        next(outcome for outcome in outcomes if isinstance(outcome, ah.Run)).close()
        assert [*map(parts, pipes)] == before


def test_two_searches_on_one_pipeline(at_once):
    bench = dit()
    inputs = {"steps": 2, "output_type": "latent"}
    wanted = ah.search(bench.pipe, bench.inputs(**inputs), threshold=0.5, progress=False)
    before = parts(bench.pipe)
    for _ in range(5):
        found = at_once(lambda _: ah.search(bench.pipe, bench.inputs(**inputs), threshold=0.5, progress=False))
        assert all(type(each) in (ah.Plan, AlreadyGenerating, AlreadyApplied) for each in found), found
        assert any(isinstance(each, ah.Plan) for each in found)
        assert all(each.cells == wanted.cells for each in found if isinstance(each, ah.Plan))
        assert parts(bench.pipe) == before


def test_two_searches_on_one_model(at_once):
    own, _ = custom()
    settings = {"adapter": own.adapter, "threshold": 0.5, "progress": False}
    wanted, before = ah.search(own.model, own.sample, **settings), left_alone(own.model)
    for _ in range(5):
        found = at_once(lambda _: ah.search(own.model, own.sample, **settings))
        assert all(type(each) in (ah.Plan, AlreadyApplied) for each in found), found
        assert any(isinstance(each, ah.Plan) for each in found)
        assert all(each.cells == wanted.cells for each in found if isinstance(each, ah.Plan))
        assert left_alone(own.model) == before
