"""Stacks beside LoRA, offloading, and blocks on several devices: compared with replays by the definition."""

import pytest
import torch
from subjects import STEPS, subject
from test_lora import drawn, load
from test_offload import WAYS, emptied_memory
from test_stack import blocks_of, random_column, replayed
from torch import nn

import arrowhead as ah
from arrowhead.engine.stack_calls import StackCall, StackMember
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL
from arrowhead.plans.layout import relevant_tokens
from arrowhead.plans.plan import Plan

both = pytest.mark.parametrize("name", ["sd3", "flux"])


def column_of(seed):
    """Random cells, among them one that skips."""
    draws = (random_column(f"{seed} {i}") for i in range(99))
    return next(column for column in draws if 1 < column.count(FULL) < STEPS)


def plan_of(here, column):
    model = find(here.pipe, {"stack"})
    calls = 2 if model.branch_order == "two_calls" else 1
    return Plan(
        tuple((cell,) for cell in column), target_of(model), relevant_tokens(here.tokens, model.sites), True, calls=calls
    )


def replay(name, column, lora=None, scale=1.0, seed=1):
    """By the definition, on a model whose weights were changed by hand."""
    there = subject(name)
    for path, (a, b) in (lora or {}).items():
        there.transformer.get_submodule(path).weight.data += scale * (b @ a)
    with replayed(there, column, guided=True):
        return there.generate(seed)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@both
def test_lora(name):
    """Loaded before the plan, and while it is on; scaled, fused, and taken off again."""
    here, later, column = subject(name), subject(name), column_of(name)
    lora, plan = drawn(here, name, 5), plan_of(subject(name), column)
    base, wanted = replay(name, column), replay(name, column, lora)
    assert (base - wanted).norm() > 1e-2 * base.norm()
    load(here, lora)
    same(here.compressed(plan, 1), wanted)
    with later.applied(plan) as run:
        same(later.generate(1), base)
        load(later, lora)
        same(later.generate(1), wanted)
        later.pipe.set_adapters("one", 0.4)
        same(later.generate(1), replay(name, column, lora, 0.4))
        later.pipe.set_adapters("one", 1.0)
        later.pipe.fuse_lora(lora_scale=0.6)
        same(later.generate(1), replay(name, column, lora, 0.6))
        later.pipe.unfuse_lora()
        later.pipe.unload_lora_weights()
        same(later.generate(1), base)
        assert run.summary().notes == ()


@both
def test_a_model_with_a_lora_is_watched(name):
    here, there = subject(name), subject(name)
    lora = drawn(here, name, 5)
    load(here, lora)
    for path, (a, b) in lora.items():
        there.transformer.get_submodule(path).weight.data += b @ a
    found, wanted = (ah.profile(each.pipe, each.inputs(0), progress=False) for each in (here, there))
    torch.testing.assert_close(found.products, wanted.products)
    torch.testing.assert_close(found.changes, wanted.changes, rtol=1e-3, atol=1e-4)
    plan = ah.solve(found, ah.Budget(transformer_flops=0.7))
    column = [cell for (cell,) in plan.cells]
    assert 0 < column.count(FULL) < STEPS
    same(here.compressed(plan, 1), replay(name, column, lora))


@both
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "way", ["model", "sequential", "groups", *(pytest.param(way, marks=pytest.mark.slow) for way in ("disk", "map"))]
)
def test_offloaded(name, way, after, tmp_path):
    """Weights that are elsewhere until a block is called; the plan comes on before the hooks, or after them."""
    here, column = subject(name), column_of(f"{name} {way}")
    wanted, untouched, plan = replay(name, column), here.generate(1), plan_of(here, column)
    with emptied_memory():
        if not after:
            WAYS[way](here, tmp_path)
        with here.applied(plan) as run:
            if after:
                WAYS[way](here, tmp_path)
            same(here.generate(1), wanted)
            assert run.summary().notes == ()
        same(here.generate(1), untouched)


def test_nothing_is_brought_for_blocks_that_are_skipped(tmp_path):
    """Hooks that bring weights run as often as their blocks."""
    here, column, brought = subject("sd3"), column_of("brought"), []
    WAYS["sequential"](here, tmp_path)
    for block in blocks_of(here.transformer, find(here.pipe, {"stack"})):
        for module in filter(lambda m: isinstance(m, nn.Linear), block.modules()):
            hook = module._hf_hook
            hook.pre_forward = lambda *a, own=hook.pre_forward, **k: (brought.append(1), own(*a, **k))[1]
    here.generate(1)
    whole = len(brought)
    brought.clear()
    with here.applied(plan_of(here, column)):
        here.generate(1)
    assert len(brought) * STEPS == whole * column.count(FULL)


def test_a_watched_generation_while_offloaded(tmp_path):
    here, there = subject("flux"), subject("flux")
    WAYS["sequential"](here, tmp_path)
    found, wanted = (ah.profile(each.pipe, each.inputs(0), progress=False) for each in (here, there))
    torch.testing.assert_close(found.changes, wanted.changes)
    torch.testing.assert_close(found.products, wanted.products)


@pytest.mark.parametrize("text", [0, 3])
def test_blocks_on_several_devices(text):
    """The first block is on the CPU, and the last one on the device meta, which stands for another."""
    here = subject("flux")
    (site,) = find(here.pipe, {"stack"}).sites
    began, image = torch.zeros(1, 4, 8), torch.zeros(1, 4 + text, 8)
    member = StackMember(1, 2, pair=False)
    call = StackCall(site, nn.Identity(), None, (image,), {}, ("hidden_states",), member, began, slice(text, None))
    stored = call.storable(image.to("meta"))
    assert (stored.device.type, stored.shape) == ("meta", began.shape)
    restored = call.restore(stored)
    assert (restored.device.type, restored.shape) == ("meta", image.shape)
