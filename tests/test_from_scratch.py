"""The example that writes DiTFastAttn out without the engine: it gives what the engine gives, and its faults are seen."""

import importlib.util
import os
import random
import re
import runpy
from pathlib import Path

import pytest
import torch
from pipelines import Bench, dit, tiny
from replay import assert_identical, assert_same, compressed, distance, plan, processors, trace

import arrowhead as ah

EXAMPLE = Path(__file__).parents[1] / "examples/from_scratch.py"
LETTERS = "FWRCV"
FAULTS = {  # what may go wrong, and a grid that shows it
    "the unconditional half": ["FFF", "CCC", "FCF", "CCC"],
    "the unconditional half's residual": ["FFF", "VVV", "WWW", "VVV"],
    "the first residual for ever": ["FFF", "WWW", "FFF", "WWW"],
    "no residual": ["FFF", "WWW", "VVV", "RRR"],
    "no residual of ASC": ["FFF", "WWW", "CCC", "VVV"],
    "half the window": ["FFF", "WWW", "VVV", "RRR"],
    "the first output for ever": ["FFF", "CCC", "RRR", "RRR"],
}


@pytest.fixture
def example():
    """Loaded anew for each test, so that a fault put into it stays there."""
    spec = importlib.util.spec_from_file_location("from_scratch", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bundled(dtype=torch.float64):
    def inputs(seed=0, images=1, steps=10):
        labels = random.Random(seed).choices(range(10), k=images)
        call = {"class_labels": labels, "num_inference_steps": steps, "output_type": "pt"}
        return call | {"generator": torch.Generator().manual_seed(seed)}

    return Bench(ah.tiny.load("dit", dtype=dtype), True, 256, inputs)


def random_grid(seed, steps, layers):
    """Letters at random; the first step's read nothing."""
    draw = random.Random(seed)
    return ["".join(draw.choices("FC" if step == 0 else LETTERS, k=layers)) for step in range(steps)]


def by_hand(example, bench, grid, inputs):
    """Generate by the example; the pipeline's own processors are put back."""
    with processors(bench, [attn.processor for attn in bench.attentions]):
        example.compress(bench.pipe, grid)
        return trace(bench, inputs)


def by_engine(bench, grid, inputs):
    return compressed(bench, plan(bench, grid, near=bench.visual // 8), inputs)


def assert_alike(example, bench, grid, **call):
    """In every step's output and in the result, to the rounding of float64."""
    call = {"steps": len(grid), **call}
    got = by_hand(example, bench, grid, bench.inputs(**call))
    assert_same(got, by_engine(bench, grid, bench.inputs(**call)), rtol=1e-9, atol=1e-9)


def test_its_own_plan(example):
    assert set("".join(example.PLAN)) == set(LETTERS)
    assert_alike(example, bundled(), example.PLAN, seed=1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [dit, tiny])
def test_random_plans(example, make, seed):
    """On sharp random weights, where every technique matters; with 25 tokens, too, of which 8 is no divisor."""
    bench = make(seed=seed, sample_size=(8, 10)[seed % 2])
    assert_alike(example, bench, random_grid(seed, 7, 3), seed=seed, images=1 + seed % 3)


@pytest.mark.parametrize(("make", "dtype"), [(dit, torch.float64), (tiny, torch.float64), (bundled, torch.float32)])
def test_all_full_is_the_pipeline(example, make, dtype):
    """To the bit."""
    bench = make(dtype)
    got = by_hand(example, bench, ["F" * bench.layers] * 3, bench.inputs(seed=2, images=2, steps=3))
    assert_identical(got, trace(bench, bench.inputs(seed=2, images=2, steps=3)))


def with_fault(example, fault, monkeypatch):
    """Put it into the example."""
    own, rows = example.CompressedAttention, example.residual_rows

    class Faulty(own):
        """Another residual or output is read than the one that was kept."""

        @property
        def residual(self):
            if fault == "no residual":
                return torch.zeros_like(self.kept)
            return self.kept.flip(0) if fault == "the unconditional half's residual" and self.letter == "V" else self.kept

        @residual.setter
        def residual(self, value):
            self.kept = value

        @property
        def output(self):
            return self.first if fault == "the first output for ever" and self.letter == "R" else self.last

        @output.setter
        def output(self, value):
            self.last = value
            if self.step == 0:
                self.first = value

        @property
        def letter(self):
            return self.column[self.step]

    def fewer_rows(column, step, samples):
        missing = {"the first residual for ever": step > 0, "no residual of ASC": column[step] == "C"}
        return 0 if missing.get(fault) else rows(column, step, samples)

    monkeypatch.setattr(example, "CompressedAttention", Faulty)
    monkeypatch.setattr(example, "residual_rows", fewer_rows)
    if fault == "the unconditional half":
        monkeypatch.setattr(example, "conditional", lambda x: x[len(x) // 2 :])
    if fault == "half the window":
        monkeypatch.setattr(example, "radius", lambda n: n // 16)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(example, monkeypatch, fault):
    """By the comparison that passes as long as no fault is put in."""
    bench, grid = tiny(), FAULTS[fault]
    right = by_engine(bench, grid, bench.inputs(steps=len(grid)))
    with_fault(example, None, monkeypatch)
    assert_same(by_hand(example, bench, grid, bench.inputs(steps=len(grid))), right, rtol=1e-9, atol=1e-9)
    with_fault(example, fault, monkeypatch)
    wrong = by_hand(example, bench, grid, bench.inputs(steps=len(grid)))
    assert distance(wrong, right) > 0.01
    with pytest.raises(AssertionError, match="not close"):
        assert_same(wrong, right, rtol=1e-9, atol=1e-9)


def test_flops_are_counted_as_the_engine_counts(example):
    bench = bundled()
    for grid in [example.PLAN, *(random_grid(seed, 9, 8) for seed in range(20))]:
        left = plan(bench, grid, near=32).flops()
        assert example.flops_left(grid, 256, 128) == pytest.approx((left.attention, left.module), rel=1e-12)


def test_it_runs(example, capsys):
    runpy.run_path(os.fspath(EXAMPLE), run_name="__main__")
    attention, modules, decibels = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    left = plan(bundled(), example.PLAN, near=32).flops()
    assert (attention, modules) == pytest.approx((100 * left.attention, 100 * left.module), abs=0.051)
    assert 15 < decibels < 40
