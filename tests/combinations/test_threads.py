"""Two threads, a pipeline each: plans on both wrap processors of the same classes, and neither disturbs the other."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from by_hand import as_it_was, loop_of
from matrix import combines
from subjects import STEPS, subject
from test_between import beside

import arrowhead as ah
from arrowhead.errors import AlreadyGenerating

ROUNDS = 3
WAIT = 60  # seconds, for a thread that never comes


@pytest.fixture(autouse=True)
def turns_change_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*works):
    """What each gives, in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(WAIT) for future in [pool.submit(work) for work in works]]


def in_step(transformers, calls):
    """Hooks by which each passes attention only when the other does, so often: they truly run side by side."""
    meeting = threading.Barrier(len(transformers), timeout=WAIT)
    left = dict.fromkeys(transformers, calls)

    def wait(transformer, *_):
        if left[transformer]:
            left[transformer] -= 1
            meeting.wait()

    return [transformer.register_forward_pre_hook(wait) for transformer in transformers]


@combines("State", "two threads, a pipeline and a plan each")
def test_two_threads_with_a_plan_each(mechanism, outcome):
    here, there = subject(mechanism), subject(mechanism)
    for weight in there.transformer.parameters():
        weight.data.mul_(1.1)
    plans = here.plan(seed=1), there.plan(seed=2)
    wanted = here.compressed(plans[0], 1), there.compressed(plans[1], 2)
    with as_it_was(here), as_it_was(there):
        for _ in range(ROUNDS):
            hooks = in_step([here.transformer, there.transformer], STEPS * plans[0].calls)
            got = at_once(lambda: here.compressed(plans[0], 1), lambda: there.compressed(plans[1], 2))
            for hook in hooks:
                hook.remove()
            assert torch.equal(got[0], wanted[0])
            assert torch.equal(got[1], wanted[1])


@combines("State", "two threads, one with a plan, one without")
def test_two_threads_one_without_a_plan(mechanism, outcome):
    here, there = subject(mechanism), subject(mechanism)
    plan = here.plan(seed=1)
    wanted, untouched = here.compressed(plan, 1), there.generate(2)
    with as_it_was(here), as_it_was(there):
        for _ in range(ROUNDS):
            hooks = in_step([here.transformer, there.transformer], STEPS * plan.calls)
            got = at_once(lambda: here.compressed(plan, 1), lambda: there.generate(2))
            for hook in hooks:
                hook.remove()
            assert torch.equal(got[0], wanted)
            assert torch.equal(got[1], untouched)


@combines("State", "two threads, one searches while the other generates")
def test_a_search_beside_a_generation(mechanism, outcome):
    here, there = subject(mechanism), subject(mechanism)
    plan = there.plan(seed=2)
    undisturbed, wanted = here.search(threshold=0.6), there.compressed(plan, 2)

    def generations():
        return [there.compressed(plan, 2) for _ in range(4)]

    with as_it_was(here), as_it_was(there):
        found, got = at_once(lambda: here.search(threshold=0.6), generations)
    assert found.cells == undisturbed.cells
    assert all(torch.equal(one, wanted) for one in got)


@combines("State", "plans put on and taken off in two threads")
def test_putting_on_and_taking_off_at_once(mechanism, outcome):
    here, there = subject(mechanism), subject(mechanism)
    plans = here.plan(seed=1), there.plan(seed=2)
    together = threading.Barrier(2, timeout=WAIT)

    def often(own, plan):
        together.wait()
        for _ in range(15):
            with own.applied(plan):
                pass

    with as_it_was(here), as_it_was(there):
        at_once(lambda: often(here, plans[0]), lambda: often(there, plans[1]))


SHARED = "refused"


@combines("State", "two threads that share a transformer", SHARED)
def test_two_threads_that_share_a_transformer(mechanism, outcome):
    """What comes from the other thread is refused, and the generation that was there first goes on."""
    here = subject(mechanism)
    other = here if mechanism == "own" else beside(here)
    plan = here.plan(seed=1)
    wanted = here.compressed(plan, 1)
    began, refused = threading.Event(), threading.Event()

    def first():
        def wait(*_):
            began.set()
            assert refused.wait(WAIT)

        hook = here.transformer.register_forward_hook(wait)
        try:
            return here.generate(1)
        finally:
            hook.remove()

    def second():
        assert began.wait(WAIT)
        with pytest.raises(AlreadyGenerating, match="called from elsewhere"):
            loop_of(here).sample(2) if mechanism == "own" else other.generate(2)
        refused.set()

    with as_it_was(here), here.applied(plan) as run:
        got, _ = at_once(first, second)
        assert torch.equal(got, wanted)
        assert run.summary().steps == STEPS
        assert torch.equal(here.generate(1), wanted)


@combines("State", "two threads that call one pipeline", {"sd3": SHARED, "flux": SHARED})
def test_two_threads_that_call_one_pipeline(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(seed=1)
    wanted = here.compressed(plan, 1)
    began, refused = threading.Event(), threading.Event()

    def wait(*_):
        began.set()
        assert refused.wait(WAIT)
        return {}

    def second():
        assert began.wait(WAIT)
        with pytest.raises(AlreadyGenerating, match="while another one is going on"):
            here.generate(2)
        refused.set()

    with as_it_was(here), ah.applied(here.pipe, plan):
        got, _ = at_once(lambda: here.generate(1, callback_on_step_end=wait), second)
        assert torch.equal(got, wanted)
