"""Methods of classes that somebody wraps, as loggers and profilers do: their parameters are read through the wrapper."""

import functools

import pytest
import torch
from own import Own, STDiT2
from pipelines import dit, sd3
from replay import plan as uniform_plan
from test_interrupted import blocks_of
from test_own import plan_of, sites_of
from untouched import parts

import arrowhead as ah
from arrowhead.errors import UnsupportedPipeline
from arrowhead.plans.cells import AST, FULL

originals = {}
held = None


def by_closure(original):
    def logged(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    return logged


def by_global(original):
    """As at the top of a script."""
    globals()["held"] = original
    return through_a_global


def through_a_global(self, *args, **kwargs):
    return held(self, *args, **kwargs)


def by_default(original):
    def logged(*args, _original=original, **kwargs):
        return _original(*args, **kwargs)

    return logged


def by_wraps(original):
    return functools.wraps(original)(by_dict(original))


def twice(original):
    return by_closure(by_closure(original))


def by_dict(original):
    originals["original"] = original

    def logged(self, *args, **kwargs):
        return originals["original"](self, *args, **kwargs)

    return logged


THROUGH = {wrap.__name__: wrap for wrap in (by_closure, by_global, by_default, by_wraps, twice)}


def generated(bench):
    return torch.as_tensor(bench.pipe(**bench.inputs(steps=2))[0]).clone()


CASES = [(method, wrap) for method in ("forward", "__call__") for wrap in THROUGH] + [("block", "by_default")]


@pytest.mark.parametrize(("method", "wrap"), CASES)
def test_a_wrapper_is_looked_through(method, wrap, monkeypatch):
    """Put there before the plan, or while it is on."""
    bench = dit() if method != "block" else sd3()
    plan = uniform_plan(bench, ["FFF", "wRC"]) if method != "block" else blocks_of(bench, {"block"})
    found = [ah.search(bench.pipe, bench.inputs(steps=2), threshold=0.5, progress=False)]
    with ah.applied(bench.pipe, plan):
        wanted = generated(bench)
    transformer = bench.pipe.transformer
    owner = {"forward": transformer, "__call__": bench.pipe, "block": transformer.transformer_blocks[0]}[method]
    name = "__call__" if method == "__call__" else "forward"
    before = parts(bench.pipe)
    with monkeypatch.context() as patch:
        patch.setattr(type(owner), name, THROUGH[wrap](getattr(type(owner), name)))
        with ah.applied(bench.pipe, plan):
            assert torch.equal(generated(bench), wanted)
        assert parts(bench.pipe) == before
        found.append(ah.search(bench.pipe, bench.inputs(steps=2), threshold=0.5, progress=False))
    assert found[0].cells == found[1].cells
    with ah.applied(bench.pipe, plan), monkeypatch.context() as patch:
        patch.setattr(type(owner), name, THROUGH[wrap](getattr(type(owner), name)))
        assert torch.equal(generated(bench), wanted)


@pytest.mark.parametrize("method", ["forward", "__call__", "block"])
def test_a_wrapper_that_hides_the_parameters_is_refused(method, monkeypatch):
    bench = dit() if method != "block" else sd3()
    plan = uniform_plan(bench, ["FFF", "RRR"]) if method != "block" else blocks_of(bench, {"block"})
    transformer = bench.pipe.transformer
    owner = {"forward": transformer, "__call__": bench.pipe, "block": transformer.transformer_blocks[0]}[method]
    name = "__call__" if method == "__call__" else "forward"
    before = parts(bench.pipe)
    monkeypatch.setattr(type(owner), name, by_dict(getattr(type(owner), name)))
    said = rf"got a {type(owner).__name__} whose {name} was replaced .*\(self, \*args, \*\*kwargs\).*functools.wraps"
    with pytest.raises(UnsupportedPipeline, match=said):
        ah.apply(bench.pipe, plan)
    if method != "block":
        with pytest.raises(UnsupportedPipeline, match=said):
            ah.search(bench.pipe, bench.inputs(), progress=False)
    assert parts(bench.pipe) == before


def test_a_custom_model(monkeypatch):
    """Whose adapter is given the arguments by name; one that itself takes any is given those."""
    own = Own(STDiT2(layers=1), ah.open_sora(guidance_scale=3.0), steps=2, images=1)
    sites = sites_of(own)
    plan = plan_of(own, [[FULL] * len(sites), [AST] * len(sites)])
    with ah.applied(own.model, plan, own.adapter):
        wanted = own.sample()
    with monkeypatch.context() as patch:
        patch.setattr(STDiT2, "forward", by_closure(STDiT2.forward))
        with ah.applied(own.model, plan, own.adapter):
            assert torch.equal(own.sample(), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(STDiT2, "forward", by_dict(STDiT2.forward))
        with pytest.raises(UnsupportedPipeline, match="STDiT2 whose forward was replaced"):
            ah.apply(own.model, plan, own.adapter)

    class TakesAnything(STDiT2):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    loose = TakesAnything(layers=1)
    loose.load_state_dict(own.model.state_dict())
    adapter = ah.Adapter(own.adapter.attention, lambda *_: own.tokens, "cond_first", own.adapter.feed_forward, 3.0, 4)
    other = Own(loose, adapter, steps=2, images=1)
    with ah.applied(loose, plan_of(other, plan.cells), adapter):
        assert torch.equal(other.sample(), wanted)
