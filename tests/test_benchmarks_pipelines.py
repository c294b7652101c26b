"""The benchmark of whole transformers: public models, plans that leave what they should, FLOPs that torch counts, too."""

import importlib
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import ASC, AST, FULL, Attend, Cached, Full
from arrowhead.plans.flops import full_flops
from arrowhead.searches.budget.sensitivity.outside_flops import flop_counter

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PUBLIC = {  # parameters, visual tokens, text tokens beside them, TFLOP of attention's two matmuls in a step
    "DiT-XL/2-512": (675e6, 1024, 0, 0.27),
    "PixArt-Σ-1024": (0.61e9, 4096, 0, 4.33),
    "PixArt-Σ-2K": (0.61e9, 16384, 0, 69.3),
    "SD3-1024": (2.03e9, 4096, 333, 5.8),
    "SD3-2K": (2.03e9, 16384, 333, 82.4),
    "FLUX-1024": (11.9e9, 4096, 512, 14.9),
    "FLUX-2K": (11.9e9, 16384, 512, 200),
}
LONG = {("FLUX-1024", 0), ("FLUX-1024", 1), ("FLUX-2K", 0), ("FLUX-2K", 1), ("SD3-2K", 0), ("SD3-2K", 1)}
STEPS = 4


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("real_sizes")


@pytest.fixture
def levels(sizes):
    return importlib.import_module("levels")


@pytest.fixture
def benchmark(sizes):
    spec = importlib.util.spec_from_file_location("benchmarks_pipelines", BENCHMARKS / "pipelines.py")
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def of_name(sizes, name):
    (model,) = [model for model in sizes.MODELS if model.name == name]
    return model


@pytest.mark.parametrize("name", PUBLIC)
def test_models_are_the_public_ones(sizes, name):
    model = of_name(sizes, name)
    pipe = model.build("meta")
    parameters, visual, text, teraflops = PUBLIC[name]
    weights = {path: weight.numel() for path, weight in pipe.transformer.named_parameters()}
    repeated = sum(size for path, size in weights.items() if ".emb." in path and "transformer_blocks.0." not in path)
    assert sum(weights.values()) - repeated == pytest.approx(parameters, rel=0.005)  # DiT's embedding stands in every block
    found = find(pipe)
    inputs = model.call("meta")["inputs"]
    tokens = found.tokens(found.transformer_arguments((), inputs))
    assert tokens.flat == model.attended
    assert (tokens.visual, tokens.text) == (visual, text)
    samples = 2 if model.guided else 1
    assert full_flops(found.sites, tokens, samples).attention == pytest.approx(teraflops * 1e12, rel=0.02)
    out = pipe.transformer(**inputs, return_dict=False)[0]
    assert out[..., :4].shape[-2:] == (inputs["hidden_states"].shape[-2], 4)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param(name, place, marks=[pytest.mark.slow] if (name, place) in LONG else [])
        for name in PUBLIC
        for place in range(3)
    ],
)
def test_plans_leave_what_the_papers_report(sizes, levels, name, place):
    model, level = of_name(sizes, name), levels.LEVELS[name][place]
    pipe = model.build("meta")
    plan = levels.plan(level, target_of(find(pipe)), model.attended, 10, guided=model.guided)
    assert getattr(plan.flops(), level.of) == pytest.approx(level.left, abs=0.02)
    assert set(plan.cells[0]) == {FULL}
    kinds = {"full", "WA-RS", "cached", "WA"} if level.of == "attention" else {"full", "WA-RS", "AST"}
    assert set(plan.count_heads()) == kinds


def plain_cells(draw, sites, *, guided):
    """Steps × sites of cells without bands: those that are computed in whole or not at all, heads of both kinds, too."""

    def cell(site):
        heads = Attend(tuple(draw.choice([Full(), Cached()]) for _ in range(site.heads)))
        return draw.choice([FULL, AST, heads, *([ASC] if guided else [])])

    return [[FULL] * len(sites), *([cell(site) for site in sites] for _ in range(STEPS - 1))]


@pytest.mark.parametrize("name", ["DiT-XL/2-512", "PixArt-Σ-1024", "SD3-1024", "FLUX-1024"])
def test_fractions_of_plain_plans_are_what_torch_counts(sizes, benchmark, name):
    model = of_name(sizes, name).shrunk()
    pipe = model.build("cpu")
    call = model.call("cpu") | {"num_inference_steps": STEPS}
    target = target_of(find(pipe))
    cells = plain_cells(random.Random(), target.sites, guided=model.guided)
    plan = ah.Plan(tuple(map(tuple, cells)), target, model.attended, model.guided)

    def counted():
        with flop_counter() as counter:
            out = pipe(**call)
        assert out.isfinite().all()
        return counter.get_total_flops()

    raw = counted()
    with ah.applied(pipe, plan):
        saved = raw - counted()
    whole = full_flops(target.sites, model.attended, plan.samples).module * STEPS
    left = benchmark.flops_left(pipe, plan)
    assert 1 - saved / whole == pytest.approx(left["module"])
    assert 1 - saved / raw == pytest.approx(left["whole"], abs=0.02)  # patches and modulation lie outside of blocks


def test_a_small_run(benchmark, tmp_path):
    out = tmp_path / "small.json"
    benchmark.main(out=out, model=["DiT-XL/2-512"], steps=3, rounds=1, small=True)
    benchmark.main(out=out, model=["SD3-1024"], steps=3, rounds=1, small=True)
    dit, sd3 = json.loads(out.read_text())["models"]
    assert (dit["model"], sd3["model"]) == ("DiT-XL/2-512", "SD3-1024")
    assert out.with_suffix(".png").exists()
    assert [row["projections"] for row in sd3["rows"]] == ["of computed heads", "all"] * 3
    for skipping, projecting in zip(sd3["rows"][::2], sd3["rows"][1::2], strict=True):
        assert skipping["bound"] > projecting["bound"] > 1
    for row in dit["rows"] + sd3["rows"]:
        assert 0 < row["attention_seconds"] < row["seconds"]
