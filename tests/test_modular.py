"""Modular pipelines of diffusers: plans, searches and removal work on them as on a pipeline; the branches are the guider's."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    Flux2KleinAutoBlocks,
    Flux2KleinBaseAutoBlocks,
    QwenImageAutoBlocks,
    SkipLayerGuidance,
    Wan22Blocks,
    WanBlocks,
    ZImageAutoBlocks,
)
from diffusers.guiders import AutoGuidance
from families import flux2, qwen, wan, wan22, wan_transformer, z_image
from family_bench import FamilyBench, flow
from family_replay import random_cells, replaying
from replay import Trace, assert_identical, distance
from test_families import plan_of

import arrowhead as ah
from arrowhead.errors import InputsInvalid, PlanAdapted
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL

STEPS = 5


def wide(seed: int) -> Any:
    """A transformer of the channels that modular Wan takes without a VAE."""
    return wan_transformer(seed, in_channels=16, out_channels=16)


MADE = {
    "z_image": (ZImageAutoBlocks, z_image),
    "qwen": (QwenImageAutoBlocks, qwen),
    "flux2_klein_base": (Flux2KleinBaseAutoBlocks, flux2),
    "flux2_klein": (Flux2KleinAutoBlocks, flux2),
    "wan": (WanBlocks, lambda: wan(transformer=wide(0))),
    "wan22": (Wan22Blocks, lambda: wan22(transformer=wide(0), transformer_2=wide(1))),
}
NAMES = ("prompt_embeds", "negative_prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds_mask", "generator")
SIZES = ("height", "width", "num_frames", "num_inference_steps")


@dataclass
class ModularBench(FamilyBench):
    """A modular pipeline that is given embeddings, around the transformer of a family's bench."""

    guider: bool = True


def made(name: str, guidance: float = 3.0) -> ModularBench:
    blocks, base = MADE[name]
    bench = base()
    pipe = blocks().sub_blocks["denoise"].init_pipeline()
    names = [each for each in ("transformer", "transformer_2") if getattr(bench.pipe, each, None) is not None]
    pipe.update_components(scheduler=flow(), **{each: getattr(bench.pipe, each) for each in names})
    for each in ("guider", "guider_2"):
        if hasattr(pipe, each):
            pipe.update_components(**{each: ClassifierFreeGuidance(guidance_scale=guidance)})
    guided = hasattr(pipe, "guider")

    def inputs(seed: int = 0, images: int = 1, **more: Any) -> dict[str, Any]:
        call = bench.inputs(seed, images) | more
        taken = {each: value for each, value in call.items() if each in (*NAMES, *SIZES)}
        if not guided:
            del taken["negative_prompt_embeds"]
        return taken | {"output": "latents"}

    sizes = {"visual": bench.visual, "text": bench.text, "text_first": bench.text_first, "text_seen": bench.text_seen}
    return ModularBench(pipe, True, inputs=inputs, two_calls=True, switch=bench.switch, guider=guided, **sizes)


def trace(bench: ModularBench, inputs: dict[str, Any]) -> Trace:
    outputs: list[torch.Tensor] = []

    def seen(_module: Any, _args: Any, output: Any) -> None:
        sample = output[0]
        outputs.append(torch.stack(sample) if isinstance(sample, list) else sample.clone())

    hooks = [each.register_forward_hook(seen) for each in find(bench.pipe).transformers]
    try:
        return Trace(bench.pipe(**inputs).clone(), outputs)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", MADE)
def test_plans_are_what_a_replay_gives(name, guidance):
    bench = made(name, guidance)
    guided = bench.guider and guidance > 1
    model = find(bench.pipe)
    untouched = trace(bench, bench.inputs(images=2))
    assert len(untouched.outputs) == STEPS * (1 + guided)
    with ah.applied(bench.pipe, plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guided)) as run:
        assert_identical(trace(bench, bench.inputs(images=2)), untouched)
        assert run.summary().notes == ()
    cells = random_cells(3, model.sites, STEPS, guided, bench.switch)
    with ah.applied(bench.pipe, plan_of(bench, model, cells, guided)) as run:
        given = trace(bench, bench.inputs(images=2))
        assert run.summary().notes == ()
    with replaying(bench, model.modules, cells, guided):
        assert distance(given, trace(bench, bench.inputs(images=2))) < 1e-5
    assert distance(given, untouched) > 1e-2
    assert_identical(trace(bench, bench.inputs(images=2)), untouched)  # the plan is off


@pytest.mark.parametrize("how", [{"threshold": 0.7}, {"budget": ah.Budget(module_flops=0.6)}], ids=["greedy", "budget"])
@pytest.mark.parametrize("name", ["z_image", "qwen", pytest.param("wan22", marks=pytest.mark.slow)])
def test_searches_find_plans_that_run(name, how):
    bench = made(name)
    untouched = trace(bench, bench.inputs())
    plan = ah.search(bench.pipe, bench.inputs(), progress=False, **how)
    assert plan.guided
    assert plan.calls == 2
    assert plan.flops().module < 0.95
    with ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs())
        assert run.summary().flops.module == pytest.approx(plan.flops().module)
        assert run.summary().notes == ()
    ah.apply(bench.pipe, plan)
    ah.remove(bench.pipe)
    assert_identical(trace(bench, bench.inputs()), untouched)


def test_a_plan_serves_the_pipeline_and_the_modular_one():
    """Both have the same sites; Z-Image's pipeline brings its branches in one batch, the modular one in two calls."""
    bench, plain = made("z_image"), z_image()
    plan = ah.search(plain.pipe, plain.inputs(), threshold=0.7, progress=False)
    with ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs())
        assert run.summary().flops.module == pytest.approx(plan.flops().module)


def test_guidance_that_ends_early_is_followed():
    bench = made("qwen")
    model = find(bench.pipe)
    plan = plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, True)
    bench.pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0, stop=0.6))
    untouched = trace(bench, bench.inputs())
    assert len(untouched.outputs) == 3 * 2 + 2
    with ah.applied(bench.pipe, plan), pytest.warns(PlanAdapted, match="guidance ends before step 3"):
        assert_identical(trace(bench, bench.inputs()), untouched)
    with pytest.raises(InputsInvalid, match=r"stop=0\.6 of the guider.*leave it out"):
        ah.search(bench.pipe, bench.inputs(), threshold=0.7, progress=False)


@pytest.mark.parametrize(
    ("guider", "says"),
    [
        (lambda: SkipLayerGuidance(skip_layer_guidance_layers=[0]), "SkipLayerGuidance, which calls the transformer 3 times"),
        (lambda: AutoGuidance(auto_guidance_layers=[0], dropout=0.1), "AutoGuidance, which leaves out layers"),
    ],
)
def test_guiders_of_other_branches_are_refused(guider, says):
    bench = made("qwen")
    model = find(bench.pipe)
    bench.pipe.update_components(guider=guider())
    with pytest.raises(InputsInvalid, match=f"{says}.*ClassifierFreeGuidance"):
        ah.search(bench.pipe, bench.inputs(), threshold=0.7, progress=False)
    with (
        ah.applied(bench.pipe, plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, True)),
        pytest.raises(InputsInvalid, match=f"{says}.*ClassifierFreeGuidance"),
    ):
        bench.pipe(**bench.inputs())
