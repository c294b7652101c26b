"""Special cases of FLUX.2 and Z-Image: distilled weights, reference images, inputs in lists."""

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from families import CHANNELS, flux2, hunyuan_dit, lumina2, z_image
from family_replay import random_cells, replaying
from PIL import Image
from replay import assert_identical, distance, trace
from test_families import INNER, STEPS, plan_of

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.run import CalibrationRun
from arrowhead.errors import InputsInvalid
from arrowhead.models.find import find
from arrowhead.models.token_layouts import Z_IMAGE_MULTIPLE
from arrowhead.plans.cells import FULL


@pytest.mark.parametrize(
    ("make", "left_alone"),
    [(hunyuan_dit, set()), (lumina2, {"context_refiner"}), (flux2, set()), (z_image, {"noise_refiner", "context_refiner"})],
)
def test_every_attention_outside_of_the_refiners_is_a_site(make, left_alone):
    bench = make()
    attends = {path for path, module in bench.pipe.transformer.named_modules() if hasattr(module, "processor")}
    sites = {site.path for site in find(bench.pipe, {"self_attention", "cross_attention"}).sites}
    assert {path.split(".")[0] for path in attends - sites} == left_alone
    assert sites <= attends


def test_distilled_klein_is_not_guided():
    bench = flux2()
    bench.pipe.register_to_config(is_distilled=True)
    model = find(bench.pipe, INNER)
    untouched = trace(bench, bench.inputs())
    assert len(untouched.outputs) == STEPS
    with ah.applied(bench.pipe, plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guided=False)) as run:
        assert_identical(trace(bench, bench.inputs()), untouched)
        assert run.summary().notes == ()
    assert not ah.search(bench.pipe, bench.inputs(), threshold=0.7, progress=False).guided


@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
def test_tokens_of_reference_images_are_attended_to_and_dropped(guidance):
    bench, guided = flux2(), guidance > 1
    bench.visual = 4 * 5 + 4 * 5 + 4 * 4
    references = [Image.effect_noise(size, 64).convert("RGB") for size in ((80, 64), (64, 64))]
    inputs = {"guidance": guidance, "image": references}
    model = find(bench.pipe, INNER)
    cells = random_cells(3, model.sites, STEPS, guided)
    with ah.applied(bench.pipe, plan_of(bench, model, cells, guided)):
        given = trace(bench, bench.inputs(**inputs))
    with replaying(bench, model.modules, cells, guided):
        assert distance(given, trace(bench, bench.inputs(**inputs))) < 1e-5
    calibration, seen = CalibrationRun(driver_of(bench.pipe, bench.inputs(**inputs)), model), []
    calibration.run(lambda step: seen.append(step.full().shape[1]), first_only=True)
    assert seen == [4 * 5]
    for how in ({"threshold": 0.7}, {"budget": ah.Budget(module_flops=0.6)}):
        plan = ah.search(bench.pipe, bench.inputs(**inputs), progress=False, **how)
        assert plan.tokens == bench.tokens
        with ah.applied(bench.pipe, plan) as run:
            bench.pipe(**bench.inputs(**inputs))
            assert run.summary().flops.module == pytest.approx(plan.flops().module)


def texts(*lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, CHANNELS, generator=generator).double() for length in lengths]


@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("seed", range(2))
def test_prompts_of_other_lengths_in_one_batch(guidance, seed):
    """Z-Image pads each to a multiple of 32, then to the longest, which it masks; images come before, at the same positions."""
    bench, guided = z_image(), guidance > 1
    bench.text = bench.text_seen = 64
    inputs = {"images": 2, "guidance": guidance, "prompt_embeds": texts(7, 40, seed=seed)}
    inputs["negative_prompt_embeds"] = texts(3, 3, seed=seed + 1)
    model = find(bench.pipe, INNER)
    cells = random_cells(seed, model.sites, STEPS, guided)
    with ah.applied(bench.pipe, plan_of(bench, model, cells, guided)) as run:
        given = trace(bench, bench.inputs(**inputs))
        assert run.summary().notes == ()
    with replaying(bench, model.modules, cells, guided):
        assert distance(given, trace(bench, bench.inputs(**inputs))) < 1e-5
    untouched = trace(bench, bench.inputs(**inputs))
    assert distance(given, untouched) > 1e-2
    with ah.applied(bench.pipe, plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guided)):
        assert_identical(trace(bench, bench.inputs(**inputs)), untouched)


def test_a_plan_serves_prompts_of_any_length():
    bench = z_image()
    model = find(bench.pipe)
    plan = plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guided=False)
    with ah.applied(bench.pipe, plan) as run:
        for length in (1, 20, 32, 33):
            bench.pipe(**bench.inputs(guidance=1.0, prompt_embeds=texts(length, seed=0)))
            assert run.summary().notes == ()


def test_texts_are_padded_to_the_multiple_of_diffusers():
    assert Z_IMAGE_MULTIPLE == SEQ_MULTI_OF


def test_images_of_several_sizes_are_refused():
    arguments = {"x": [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 10)], "cap_feats": texts(3, 3, seed=0)}
    with pytest.raises(InputsInvalid, match=r"\(1, 8, 8\), \(1, 8, 10\).*wanted one"):
        find(z_image().pipe).tokens(arguments | {"patch_size": 2, "f_patch_size": 1})


@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
def test_guidance_that_ends_early_is_refused(guidance):
    bench = z_image()
    inputs = bench.inputs(guidance=guidance, cfg_truncation=0.5)
    if guidance == 1:
        assert not ah.search(bench.pipe, inputs, threshold=0.7, progress=False).guided
        return
    with pytest.raises(InputsInvalid, match=r"cfg_truncation=0\.5.*leave it out"):
        ah.search(bench.pipe, inputs, threshold=0.7, progress=False)
