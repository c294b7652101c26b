"""Processors that somebody sets while a plan is applied."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from matrix import combines, states
from subjects import subject

import arrowhead as ah
from arrowhead.errors import PlanMismatch, ProcessorReplaced, SiteNotReached
from arrowhead.plans.cells import Attend

GROUP = "Processors"
NAMED = "works: full attention there, with a warning as the next generation begins"


def attentions(here):
    return [module for path, module in here.transformer.named_modules() if path.endswith(".attn")]


def by_fusing(here):
    here.transformer.fuse_qkv_projections()  # which sets another one


def by_set_attn_processor(here):
    here.transformer.set_attn_processor(type(attentions(here)[0].processor).__mro__[1]())


def by_set_processor(here):
    for attn in attentions(here):
        attn.set_processor(type(attn.processor).__mro__[1]())


def by_attribute(here):
    attn = attentions(here)[1]
    attn.processor = type(attn.processor).__mro__[1]()


WAYS = {
    "sd3": [by_fusing, by_set_processor, by_attribute],
    "flux": [by_set_attn_processor, by_set_processor, by_attribute],
}


@combines(GROUP, "set_attn_processor, set_processor and the like while a plan is applied", {"sd3": NAMED, "flux": NAMED})
@pytest.mark.parametrize("way", range(3))
def test_one_that_is_set_is_named_when_generating_begins(mechanism, outcome, way):
    """Before the transformer runs: whoever makes errors of warnings loses no time."""
    here = subject(mechanism)
    plan, untouched = here.plan(3), here.generate(1)
    run = ah.apply(here.pipe, plan)
    WAYS[mechanism][way](here)
    calls = []
    hook = here.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ProcessorReplaced, match=r"blocks.1.attn by a .*Processor.*apply it again"):
        here.generate(1)
    assert not calls
    hook.remove()
    with pytest.warns(ProcessorReplaced), pytest.warns(SiteNotReached):
        found = here.generate(1)
    if WAYS[mechanism][way] is not by_attribute:
        torch.testing.assert_close(found, untouched, rtol=1e-9, atol=1e-9)
    with pytest.warns(ProcessorReplaced):
        run.close()


@combines(
    GROUP,
    "forward of a custom model wrapped while a plan is applied",
    {"own": "works: replaced by another and called directly, it is refused"},
)
def test_the_models_own_forward(mechanism, outcome):
    """Wrapped by whatever calls on; replaced by the class's own, nobody would count the steps of a loop that calls it."""
    here = subject(mechanism)
    plan, untouched = here.plan(3), here.generate(1)
    wanted = here.compressed(plan, 1)
    with here.applied(plan):
        ours = here.transformer.forward
        here.transformer.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # noqa: PLW0108 - another function
        assert torch.equal(here.generate(1), wanted)
        here.transformer.forward = ours
        assert torch.equal(here.generate(1), wanted)
        del here.transformer.forward
        assert torch.equal(here.generate(1), wanted)
        with pytest.raises(PlanMismatch, match=r"forward of the STDiT2 was replaced.*call close\(\) of the run"):
            here.generate(1, by_call=False)
    assert torch.equal(here.generate(1), untouched)
    assert torch.equal(here.compressed(plan, 1), wanted)


@pytest.fixture
def backend_is_put_back():
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.usefixtures("backend_is_put_back")
@states(GROUP, "set_attention_backend while a plan is applied", "works, and is kept", "dispatch_attention_fn")
def test_an_attention_backend_that_is_set_while_a_plan_is_on(monkeypatch):
    here = subject("flux")
    processors = [module.processor for module in here.transformer.modules() if hasattr(module, "processor")]
    asked = []
    own = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    counting = lambda *args, **kwargs: (asked.append(1), own(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, counting)
    here.transformer.set_attention_backend("native")
    plan = here.plan(1)
    full = replace(plan, cells=((Attend(),) * len(plan.cells[0]),) * len(plan.cells))
    with here.applied(full):
        here.generate()
        assert not asked
        here.transformer.set_attention_backend("_native_math")
        here.generate()
        assert len(asked) == 2 * len(processors) * len(full.cells)  # two calls a step
    now = [module.processor for module in here.transformer.modules() if hasattr(module, "processor")]
    assert all(own is before for own, before in zip(now, processors, strict=True))
    assert {processor._attention_backend for processor in processors} == {AttentionBackendName._NATIVE_MATH}
    with here.applied(full):
        here.transformer.reset_attention_backend()
    assert {processor._attention_backend for processor in processors} == {None}
