"""`Plan.memory` against storing and freeing entry by entry. Real runs are in combinations/test_caches.py."""

import pytest
import torch
from holding import simulated_bytes
from hypothesis import given
from hypothesis import strategies as st
from independent import few, plans

from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import ASC, AST, FULL
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import Target

DTYPES = ("native", "int8", "fp8")


@few
@given(plan=plans(), images=st.integers(1, 4), itemsize=st.sampled_from([2, 4]), dtype=st.sampled_from(DTYPES))
def test_memory_is_what_storing_and_freeing_holds(plan, images, itemsize, dtype):
    wanted, found = simulated_bytes(plan, images, itemsize, dtype), plan.memory(images, itemsize, dtype)
    assert list(found.steps) == wanted.peaks
    assert found.peak == max(wanted.peaks) == wanted.peaks[found.step]
    assert found.step == wanted.peaks.index(found.peak)
    assert dict(found.of) == +wanted.greatest
    assert sum(found.of.values()) == found.peak


def test_memory_by_hand():
    """A head of 4 in 8 bits takes 4 bytes, and 4 for its scale."""
    target = Target("Transformer", "Scheduler", {}, (Site("attn", heads=2, head_dim=4, channels=8),))
    plan = Plan(((FULL,), (AST,)), target, Tokens(10), guided=True)
    assert plan.memory(3, torch.bfloat16).peak == plan.memory(3, 2).peak == 3 * 2 * 10 * 8 * 2
    assert plan.memory(3, torch.bfloat16, "int8").peak == plan.memory(3, 4, "fp8").peak == 3 * 2 * 10 * (8 + 2 * 4)
    assert plan.memory(3, 4, "int8").of == {"output": 3 * 2 * 10 * 16}
    assert str(plan.memory(2**20, 1)) == "160.00 MiB in step 0 (output 160.00)"


def test_outputs_handed_over_between_two_calls_stay_native():
    target = Target("Transformer", "Scheduler", {}, (Site("attn", heads=1, head_dim=8, channels=8),))
    plan = Plan(((ASC,), (FULL,)), target, Tokens(10), guided=True, calls=2)
    assert plan.memory(1, 4, "int8").of == plan.memory(1, 4).of == {"handed over": 10 * 8 * 4}


@pytest.mark.parametrize("dtype", ["int4", None, torch.int8])
def test_an_unknown_cache_dtype_is_refused(dtype):
    target = Target("Transformer", "Scheduler", {}, (Site("attn", heads=1, head_dim=8, channels=8),))
    with pytest.raises(InputsInvalid, match="cache_dtype"):
        Plan(((FULL,),), target, Tokens(10), guided=True).memory(cache_dtype=dtype)
