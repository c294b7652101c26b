"""Custom models whose inputs and outputs are lists, one entry for each sample: Wan from its own source."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from own_wan import ADAPTER, Stacked, Wan, WanModel

import arrowhead as ah
from arrowhead.errors import InputsInvalid, NotIntercepted

SEARCHES = {
    "greedy": {"strategy": "greedy", "threshold": 0.7},
    "headwise": {"strategy": "headwise", "threshold": 0.8},
    "budget": {"budget": ah.Budget(transformer_flops=0.6), "extent": ah.Extent(ages=2, radii=(3,))},
    "without gradients": {"budget": ah.Budget(module_flops=0.5), "extent": ah.Extent(gradients=False, ages=2, radii=(3,))},
}


def on_tensors(wan):
    """The model that takes and gives tensors, the loop over it, and its adapter: a reference for what is found with lists."""
    model = Stacked(wan.model)
    attention = {rf"inner\.{pattern}": each for pattern, each in ADAPTER.attention.items()}
    adapter = replace(ADAPTER, attention=attention, feed_forward=rf"inner\.{ADAPTER.feed_forward}")
    return model, replace(wan, model=lambda x, **call: [*model(torch.stack(x), **call)], stacked=True).sample, adapter


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", ["greedy", "headwise"])
def test_searches_find_what_they_find_with_tensors(name, images):
    wan = Wan(WanModel(), images)
    plan = ah.search(wan.model, wan.sample, adapter=ADAPTER, progress=False, **SEARCHES[name])
    model, sample, adapter = on_tensors(wan)
    wanted = ah.search(model, sample, adapter=adapter, progress=False, **SEARCHES[name])
    assert plan.cells == wanted.cells
    assert plan.flops().module < 1


@pytest.mark.parametrize("name", SEARCHES)
def test_plans_run(name):
    wan = Wan(WanModel())
    untouched = torch.stack(wan.sample())
    plan = ah.search(wan.model, wan.sample, adapter=ADAPTER, progress=False, **SEARCHES[name])
    assert torch.equal(torch.stack(wan.sample()), untouched)
    assert (plan.steps, plan.calls, plan.tokens) == (5, 2, ah.Tokens(18))
    with ah.applied(wan.model, plan, ADAPTER) as run:
        compressed = torch.stack(wan.sample())
    assert run.summary().flops.module == pytest.approx(plan.flops().module)
    assert run.summary().notes == ()
    assert not torch.equal(compressed, untouched)
    if name == "budget":
        error = ((compressed - untouched).norm() / untouched.norm()).item()
        assert plan.about["search"]["measured_error"] == pytest.approx(error, rel=1e-2)


def test_a_table_is_that_of_tensors():
    wan = Wan(WanModel(), images=2)
    model, sample, adapter = on_tensors(wan)
    given = ah.calibrate(wan.model, torch.inference_mode()(wan.sample), adapter=ADAPTER, progress=False)
    wanted = ah.calibrate(model, sample, adapter=adapter, progress=False)
    torch.testing.assert_close(given.outputs, wanted.outputs)
    torch.testing.assert_close(given.residuals, wanted.residuals)
    for name in ("sampler_gains", "model_feedback", "final", "elements", "other_flops", "images"):
        assert getattr(given, name) == pytest.approx(getattr(wanted, name))


@pytest.mark.parametrize(
    ("made_of", "said"),
    [
        (lambda out: {"sample": torch.stack(out)}, "gave a dict; wanted a tensor, a list"),
        (lambda out: SimpleNamespace(sample=torch.stack(out)), "gave a SimpleNamespace; wanted a tensor, a list"),
        (lambda out: [*out, *out], "samples of 2 images for latents of 1"),
        (lambda out: [*out, out[0][:1]], "gave a list; wanted a tensor, a list"),
    ],
    ids=["dict", "object", "too many", "two shapes"],
)
@pytest.mark.parametrize("name", SEARCHES)
def test_outputs_that_are_refused_by_name(name, made_of, said):
    wan = Wan(WanModel(1), steps=2)
    forward, kept = wan.model.forward, []

    def odd(x, t, context, seq_len):
        kept.append(forward(x, t, context, seq_len))
        return made_of(kept[-1])

    def sample():
        replace(wan, model=lambda *args, **kwargs: wan.model(*args, **kwargs) and kept[-1]).sample()

    type(wan.model).forward, before = lambda _, x, t, context, seq_len: odd(x, t, context, seq_len), type(wan.model).forward
    try:
        with pytest.raises(NotIntercepted, match=said):
            ah.search(wan.model, sample, adapter=ADAPTER, progress=False, **SEARCHES[name])
    finally:
        type(wan.model).forward = before


def test_latents_that_are_refused_by_name():
    wan = Wan(WanModel(1), images=2)
    how = {"budget": ah.Budget(module_flops=0.5), "adapter": ADAPTER, "progress": False}
    with pytest.raises(InputsInvalid, match="got a tuple from the callable"):
        ah.search(wan.model, lambda: tuple(wan.sample()), **how)
    with pytest.raises(InputsInvalid, match=r"several shapes, \(4, 3, 4, 6\), \(2, 3, 4, 6\), in one batch"):
        ah.search(wan.model, lambda: [wan.sample()[0], wan.sample()[0][:2]], **how)
    with pytest.raises(InputsInvalid, match="final latents of 4 images from the callable, wanted those of 2"):
        ah.search(wan.model, lambda: wan.sample()[0], **how)


def test_latents_that_are_not_the_first_argument():
    class TimeFirst(Stacked):
        def forward(self, t, x):
            return torch.stack(self.inner(list(x), t.expand(len(x)), [torch.zeros(1, 16)] * len(x), 18))

    model = TimeFirst(WanModel(1))
    adapter = ah.Adapter({r"inner\.blocks\.\d+\.self_attn": ah.Attention()}, tokens=lambda *_: ah.Tokens.of_grid(3, 2, 3))
    with pytest.raises(InputsInvalid, match="got a Tensor as the first argument of a TimeFirst, wanted the latents"):
        ah.search(model, lambda: model(torch.tensor(1.0), torch.randn(1, 4, 3, 4, 6)), adapter=adapter, progress=False)
