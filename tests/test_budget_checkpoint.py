"""A calibration's memory: what is held is what was said, and blocks that run again on the way back give the same table."""

import inspect
from functools import partial

import pytest
import torch
from budget import flux as make_flux
from pipelines import BENCHES, JOINT
from test_flux import bench as flux_fixture
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.models.find import find
from arrowhead.searches.budget.sensitivity.gradient_products import GradientProducts

flux = flux_fixture
MAKES = {**BENCHES, **JOINT}


def counting_passes(bench):
    """How often the first block's feed-forward runs, counted where it multiplies."""
    passes = []
    bench.pipe.transformer.transformer_blocks[0].ff.net[0].register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("name", MAKES)
def test_the_table_is_the_same(name):
    bench = MAKES[name]()
    passes = counting_passes(bench)
    tables = []
    for checkpoint, wanted in ((False, 3), (True, 6)):  # forward once, or once more for the way back
        extent = ah.Extent(radii=(2,), ages=2, checkpoint=checkpoint)
        with left_as_it_was(bench):
            passes.clear()
            tables.append(ah.calibrate(bench.pipe, bench.inputs(images=2, steps=3), extent=extent, progress=False))
            assert len(passes) == wanted
        assert not bench.pipe.transformer.is_gradient_checkpointing
    torch.testing.assert_close(tables[0].outputs, tables[1].outputs, rtol=1e-6, atol=0)
    torch.testing.assert_close(tables[0].residuals, tables[1].residuals, rtol=1e-6, atol=0)
    assert tables[0].outputs[1:].abs().max() > 0
    assert tables[0].other_flops == tables[1].other_flops


def test_a_pipeline_that_is_checkpointed_already_stays_so():
    bench = BENCHES["dit"]()
    bench.pipe.transformer.enable_gradient_checkpointing()
    passes = counting_passes(bench)
    ah.calibrate(bench.pipe, bench.inputs(steps=3), extent=ah.Extent(ages=1), progress=False)
    assert len(passes) == 6
    assert bench.pipe.transformer.is_gradient_checkpointing


def test_two_calls_a_step_cannot_be_checkpointed(flux):
    inputs = flux.inputs(true_cfg=3.0)
    with left_as_it_was(flux), pytest.raises(InputsInvalid, match="calls its transformer twice"):
        ah.calibrate(flux.pipe, inputs, extent=ah.Extent(checkpoint=True), progress=False)


class Held:
    """Counts, in each step as products are taken, the bytes of the histories, of the gradients and of the blocks' inputs."""

    def __init__(self, monkeypatch, bench):
        self.bytes, self._saved, self._inputs = [], [], {}
        self._counts = bench.pipe.transformer  # whose blocks' inputs count where it is checkpointed
        own = GradientProducts.of_all_sites

        def of_all_sites(products, gradients):
            kept = {tensor.data_ptr() for tensor in self._saved}
            history = sum(tensor.nbytes for tensor in products.history.tensors)
            inputs = sum(size for place, size in self._inputs.items() if place in kept) * self._counts.is_gradient_checkpointing
            self.bytes.append(history + sum(gradient.nbytes for gradient in gradients.values()) + inputs)
            self._saved.clear()
            self._inputs.clear()
            return own(products, gradients)

        monkeypatch.setattr(GradientProducts, "of_all_sites", of_all_sites)
        for site, block in find(bench.pipe, {"block"}).modules.items():
            names = [*inspect.signature(block.forward).parameters]
            text = any(own.joint for own in site.within)
            block.register_forward_pre_hook(partial(self._enters, names, text), with_kwargs=True)

    def _enters(self, names, text, _, args, kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        for tensor in (given[names[0]], given["encoder_hidden_states"] if text else None):
            if tensor is not None:
                self._inputs[tensor.data_ptr()] = tensor.nbytes

    def calibrate(self, bench, inputs, extent):
        def pack(tensor):
            self._saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return ah.calibrate(bench.pipe, inputs, extent=extent, progress=False)


WAYS = {
    "plain": {},
    "int8": {"cache_dtype": "int8", "precisions": ("int8",)},
    "fp8, on the CPU": {"cache_dtype": "fp8", "cache_device": "cpu"},
    "checkpointed": {"checkpoint": True},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "plain") for name in [*MAKES, "flux"]), ("flux", "int8"), ("sd3", "int8"), ("dit", "fp8, on the CPU")]
    + [(name, "checkpointed") for name in ("dit", "sd3", "pixart_sigma", "flux")],
)
def test_what_is_held_is_what_was_said_beforehand(name, way, monkeypatch):
    """With more steps than are looked back on; all tensors of the last steps, counted where they are."""
    bench = (MAKES | {"flux": make_flux})[name]()
    extent = ah.Extent(radii=(4, 2), ages=2, **WAYS[way])
    inputs = {"images": 2, "steps": 5, "guidance": 1.0 if name == "flux" and way == "checkpointed" else 3.0}
    with left_as_it_was(bench, **inputs):
        said = ah.calibration_bytes(bench.pipe, bench.inputs(**inputs), extent=extent)
    held = Held(monkeypatch, bench)
    held.calibrate(bench, bench.inputs(**inputs), extent)
    assert max(held.bytes) == said
