"""The fingerprint of weights: the same in any dtype, another for other weights, and a plan that meets others says so."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from independent import few
from pipelines import dit, randomise
from torch import nn
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import ArrowheadWarning, OtherWeights
from arrowhead.models.weights import SAMPLES, fingerprint, same_weights


def model(seed, sizes):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in sizes))


layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@few
@given(seed=st.integers(0, 2**32), sizes=layers, dtype=st.sampled_from([torch.float64, torch.float16, torch.bfloat16]))
def test_it_is_that_of_the_same_weights_in_any_dtype(seed, sizes, dtype):
    found = fingerprint([model(seed, sizes)])
    assert len(found) == 4 * SAMPLES
    assert same_weights(found, fingerprint([model(seed, sizes).to(dtype)]))
    assert not same_weights(found, fingerprint([model(seed + 1, sizes)]))


def test_a_change_of_all_weights_by_a_tenth_shows():
    one = model(0, [(30, 30)] * 3)
    before = fingerprint([one])
    with torch.no_grad():
        for weight in one.parameters():
            weight.mul_(1.1)
    assert not same_weights(before, fingerprint([one]))


@pytest.mark.parametrize("unreadable", [
    model(0, [(4, 4)]).to("meta"), model(0, [(4, 4)]).to(torch.float8_e4m3fn), nn.Identity(),
])  # fmt: skip
def test_weights_that_cannot_be_read_are_not_known(unreadable):
    assert fingerprint([unreadable]) is None
    assert same_weights(None, fingerprint([model(0, [(4, 4)])]))


def test_a_lora_that_is_not_fused_changes_nothing():
    peft = pytest.importorskip("peft")
    plain, with_lora = model(3, [(8, 8)] * 4), model(3, [(8, 8)] * 4)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "2"]), with_lora)
    assert fingerprint([plain]) == fingerprint([with_lora])


def test_a_plan_that_meets_other_weights_says_so(tmp_path):
    bench = dit()
    ah.search(bench.pipe, bench.inputs(), threshold=0.7, progress=False).save(tmp_path / "plan.json")
    plan = ah.Plan.load(tmp_path / "plan.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArrowheadWarning)
        with ah.applied(bench.pipe, plan):
            bench.pipe(**bench.inputs())
    randomise(bench.pipe.transformer, seed=99)
    with left_as_it_was(bench):
        with pytest.warns(OtherWeights, match="other weights of DiTTransformer2DModel"):
            ah.apply(bench.pipe, plan)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ArrowheadWarning)
            bench.pipe(**bench.inputs())
        ah.remove(bench.pipe)
