"""How attention within a processor is reached, whatever it is called by; and that nothing else of the process changes."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from pipelines import dit, sd3
from replay import assert_identical, assert_same, compressed, plan, replay, trace
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.engine.attention_hook import _stand_in
from arrowhead.engine.function_clones import with_stand_ins
from arrowhead.errors import NotIntercepted

MIXED = ["FFF", "WXV", "REW", "CwR", "VYE"]
CALLS = []


def projected(attn, x):
    return [f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v)]


def finished(attn, out):
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


class ByF:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return finished(attn, F.scaled_dot_product_attention(*projected(attn, hidden_states)))


class ByFullName:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return finished(attn, torch.nn.functional.scaled_dot_product_attention(*projected(attn, hidden_states)))


class ByImportedName:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return finished(attn, scaled_dot_product_attention(*projected(attn, hidden_states)))


def attended(attn, x):
    return in_turn(*projected(attn, x))


def in_turn(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class ByHelpers:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return finished(attn, attended(attn, hidden_states))


class ByNestedFunction:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)  # noqa: E731, PLW0108
        return finished(attn, attend(*projected(attn, hidden_states)))


class ByMethods:
    scale = 1.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return finished(attn, self.attend(self.scale * self.unchanged(hidden_states), attn))

    @staticmethod
    def attend(x, attn):
        return F.scaled_dot_product_attention(*projected(attn, x))

    @classmethod
    def unchanged(cls, x):
        return x


class BySuper(ByMethods):
    """A method of the class that it inherits from."""

    def attend(self, x, attn):
        return super().attend(x, attn)


class BySuperAndItself(ByF):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if attn.training:
            return F.scaled_dot_product_attention(*projected(attn, hidden_states))
        return super().__call__(attn, hidden_states)


class ByAnotherClass(ByF):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return ByF.__call__(self, attn, hidden_states)


class ByAnotherProcessor:
    def __init__(self):
        self.inner = ByF()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.inner(attn, hidden_states)


def passed_on(function):
    @functools.wraps(function)
    def passing(*args, **kwargs):
        return function(*args, **kwargs)

    return passing


class Decorated:
    @torch.no_grad()
    @passed_on
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return finished(attn, F.scaled_dot_product_attention(*projected(attn, hidden_states)))


counted = 0


class Counting:
    """Assigns to a global of its module."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        global counted  # noqa: PLW0603
        counted += 1
        return finished(attn, F.scaled_dot_product_attention(*projected(attn, hidden_states)))


class WithKeywords:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *, calls=CALLS):
        calls.append(self)
        return finished(attn, F.scaled_dot_product_attention(*projected(attn, hidden_states)))


class AModule(nn.Module):
    """A processor with weights, which its attention module has for a child."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return finished(attn, self.gain * F.scaled_dot_product_attention(*projected(attn, hidden_states)))


WAYS = [
    ByF,
    ByFullName,
    ByImportedName,
    ByHelpers,
    ByNestedFunction,
    ByMethods,
    BySuper,
    BySuperAndItself,
    ByAnotherClass,
    ByAnotherProcessor,
    Decorated,
    Counting,
    WithKeywords,
    AModule,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_attention_is_reached_by_whatever_it_is_called(way):
    bench = dit()
    wanted = replay(bench, MIXED, bench.inputs())
    for attn in bench.attentions:
        del attn.processor
        attn.processor = way().eval() if way is AModule else way()
    before = counted
    with left_as_it_was(bench):
        assert_same(compressed(bench, plan(bench, MIXED), bench.inputs()), wanted)
        assert_identical(compressed(bench, plan(bench, ["FFF"] * 5), bench.inputs()), trace(bench, bench.inputs()))
    assert (counted > before) == (way is Counting)


@pytest.mark.parametrize(
    "way", [lambda *args, **kwargs: None, type("Slotted", (), {"__slots__": ("a",)})()], ids=["function", "slots"]
)
def test_a_processor_that_cannot_be_wrapped(way):
    bench = dit()
    bench.attentions[1].processor = way
    with pytest.raises(NotIntercepted, match=r"transformer_blocks.1.attn1: got a \w+ for a processor, wanted an object"):
        ah.apply(bench.pipe, plan(bench, MIXED))
    assert bench.attentions[1].processor is way


def globals_of(name):
    return dict(vars(sys.modules[name]))


@pytest.mark.parametrize("make", [dit, sd3])
def test_no_name_of_a_module_changes_while_a_plan_is_on(make):
    bench = make()
    classes = {type(attn.processor) for attn in bench.attentions}
    modules = {cls.__module__: globals_of(cls.__module__) for cls in classes}
    members = {cls: dict(vars(cls)) for cls in classes}
    assert modules["diffusers.models.attention_processor"]["F"] is torch.nn.functional
    with ah.applied(bench.pipe, plan(bench, MIXED)):
        trace(bench, bench.inputs())
        assert {name: globals_of(name) for name in modules} == modules
        assert {cls: dict(vars(cls)) for cls in classes} == members


def test_what_a_module_gets_by_the_next_plan_is_seen(monkeypatch):
    """Clones see their module as it is when a plan is applied."""
    bench = dit()
    for attn in bench.attentions:
        attn.processor = ByHelpers()
    for gain in (1.0, 2.0):
        monkeypatch.setitem(
            globals(), "finished", lambda attn, out, gain=gain: gain * attn.to_out[0](out.transpose(1, 2).flatten(2))
        )
        wanted = trace(bench, bench.inputs())
        assert_identical(compressed(bench, plan(bench, ["FFF"] * 5), bench.inputs()), wanted)


def test_a_processor_that_modules_share():
    """What is set on it while a plan is on is set for all, and stays."""
    bench = dit()
    wanted = replay(bench, MIXED, bench.inputs())
    shared = ByMethods()
    for attn in bench.attentions:
        attn.processor = shared
    with ah.applied(bench.pipe, plan(bench, MIXED)):
        assert_same(trace(bench, bench.inputs()), wanted)
        bench.attentions[0].processor.note = "set on one"
        assert all(attn.processor.note == "set on one" for attn in bench.attentions)
    assert all(attn.processor is shared for attn in bench.attentions)
    assert vars(shared) == {"note": "set on one"}


def test_attributes_that_change_while_a_plan_is_on():
    """They take effect at once, and stay."""
    bench = dit()
    for attn in bench.attentions:
        attn.processor = ByMethods()
    with ah.applied(bench.pipe, plan(bench, ["FFF"] * 5)):
        plain = trace(bench, bench.inputs())
        bench.attentions[1].processor.scale = 2.0
        scaled = trace(bench, bench.inputs())
    assert not torch.equal(plain.result, scaled.result)
    assert vars(bench.attentions[1].processor) == {"scale": 2.0}
    assert_identical(trace(bench, bench.inputs()), scaled)
    with ah.applied(bench.pipe, plan(bench, ["FFF"] * 5)):
        del bench.attentions[1].processor.scale
    assert_identical(trace(bench, bench.inputs()), plain)


def stand_in(name, value, function):
    return (lambda: "stand-in") if name == "answer" else None


def answer():
    return "own"


def recursive(times):
    return recursive(times - 1) if times else answer()


class Base:
    def asked(self):
        return answer()

    def again(self):
        return recursive(2)


class Middle(Base):
    def asked(self):
        return f"{super().asked()} in the middle"


class Derived(Middle):
    """Asks nothing directly."""


class NamesBase(Base):
    def asked(self):
        return Base.asked(self)


def test_clones_are_found_by_methods_and_by_super():
    cls = with_stand_ins(Derived, stand_in)
    assert cls().asked() == "stand-in in the middle"
    assert issubclass(cls, Derived)
    assert cls.__qualname__ == "Derived"
    assert cls.asked.__qualname__ == "Middle.asked"
    assert Derived().asked() == "own in the middle"
    assert answer() == "own"


@pytest.mark.parametrize("cls", [NamesBase, Counting, dict, object, nn.Linear])
def test_classes_of_which_clones_do_not_do(cls):
    assert with_stand_ins(cls, stand_in) is None


@pytest.mark.parametrize(
    "cls", [AttnProcessor2_0, JointAttnProcessor2_0, FluxAttnProcessor, Flux2AttnProcessor, WanAttnProcessor]
)
def test_diffusers_processors_run_as_twins(cls):
    """The mode, which is slower, is for others."""
    assert with_stand_ins(cls, _stand_in) is not None
