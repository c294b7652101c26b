"""Weights that are elsewhere until a module is called: on meta, on disk, or in a group with others."""

import contextlib

import accelerate
import accelerate.hooks
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import apply_group_offloading
from matrix import combines
from subjects import subject
from torch import nn

import arrowhead as ah
from arrowhead.errors import ProcessorReplaced, SiteNotReached
from arrowhead.plans.layout import ALL_KINDS

GROUP = "Offload"
CPU = torch.device("cpu")
MODULES, BLOCKS = ALL_KINDS - {"block"}, frozenset({"block"})


def parts_of(here):
    """A pipeline's modules: its device is that of the first one, which has to have hooks as well."""
    return [here.transformer] if here.adapter else [m for m in here.pipe.components.values() if isinstance(m, nn.Module)]


def sequential(here, folder):
    for part in parts_of(here):
        accelerate.cpu_offload(part, execution_device=CPU)


def from_disk(here, folder):
    for i, part in enumerate(parts_of(here)):
        accelerate.disk_offload(part, str(folder / str(i)), execution_device=CPU)


def mapped(here, folder):
    """The first block is on disk, all else on the CPU; hooks on every module."""
    transformer = here.transformer
    blocks = next(name for name, child in transformer.named_children() if name.endswith("blocks"))
    named = {name: "cpu" for name, _ in transformer.named_children() if name != blocks}
    named |= {f"{blocks}.{i}": "cpu" if i else "disk" for i in range(len(transformer.get_submodule(blocks)))}
    accelerate.dispatch_model(transformer, named, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def in_groups(level):
    def offload(here, folder):
        apply_group_offloading(
            here.transformer,
            onload_device=CPU,
            offload_device=CPU,
            offload_type=f"{level}_level",
            num_blocks_per_group=1 if level == "block" else None,
            offload_to_disk_path=str(folder),
        )

    return offload


def whole_models(here, folder):
    """As enable_model_cpu_offload does it, which takes its hooks off and puts them on again in every call."""
    if here.adapter is None:
        here.pipe.enable_model_cpu_offload(device="cpu")
    else:
        accelerate.cpu_offload_with_hook(here.transformer, CPU)


WAYS = {
    "model": whole_models,
    "sequential": sequential,
    "groups": in_groups("block"),
    "leaves": in_groups("leaf"),
    "map": mapped,
    "disk": from_disk,
}


@contextlib.contextmanager
def emptied_memory():
    """What is not filled holds no number: weights that were not brought show."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


WHAT = "enable_model_cpu_offload, sequential, disk, a device map, groups of leaves or of blocks; before the plan or after it"


@combines(GROUP, WHAT)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("way", [*WAYS][:3] + [pytest.param(way, marks=pytest.mark.slow) for way in [*WAYS][3:]])
def test_weights_are_brought_wherever_a_module_is_computed(mechanism, outcome, way, after, tmp_path):
    """Of heads, of modules that are left out, and of blocks; the plan comes off from beneath hooks that came after it."""
    here = subject(mechanism)
    kinds = frozenset({"self_attention", "feed_forward"}) if mechanism == "own" else MODULES if after else BLOCKS
    plan = here.plan(3, kinds)
    wanted, untouched = here.compressed(plan, 1), here.generate(1)

    def same(found, as_before):
        torch.testing.assert_close(found, as_before, rtol=1e-9, atol=1e-9)

    with emptied_memory():
        if not after:
            WAYS[way](here, tmp_path)
        with here.applied(plan) as run:
            if after:
                WAYS[way](here, tmp_path)
            same(here.generate(1), wanted)
            assert run.summary().notes == ()
        assert not any("arrowhead" in name for m in here.transformer.modules() for name in vars(m.forward))
        same(here.generate(1), untouched)
        if after:
            same(here.compressed(plan, 1), wanted)


@combines(GROUP, "hooks that come and go while a plan is on")
def test_hooks_that_come_and_go(mechanism, outcome):
    """What came after the plan goes before it, and leaves it where it was."""
    here = subject(mechanism)
    plan = here.plan(3, frozenset({"self_attention", "feed_forward"}))
    wanted, untouched = here.compressed(plan, 1), here.generate(1)
    with here.applied(plan):
        accelerate.cpu_offload_with_hook(here.transformer, CPU)
        assert torch.equal(here.generate(1), wanted)
        remove_hook_from_submodules(here.transformer)
        assert torch.equal(here.generate(1), wanted)
    assert torch.equal(here.generate(1), untouched)


@combines(GROUP, "hooks that are taken off with the plan's forwards: noticed at the next generation")
def test_forwards_that_are_lost(mechanism, outcome):
    """accelerate puts back what it found, and so drops what was put around it since."""
    here = subject(mechanism)
    plan, untouched = here.plan(3, frozenset({"feed_forward"})), here.generate(1)
    path = plan.target.sites[0].path
    accelerate.hooks.add_hook_to_module(here.transformer.get_submodule(path), accelerate.hooks.ModelHook())
    run = ah.apply(here.pipe, plan, here.adapter)
    remove_hook_from_submodules(here.transformer)
    with pytest.warns(ProcessorReplaced, match=rf"{path} by a method.*apply it again"), pytest.warns(SiteNotReached):
        here.generate(1)
    assert any(path in note for note in run.summary().notes)
    with pytest.warns(ProcessorReplaced, match=path):
        run.close()
    assert torch.equal(here.generate(1), untouched)


@combines(GROUP, "searches of all kinds while offloaded")
@pytest.mark.parametrize(("strategy", "way"), [("greedy", "model"), ("headwise", "sequential"), ("budget", "sequential")])
def test_the_same_plan_is_found(mechanism, outcome, strategy, way, tmp_path):
    """Without caching of heads in headwise's, whose worth is less where a hook on a layer keeps them from being left out."""
    here, offloaded = subject(mechanism), subject(mechanism)
    WAYS[way](offloaded, tmp_path)
    extent = ah.Extent(radii=(2, 5), ages=2, kinds=("self_attention",))
    settings = {
        "greedy": {"strategy": "greedy", "threshold": 0.4},
        "headwise": {"strategy": ah.Headwise(radii=(2, 5), caching=False), "threshold": 0.4},
        "budget": {"budget": ah.Budget(attention_flops=0.6, corrections=0), "extent": extent},
    }[strategy]
    found, wanted = offloaded.search(**settings), here.search(**settings)
    assert found.cells == wanted.cells
    assert {*wanted.count()} != {"full"}
