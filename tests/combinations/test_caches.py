"""What is kept between steps: in 8 bits or on another device, and as large as was said beforehand, on every mechanism."""

import gc
from contextlib import contextmanager

import pytest
import torch
from matrix import combines, states
from subjects import subject
from typer.testing import CliRunner

import arrowhead as ah
from arrowhead.cli import main
from arrowhead.engine import cache_encoding
from arrowhead.errors import InputsInvalid, PlanDerived
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Reuse
from arrowhead.plans.layout import Tokens
from arrowhead.plans.plan import Plan

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
EVERYTHING = {"self_attention", "cross_attention", "feed_forward"}


@contextmanager
def collected_by_hand():
    """Cycles would keep tensors for longer than needed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def apart(a, b):
    return float((a - b).norm() / b.norm())


def alive(dtype):
    """Tensors of a dtype by their storage: nothing else in these models is in 8 bits."""
    found = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype == dtype)
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in found}


def peaks(here, plan, dtype, seed=3):
    """Measured, and predicted for as many images and as wide activations."""
    with here.applied(plan, cache_dtype=dtype) as run:
        images = len(here.generate(seed))
        assert run.cache_bytes == 0
    return run.summary().peak_cache_bytes, plan.memory(images, torch.float64, dtype).peak


@pytest.mark.parametrize("dtype", ["native", "int8", "fp8"])
@combines("Caches", "as large as `plan.memory` says")
def test_the_peak_is_what_was_predicted(mechanism, outcome, dtype):
    here = subject(mechanism)
    for seed, kinds in ((1, {"self_attention"}), (2, EVERYTHING)):
        measured, predicted = peaks(here, here.plan(seed, kinds), dtype)
        assert measured == predicted > 0


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@combines("Caches", "in 8 bits, `cache_dtype`")
def test_eight_bits_stay_near_and_leave_nothing(mechanism, outcome, dtype):
    """What comes out is near the same plan's with native caches, and no number in 8 bits is alive afterwards."""
    here = subject(mechanism)
    plan, untouched, calls, during = here.plan(4, EVERYTHING), here.generate(1), [], []
    native = here.compressed(plan, 1)

    def look(*_):
        calls.append(1)
        if len(calls) == 3:
            during.append(len(alive(EIGHT_BITS[dtype])))

    with collected_by_hand():
        with here.applied(plan, cache_dtype=dtype):
            hook = here.transformer.register_forward_hook(look)
            found = here.generate(1)
            hook.remove()
        assert during[0] > 0 == len(alive(EIGHT_BITS[dtype]))
    assert 0 < apart(found, native) < 0.5 * apart(native, untouched)
    assert torch.equal(here.generate(1), untouched)


@combines("Caches", "full plans with any cache_dtype, bit for bit")
def test_what_nothing_is_kept_of_is_untouched(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(0)
    full = Plan(((FULL,) * len(plan.target.sites),) * plan.steps, plan.target, plan.tokens, plan.guided, calls=plan.calls)
    untouched = here.generate(2)
    with here.applied(full, cache_dtype="int8", cache_device="cpu"):
        assert torch.equal(here.generate(2), untouched)


@combines("Caches", "on another device, `cache_device`")
def test_everything_goes_there_and_comes_back(mechanism, outcome, monkeypatch):
    """There is one device here: what is sent is counted, and arrives as a copy."""
    here, sent = subject(mechanism), []
    plan = here.plan(5, EVERYTHING)
    wanted = here.compressed(plan, 1)

    def moved(tensor, device):
        sent.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(cache_encoding, "to_device", moved)
    with here.applied(plan, cache_device="cpu") as run:
        assert torch.equal(here.generate(1), wanted)
        assert run.cache_bytes == 0
        assert len(sent) > 1


@combines("Caches", "what there is not", "refused: by name, before anything is touched")
def test_unknown_dtypes_and_devices(mechanism, outcome):
    here = subject(mechanism)
    plan, untouched = here.plan(1), here.generate(1)
    for wrong in ({"cache_dtype": "int4"}, {"cache_dtype": None}, {"cache_device": "gpu"}, {"cache_device": "meta"}):
        with pytest.raises(InputsInvalid, match=r"got cache_.*wanted"):
            ah.apply(here.pipe, plan, here.adapter, **wrong)
    assert torch.equal(here.generate(1), untouched)


@combines("Caches", "in 8 bits, extrapolated outputs")
def test_slopes_are_rounded_little(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(0)
    lines = [FULL, FULL, Reuse(1.0), Reuse(0.5), AST]
    of_lines = Plan(tuple((cell,) * len(plan.target.sites) for cell in lines), plan.target, plan.tokens, True, calls=plan.calls)
    native, untouched = here.compressed(of_lines, 1), here.generate(1)
    with here.applied(of_lines, cache_dtype="int8"):
        assert 0 < apart(here.generate(1), native) < 0.1 * apart(native, untouched)


@combines("Caches", "a plan for other steps, `plan.resample`", {"sd3": "works", "flux": "works"})
def test_a_derived_plan_runs_with_a_warning(mechanism, outcome):
    here = subject(mechanism)
    plan = here.plan(6).resample(steps=9)
    untouched = here.generate(1, steps=9)
    with pytest.warns(PlanDerived, match="steps 9, was 5"), here.applied(plan) as run:
        found = here.generate(1, steps=9)
    assert run.summary().steps == 9
    assert run.summary().flops.module == pytest.approx(plan.flops().module)
    assert not torch.equal(found, untouched)
    assert torch.equal(here.generate(1, steps=9), untouched)


@states("Caches", "`arrowhead generate --cache-dtype`", mechanism="processor with SDPA")
def test_the_command_line_keeps_in_8_bits(tmp_path):
    """Of a plan for the bundled model, on which eight bits take less than native ones: so says the summary that is printed."""
    model = find(ah.tiny.load("dit"))
    rows = tuple((cell,) * len(model.sites) for cell in (FULL, AST))
    plan = Plan(rows, target_of(model), Tokens(256), guided=True)
    plan.save(tmp_path / "plan.json")
    asked = ["generate", "tiny:dit", "-i", "class_labels=[1]", "-i", "num_inference_steps=2", "--plan", tmp_path / "plan.json"]
    for dtype in ("native", "int8"):
        settings = ["--cache-dtype", dtype, "--cache-device", "cpu", "--out", tmp_path / dtype]
        said = CliRunner().invoke(main.app, list(map(str, [*asked, *settings])), catch_exceptions=False)
        assert f"{plan.memory(1, 4, dtype).peak / 2**20:.2f} MiB" in said.output
