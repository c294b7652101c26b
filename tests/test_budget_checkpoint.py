"""A calibration's memory: what is held is what was said, and blocks that run again on the way back give the same table."""

import pytest
import torch
from budget import flux as make_flux
from pipelines import BENCHES, JOINT
from test_flux import bench as flux_fixture
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.searches.budget.sensitivity.recorder import Recorder

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


@pytest.mark.parametrize("name", [*MAKES, "flux"])
@pytest.mark.parametrize("guided", [True, False])
def test_what_is_held_is_what_was_said_beforehand(name, guided, monkeypatch):
    """With more steps than are looked back on; all tensors of the last steps, counted where they are."""
    bench = (MAKES | {"flux": make_flux})[name]()
    extent = ah.Extent(radii=(4, 2), ages=2, precisions=("int8",) if guided else ())
    inputs = {"images": 2, "steps": 5, "guidance": 3.0 if guided else 1.0}
    held, own = [], Recorder.follow

    def follow(self, *args):
        own(self, *args)
        held.append(sum(tensor.nbytes for tensor in self.history.tensors))

    monkeypatch.setattr(Recorder, "follow", follow)
    with left_as_it_was(bench, **inputs):
        said = ah.calibration_bytes(bench.pipe, bench.inputs(**inputs), extent=extent)
        assert not held
    ah.calibrate(bench.pipe, bench.inputs(**inputs), extent=extent, progress=False)
    assert max(held) == said
