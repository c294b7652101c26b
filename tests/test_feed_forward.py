"""Feed-forwards as sites of a plan: computed, for one branch alone, or reused, against forwards replaced by hand."""

import random
from collections import Counter, defaultdict
from contextlib import contextmanager

import pytest
import torch
from pipelines import BENCHES, JOINT
from replay import assert_identical, assert_same, compressed, distance, trace
from seeds import seeds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import PlanMismatch, ProcessorReplaced
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import ASC, AST, EXTRAPOLATE, FULL, Attend, Cached, Full
from arrowhead.plans.layout import Tokens

CELLS = {"F": FULL, "C": ASC, "R": AST, "E": EXTRAPOLATE}
MAKES = {**BENCHES, **JOINT}


@pytest.fixture(params=MAKES)
def any_bench(request):
    return MAKES[request.param]()


def plan_of(bench, rows, attention=FULL, guided=True):
    """A plan with `rows` of letters for the feed-forwards, and one cell for all attention."""
    target = target_of(find(bench.pipe, {"self_attention", "feed_forward"}))
    cells = []
    for row in rows:
        letters = iter(row)
        cells.append(tuple(CELLS[next(letters)] if s.kind == "feed_forward" else attention for s in target.sites))
    return ah.Plan(tuple(cells), target, Tokens(bench.visual, bench.text), guided)


def random_rows(seed, steps, layers):
    draw = random.Random(seed)
    columns = []
    for _ in range(layers):
        column = ""
        for _ in range(steps):
            computed = sum(letter in "FC" for letter in column)
            column += draw.choice("FC" + "RR" * (computed > 0) + "EEE" * (computed > 1))
        columns.append(column)
    return ["".join(row) for row in zip(*columns, strict=True)]


@contextmanager
def by_hand(bench, rows):
    """Forwards that do what the letters say, and know nothing of arrowhead."""
    blocks, step, last = bench.pipe.transformer.transformer_blocks, Counter(), defaultdict(list)

    def conditional(x):
        return x.chunk(2)[not bench.conditional_first]

    def forward_of(layer, ff):
        own = type(ff).forward

        def forward(x):
            now, letter = step[layer], rows[step[layer]][layer]
            step[layer] += 1
            if letter in "FC":
                out = own(ff, x) if letter == "F" else torch.cat([own(ff, conditional(x))] * 2)
                last[layer].append((now, letter, out))
            if letter != "E":
                return last[layer][-1][-1]
            (b, _, before), (a, shared, after) = last[layer][-2:]
            line = (after * (now - b) - before * (now - a)) / (a - b)
            return torch.cat([conditional(line)] * 2) if shared == "C" else line

        return forward

    for layer, block in enumerate(blocks):
        block.ff.forward = forward_of(layer, block.ff)
    try:
        yield
    finally:
        for block in blocks:
            del block.ff.forward


def assert_as_by_hand(bench, rows, seed):
    inputs = {"seed": seed, "images": 2}
    got = compressed(bench, plan_of(bench, rows), bench.inputs(**inputs))
    with by_hand(bench, rows):
        wanted = trace(bench, bench.inputs(**inputs))
    assert_same(got, wanted)
    assert distance(got, trace(bench, bench.inputs(**inputs))) > 0.01


@pytest.mark.parametrize("seed", seeds(3))
def test_cells_of_feed_forwards(any_bench, seed):
    rows = random_rows(seed, 5, len(any_bench.pipe.transformer.transformer_blocks))
    assert_as_by_hand(any_bench, rows, seed)


@pytest.mark.parametrize("columns", [("FFEEE", "FCEEE", "CFEEE"), ("CCERE", "FRCRE", "FFCEE"), ("FCEFE", "FFRFE", "FFEEC")])
def test_lines_of_feed_forwards(any_bench, columns):
    columns = columns[: len(any_bench.pipe.transformer.transformer_blocks)]
    assert_as_by_hand(any_bench, ["".join(row) for row in zip(*columns, strict=True)], 5)


def test_all_full_changes_nothing_and_removal_restores(any_bench):
    layers = len(any_bench.pipe.transformer.transformer_blocks)
    raw = trace(any_bench, any_bench.inputs())
    with left_as_it_was(any_bench):
        got = compressed(any_bench, plan_of(any_bench, ["F" * layers] * 5), any_bench.inputs())
    assert_identical(got, raw)
    assert_identical(trace(any_bench, any_bench.inputs()), raw)
    assert not any("forward" in vars(module) for module in any_bench.pipe.transformer.modules())


def test_beside_compressed_attention(any_bench):
    """Attention shared, heads cached and reused in turn: what the plan says of attention alone is what it does beside."""
    layers = len(any_bench.pipe.transformer.transformer_blocks)
    target = target_of(find(any_bench.pipe))
    tokens = Tokens(any_bench.visual, any_bench.text)
    columns = [
        (FULL, ASC, AST, Attend((Cached(), *[Full()] * (site.heads - 1))), ASC) if i % 2 else (ASC, FULL, FULL, AST, AST)
        for i, site in enumerate(target.sites)
    ]
    alone = ah.Plan(tuple(zip(*columns, strict=True)), target, tokens, guided=True)
    rows = random_rows(7, 5, layers)
    beside = plan_of(any_bench, rows)
    attention = iter(columns)
    columns = zip(beside.target.sites, beside.columns, strict=True)
    mixed = [next(attention) if s.kind == "self_attention" else column for s, column in columns]
    beside = ah.Plan(tuple(zip(*mixed, strict=True)), beside.target, tokens, guided=True)
    got = compressed(any_bench, beside, any_bench.inputs())
    with by_hand(any_bench, rows):
        wanted = compressed(any_bench, alone, any_bench.inputs())
    assert_same(got, wanted)


def test_what_is_counted_is_what_is_multiplied(any_bench):
    """The transformer's own FLOPs, counted by torch, with and without: the difference is what the plan says it saves."""
    layers = len(any_bench.pipe.transformer.transformer_blocks)
    rows = random_rows(3, 5, layers)
    the_plan = plan_of(any_bench, rows)

    def counted(run):
        total = 0
        forward = any_bench.pipe.transformer.forward

        def counting(*args, **kwargs):
            nonlocal total
            with FlopCounterMode(display=False) as counter:
                out = forward(*args, **kwargs)
            total += counter.get_total_flops()
            return out

        any_bench.pipe.transformer.forward = counting
        try:
            run()
        finally:
            del any_bench.pipe.transformer.forward
        return total

    raw = counted(lambda: any_bench.pipe(**any_bench.inputs()))
    with ah.applied(any_bench.pipe, the_plan) as run:
        spent = counted(lambda: any_bench.pipe(**any_bench.inputs()))
    weights = sum(
        m.weight.numel() for m in any_bench.pipe.transformer.transformer_blocks[0].ff.modules() if isinstance(m, nn.Linear)
    )
    halves = sum({"F": 0, "C": 1, "R": 2, "E": 2}[letter] for row in rows for letter in row)
    assert raw - spent == halves * 2 * weights * any_bench.visual
    assert run.summary().flops.module == pytest.approx(the_plan.flops().module)
    assert run.summary().flops.attention == pytest.approx(1)


def test_caches_hold_what_the_plan_says(any_bench):
    layers = len(any_bench.pipe.transformer.transformer_blocks)
    the_plan = plan_of(any_bench, random_rows(5, 5, layers))
    with ah.applied(any_bench.pipe, the_plan) as run:
        any_bench.pipe(**any_bench.inputs(images=2))
        assert run.cache_bytes == 0
    assert run.summary().peak_cache_bytes == max(the_plan.cache_bytes(images=2, itemsize=8))


def test_a_plan_with_feed_forwards_is_saved_and_read(any_bench, tmp_path):
    layers = len(any_bench.pipe.transformer.transformer_blocks)
    the_plan = plan_of(any_bench, random_rows(1, 5, layers))
    the_plan.save(tmp_path / "plan.json")
    assert ah.Plan.load(tmp_path / "plan.json") == the_plan


def test_heads_are_those_of_attention_alone(any_bench):
    the_plan = plan_of(any_bench, random_rows(1, 5, len(any_bench.pipe.transformer.transformer_blocks)))
    heads = 5 * sum(site.heads for site in the_plan.target.sites if site.kind == "self_attention")
    assert the_plan.count_heads() == {"full": heads}
    with ah.applied(any_bench.pipe, the_plan) as run:
        any_bench.pipe(**any_bench.inputs())
    assert run.summary().heads == {"full": heads}


def test_another_feed_forward_is_refused():
    bench, other = BENCHES["dit"](), BENCHES["dit"](num_layers=2)
    with pytest.raises(PlanMismatch, match="number of sites"):
        ah.apply(other.pipe, plan_of(bench, ["FFF"] * 5))


def test_a_forward_that_somebody_set_meanwhile_stays():
    bench = BENCHES["dit"]()
    ff = bench.pipe.transformer.transformer_blocks[1].ff
    ah.apply(bench.pipe, plan_of(bench, ["FFF"] * 5))
    ff.forward = own = lambda x: 0 * x
    with pytest.warns(ProcessorReplaced, match=r"transformer_blocks\.1\.ff"):
        ah.remove(bench.pipe)
    assert ff.forward is own


def test_a_forward_that_was_there_before_is_put_back():
    bench = BENCHES["dit"]()
    ff = bench.pipe.transformer.transformer_blocks[1].ff
    ff.forward = own = lambda x: type(ff).forward(ff, 2 * x)
    raw = trace(bench, bench.inputs())
    got = compressed(bench, plan_of(bench, ["FFF"] * 5), bench.inputs())
    assert_identical(got, raw)
    assert ff.forward is own
