"""Stacks: all blocks of a transformer as one site, compared with a run of every block whose last output is replaced."""

import random
from contextlib import contextmanager

import pytest
import torch
from budget import flux
from families import MORE
from pipelines import BENCHES, CAPTION, JOINT
from replay import assert_identical, distance, trace
from seeds import seeds
from test_families import fewer
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import NotIntercepted, PlanInvalid
from arrowhead.models.families import FAMILIES
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Attend, Reuse
from arrowhead.plans.layout import Tokens, relevant_tokens

STEPS = 5
ALL = {**BENCHES, **JOINT, "flux": flux, **MORE}
BY_CLASS = {family.transformer: family for family in FAMILIES}


def bench_of(name, dtype=torch.float64):
    bench = ALL[name](dtype)
    if not BY_CLASS[type(bench.pipe.transformer).__name__].has("stack"):
        pytest.skip("is no plain chain of blocks")
    return bench


def blocks_of(transformer, model):
    """The blocks of a transformer, in the order they run."""
    (site,) = model.sites
    return [block for name in site.path.split("+") for block in getattr(transformer, name)]


def plan_of(bench, cells, guided=True):
    model = find(bench.pipe, {"stack"})
    calls = 2 if guided and model.branch_order == "two_calls" else 1
    text = getattr(bench, "text_seen", bench.text or CAPTION[0])
    first = getattr(bench, "text_first", model.family.name == "FLUX.1")
    tokens = relevant_tokens(Tokens(bench.visual, text, first, getattr(bench, "frames", 1)), model.sites)
    return ah.Plan(
        tuple((cell,) for cell in cells), target_of(model), tokens, guided, calls=calls, switch=getattr(bench, "switch", None)
    )


def random_column(seed, guided=True, switch=None):
    """Random cells of a stack that can run: from the step `switch` on, another transformer's."""
    draw, column, outputs = random.Random(seed), [], 0

    def coefficient(low, high):
        return tuple(draw.uniform(low, high) for _ in range(2)) if draw.random() < 0.5 else draw.uniform(low, high)

    for step in range(STEPS):
        outputs = 0 if step == switch else outputs
        kinds = ["full", *["repeat", "scaled"] * (outputs > 0), *["extrapolate"] * 2 * (outputs > 1)]
        kind = draw.choice(kinds)
        outputs += kind == "full"
        cells = {
            "full": lambda: FULL,
            "repeat": lambda: AST,
            "scaled": lambda: Reuse(scale=coefficient(0.5, 1.5)),
            "extrapolate": lambda: Reuse(coefficient(-0.5, 1.5), coefficient(0.8, 1.2)),
        }
        column.append(cells[kind]())
    return column


def pair(coefficient):
    return coefficient if isinstance(coefficient, tuple) else (coefficient, coefficient)


@contextmanager
def replayed(bench, column, guided, ends=None):
    """Every block runs in every step; where the plan skips, what the last one gives is replaced, by the definition.

    From the step `ends` on there is the conditional branch alone.
    """
    model = find(bench.pipe, {"stack"})
    handles, calls, two = [], [0], guided and model.branch_order == "two_calls"
    for transformer in model.transformers:
        blocks = blocks_of(transformer, model)
        state = {"outputs": ([], [])}

        def first(_, args, kwargs, state=state):
            state["began"] = (args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))).clone()

        def last(_, args, out, state=state):
            both = 2 if two else 1
            step, call = divmod(calls[0], both)
            if ends is not None and step >= ends:
                step, call = ends + calls[0] - ends * both, 0
            calls[0] += 1
            image, began = out[1] if isinstance(out, tuple) else out, state["began"]
            rows = image.shape[1] - began.shape[1]
            part = image[:, rows:] if rows else image  # text before the image wherever one sequence holds both
            kept, cell = state["outputs"][call], column[step]
            half, order = part.shape[0] // 2, model.branch_order == "uncond_first"
            if step == ends and guided and not two:  # the conditional branch's part of what was kept
                both = len(kept[-1][1]) // 2
                kept[:] = [(made, out[order * both : (1 + order) * both]) for made, out in kept]
            if isinstance(cell, Attend):
                kept.append((step, part - began))
                return None
            which = torch.tensor([call] * part.shape[0] if two else [0] * part.shape[0])
            if guided and not two and (ends is None or step < ends):
                which = torch.tensor([int(order)] * half + [int(not order)] * half)
            scale, slope = (torch.tensor(pair(c), dtype=part.dtype)[which, None, None] for c in (cell.scale, cell.extrapolate))
            (j, newest), change = kept[-1], 0
            if cell.extrapolate != 0:
                i, before = kept[-2]
                change = slope * (step - j) * (newest - before) / (j - i)
            new = began + scale * newest + change
            new = torch.cat([image[:, :rows], new], 1) if rows else new
            return (out[0], new) if isinstance(out, tuple) else new

        handles.append(blocks[0].register_forward_pre_hook(first, with_kwargs=True))
        handles.append(blocks[-1].register_forward_hook(last))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


every_chain_with_and_without = pytest.mark.parametrize(
    ("name", "guidance"),
    [
        pytest.param(name, guidance, id=f"{'guided' if guidance > 1 else 'unguided'}-{name}", marks=fewer(name, guidance > 1))
        for guidance in (3.0, 1.0)
        for name in ALL
    ],
)


@every_chain_with_and_without
def test_a_full_plan_changes_no_bit(name, guidance):
    bench = bench_of(name, torch.float32)
    inputs = {"images": 2, "guidance": guidance}
    untouched = trace(bench, bench.inputs(**inputs))
    with left_as_it_was(bench, **inputs), ah.applied(bench.pipe, plan_of(bench, [FULL] * STEPS, guidance > 1)) as run:
        assert_identical(trace(bench, bench.inputs(**inputs)), untouched)
        assert run.summary().notes == ()


@every_chain_with_and_without
@pytest.mark.parametrize("seed", seeds(3))
def test_random_plans_are_what_a_replay_gives(name, guidance, seed):
    bench, guided = bench_of(name), guidance > 1
    column = random_column(f"{name} {seed} {guided}", guided, getattr(bench, "switch", None))
    plan = plan_of(bench, column, guided)
    inputs = {"seed": seed, "images": 1 + seed, "guidance": guidance}
    with ah.applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(**inputs))
        summary = run.summary()
    with replayed(bench, column, guided):
        wanted = trace(bench, bench.inputs(**inputs))
    assert distance(given, wanted) < 1e-9
    assert summary.cells.total() == STEPS * plan.calls
    assert summary.flops.module == pytest.approx(plan.flops().module)
    images = 1 if getattr(bench, "single", False) else 1 + seed
    assert summary.peak_cache_bytes == max(plan.cache_bytes(images, 8))


@pytest.mark.parametrize("name", ["dit", "flux", "z_image"])
def test_a_plan_of_a_stack_is_read_as_it_was_written(name, tmp_path):
    bench = bench_of(name)
    plan = plan_of(bench, random_column(f"file {name}"))
    plan.save(tmp_path / "plan.json")
    assert ah.Plan.load(tmp_path / "plan.json") == plan


def test_a_stack_does_not_share():
    bench = bench_of("dit")
    with pytest.raises(PlanInvalid, match="share_cfg for a stack"):
        plan_of(bench, [FULL, Attend(share_cfg=True), *[FULL] * (STEPS - 2)])


@pytest.mark.parametrize("bad", [5, -4.5, float("nan"), (0.5,), (0.5, 0.5, 0.5), "1", None, (0.1, float("inf"))])
def test_coefficients_out_of_bounds(bad):
    with pytest.raises(ValueError, match="wanted a number from"):
        Reuse(extrapolate=bad)
    with pytest.raises(ValueError, match="wanted a number from"):
        Reuse(scale=bad)


def test_a_block_that_something_else_skips_is_refused():
    bench = bench_of("dit")
    blocks = bench.pipe.transformer.transformer_blocks
    with ah.applied(bench.pipe, plan_of(bench, [FULL, AST, FULL, AST, AST])):
        bench.pipe.transformer.transformer_blocks = torch.nn.ModuleList([blocks[0], blocks[2]])
        with pytest.raises(NotIntercepted, match="block 2 after 1"):
            bench.pipe(**bench.inputs())
        bench.pipe.transformer.transformer_blocks = blocks


@pytest.mark.parametrize("name", ["dit", "flux", "wan22"])
def test_no_block_runs_in_a_step_that_skips(name):
    bench, calls = bench_of(name), []
    column = [FULL, AST, FULL, FULL, AST]
    plan = plan_of(bench, column)
    for transformer in find(bench.pipe, {"stack"}).transformers:
        for block in blocks_of(transformer, find(bench.pipe, {"stack"})):
            for inner in block.children():
                inner.register_forward_pre_hook(lambda module, *_: calls.append(module))
    bench.pipe(**bench.inputs())
    whole = len(calls)
    calls.clear()
    with ah.applied(bench.pipe, plan):
        bench.pipe(**bench.inputs())
    assert len(calls) == whole * 3 // 5
