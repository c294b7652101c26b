"""A calibration's memory: what is held is what was said, and blocks that run again on the way back give the same table."""

import inspect
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from budget import flux as make_flux
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from families import hunyuan_dit
from pipelines import BENCHES, JOINT
from test_flux import bench as flux_fixture
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import CalibrationFitted, InputsInvalid
from arrowhead.models.find import find
from arrowhead.plans.layout import ALL_KINDS, Tokens
from arrowhead.searches.budget.sensitivity import recording
from arrowhead.searches.budget.sensitivity.footprint import held_bytes
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


def tables_of(bench, inputs, **settings):
    extents = [ah.Extent(radii=(2,), ages=2, **settings, one_by_one=own) for own in (False, True)]
    return [ah.calibrate(bench.pipe, inputs(), extent=extent, progress=False) for extent in extents]


@pytest.mark.parametrize(("name", "vectors"), [("dit", 1), ("sd3", 2), ("flux", 1)])
def test_prompts_one_after_another_make_the_table_of_all_at_once(name, vectors, monkeypatch):
    bench = (MAKES | {"flux": make_flux})[name]()

    def inputs():
        noise = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
        return bench.inputs(images=3, steps=4, generator=noise)

    rows = []
    bench.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"] if not args else args[0])), with_kwargs=True
    )
    with left_as_it_was(bench):
        whole, apart = tables_of(bench, inputs, vectors=vectors)
    assert 3 * min(rows) == max(rows)
    for kind in ("outputs", "residuals"):
        torch.testing.assert_close(getattr(apart, kind), getattr(whole, kind), rtol=1e-5, atol=1e-12)
    for kind in ("sampler_gains", "model_feedback", "final", "other_flops"):
        assert getattr(apart, kind) == pytest.approx(getattr(whole, kind), rel=1e-4), kind
    assert (apart.images, apart.regions) == (whole.images, whole.regions)
    said = [ah.calibration_bytes(bench.pipe, inputs(), extent=ah.Extent(one_by_one=own)) for own in (False, True)]
    assert said[0] == 3 * said[1]


def test_a_budget_whose_prompts_run_one_after_another():
    bench = BENCHES["dit"]()

    def found(**settings):
        noise = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
        extent = ah.Extent(radii=(2,), ages=2, **settings)
        inputs = bench.inputs(images=2, steps=4, generator=noise)
        return ah.search(bench.pipe, inputs, budget=ah.Budget(module_flops=0.6), extent=extent, progress=False)

    whole, apart = found(), found(one_by_one=True)
    assert apart.cells == whole.cells
    assert apart.about["search"]["measured_error"] == pytest.approx(whole.about["search"]["measured_error"], rel=1e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "list of generators"),
        ({"generator": [torch.Generator()]}, "list of generators"),
        ({"num_images_per_prompt": 2}, "repeat"),
    ],
    ids=["one generator", "too few", "several pictures"],
)
def test_prompts_that_cannot_be_told_apart(given, said):
    bench = MAKES["sd3"]()
    with left_as_it_was(bench), pytest.raises(InputsInvalid, match=said):
        ah.calibrate(bench.pipe, bench.inputs(images=3) | given, extent=ah.Extent(one_by_one=True), progress=False)


def test_flux_with_eight_prompts_fits():
    """The real one, of which only the sizes are here: 12 billion weights, 1024 × 1024 pixels, 512 tokens of text, bfloat16."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True, num_layers=1, num_single_layers=1)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)
    found, tokens = find(pipe, ALL_KINDS).sites, Tokens(4096, 512, text_first=True)
    every = [site for site in found for _ in range(38 if site.path.startswith("single") else 19)]
    blocks = [site for site in every if site.kind == "block"]
    sites = [site for site in every if site.kind != "block" or site.weights]
    plain, small = (
        held_bytes(extent, sites, blocks, tokens, rows, 2, torch.device("cuda")) / 2**30
        for extent, rows in ((ah.Extent(), 8), (ah.Extent(one_by_one=True, checkpoint=True, cache_dtype="int8"), 1))
    )
    assert plain > 400
    assert 30 < small < 31


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (1.0, {}),
        (0.9, {"one_by_one": True}),
        (0.4, {"checkpoint": True, "one_by_one": True}),
        (0.0, {"checkpoint": True, "one_by_one": True, "cache_dtype": "int8"}),
    ],
)
def test_without_an_extent_it_is_what_fits(part, settings, monkeypatch):
    """On a device with a part of the memory that is needed free."""
    bench = MAKES["dit"]()

    def inputs():
        return bench.inputs(images=2, steps=3, generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)])

    own, needed = recording.needed_bytes, []
    monkeypatch.setattr(recording, "needed_bytes", lambda *args: needed.append(own(*args)) or needed[-1])
    monkeypatch.setattr(recording, "free_bytes", lambda _: 2**60)
    ah.calibrate(bench.pipe, inputs(), progress=False)
    monkeypatch.setattr(recording, "free_bytes", lambda _: int(part * needed[0]))
    extent, named = ah.Extent(**settings), ", ".join(f"{name}={value!r}" for name, value in settings.items())
    with pytest.warns(CalibrationFitted, match=named) if settings else nullcontext():
        found = ah.calibrate(bench.pipe, inputs(), progress=False)
    wanted = ah.calibrate(bench.pipe, inputs(), extent=extent, progress=False)
    assert torch.equal(found.outputs, wanted.outputs)
    assert found.about["search"] == wanted.about["search"]


def test_a_model_that_diffusers_cannot_checkpoint(monkeypatch):
    """HunyuanDiT has the method, which fails: asked for it is refused by name, and by itself it goes on to 8 bits."""
    bench = hunyuan_dit()
    inputs = partial(bench.inputs, num_inference_steps=2)
    with pytest.raises(InputsInvalid, match=r"got checkpoint=True for a HunyuanDiT2DModel, .* wanted .*; leave it out"):
        ah.calibrate(bench.pipe, inputs(), extent=ah.Extent(checkpoint=True), progress=False)
    monkeypatch.setattr(recording, "free_bytes", lambda _: 0)
    with pytest.warns(CalibrationFitted, match=re.escape("Extent(cache_dtype='int8')")):
        found = ah.calibrate(bench.pipe, inputs(), progress=False)
    assert found.about["search"]["cache_dtype"] == "int8"
