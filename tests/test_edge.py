"""The edges that people touch: command line, demo, evaluation, the bundled model, the example."""

import json
import os
import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from families import wan22
from PIL import Image
from pipelines import BENCHES
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

import arrowhead as ah
from arrowhead.cli import demo, main
from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.side_by_side import evaluate
from arrowhead.metrics.images import psnr, ssim
from arrowhead.plans.cells import FULL, Reuse, paper_name

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
INPUTS = ["-i", "class_labels=[1, 4]", "-i", "num_inference_steps=3"]


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, [str(a) for a in arguments], env={"COLUMNS": "120"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def saved_dit(tmp_path_factory) -> Path:
    """A real DiTPipeline with random weights in a folder, as a person would have one."""
    folder = tmp_path_factory.mktemp("models") / "dit"
    BENCHES["dit"](torch.float32).pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["tiny:dit", "folder"])
def test_search_show_generate_evaluate(model, saved_dit, tmp_path):
    model = saved_dit if model == "folder" else model
    plan, images = tmp_path / "plan.json", tmp_path / "images"
    found = invoke("search", model, *INPUTS, "--threshold", "0.5", "--out", plan, "--seed", 3)
    loaded = ah.Plan.load(plan)
    assert loaded.steps == 3
    assert f"{loaded.flops().attention:.1%}" in found

    shown = invoke("show", plan, "--png", tmp_path / "plan.png")
    assert sum(line.startswith("step") for line in shown.splitlines()) == 3
    assert Image.open(tmp_path / "plan.png").width > 500

    said = invoke("generate", model, *INPUTS, "--plan", plan, "--out", images)
    assert "3 of 3" in said
    invoke("generate", model, *INPUTS, "--out", tmp_path / "raw")
    assert [p.name for p in sorted(images.iterdir())] == ["000.png", "001.png"]
    pipe = main.load(str(model), "cpu", "float32")
    raw = pipe([1, 4], num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
    assert [np.array(Image.open(p)).tolist() for p in sorted((tmp_path / "raw").iterdir())] == [
        np.array(i).tolist() for i in raw
    ]

    invoke("evaluate", model, *INPUTS, "--plan", plan, "--seeds", 2, "--out", tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["images"] == 4
    assert table["plans"]["plan"]["flops"]["attention"] == pytest.approx(loaded.flops().attention)


@pytest.mark.parametrize("measure", ["module_flops", "transformer_flops"])
def test_a_sweep_and_another_from_its_table(measure, tmp_path):
    """The second one runs no model: there is none of that name."""
    asked = ["--measure", measure, "--points", 3, "--least", 0.4]
    invoke("sweep", "tiny:dit", *INPUTS, *asked, "--out", tmp_path / "a")
    invoke("sweep", "of its own", *INPUTS, *asked, "--table", tmp_path / "a/table.safetensors", "--out", tmp_path / "b")
    for folder in ("a", "b"):
        plans = {path.stem: ah.Plan.load(path) for path in (tmp_path / folder).glob("*.json")}
        assert sorted(plans) == ["0.400", "0.700", "1.000"]
        left = {name: plan.about["search"][measure] for name, plan in plans.items()}
        assert all(float(name) - 1 / 3 < value <= float(name) for name, value in left.items())  # steps are three
        assert Image.open(tmp_path / folder / "sweep.png").width > 500


def test_an_evaluation_without_any_loss_is_still_json(tmp_path):
    """PSNR is infinite then, which JSON does not know."""
    invoke("search", "tiny:dit", *INPUTS, "--threshold", "0", "--out", tmp_path / "deep/plan.json")
    said = invoke(
        "evaluate", "tiny:dit", *INPUTS, "--plan", tmp_path / "deep/plan.json", "--seeds", 1, "--out", tmp_path / "t.json"
    )
    assert "inf" in said
    table = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)
    assert table["plans"]["plan"]["psnr"] is None
    assert table["plans"]["plan"]["ssim"] == pytest.approx(1)
    assert {"device", "dtype", "versions", "seeds"} <= set(table)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search", "tiny:dit", "-i", "num_inference_steps"], "NAME=VALUE"),
        (["search", "tiny:dit", "-i", "prompt=a cat"], "class_labels"),
        (["search", "tiny:dit", *INPUTS, "--threshold", "much"], "D1, D2"),
        (["search", "tiny:dit", *INPUTS, "--dtype", "float33"], "bfloat16"),
        (["generate", "tiny:nothing", *INPUTS], "'dit', 'mmdit'"),
        (["generate", "no/such/folder", *INPUTS], "tiny:dit"),
        (["generate", "tiny:dit", *INPUTS, "--device", "cuda:77"], "such as cpu"),
        (["generate", "tiny:dit", *INPUTS, "-i", "prompt=a cat"], "class_labels"),
        (["show", "pyproject.toml"], "Plan.save"),
        (["show", "nowhere.json"], "does not exist"),
    ],
)
def test_refusals_are_one_message_and_exit_2(arguments, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["arrowhead", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in " ".join(error.split())
    assert "Traceback" not in error


def test_psnr_and_ssim_agree_with_scipy():
    raw = torch.rand(3, 3, 32, 32)
    images = (raw + 0.1 * torch.randn(raw.shape)).clamp(0, 1)
    a, b = images.double().numpy(), raw.double().numpy()
    assert psnr(images, raw) == pytest.approx(-10 * np.log10(((a - b) ** 2).mean()))
    assert psnr(raw, raw) == float("inf")

    def smooth(x):  # Gaussian of 11 × 11 pixels over each channel
        return gaussian_filter(x, sigma=(0, 0, 1.5, 1.5), truncate=5 / 1.5, mode="mirror")

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, cov = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    assert ssim(images, raw) == pytest.approx(index.mean(), abs=1e-5)  # borders mirrored and averaged like the rest


def test_evaluation_pairs_seeds_and_counts_what_was_done():
    pipe = ah.tiny.load("dit")
    inputs = {"class_labels": [2, 6], "num_inference_steps": 3}
    half = ah.search(pipe, inputs, threshold=0.3, progress=False)
    cells = ((FULL,) * 8,) * 3
    full = ah.Plan(cells, half.target, half.tokens, half.guided)
    result = evaluate(pipe, {"full": full, "half": half}, inputs, seeds=(5, 7), progress=False)
    expected = torch.cat([pipe(**inputs, generator=torch.Generator().manual_seed(s), output_type="pt").images for s in (5, 7)])
    assert torch.equal(result.raw, expected)
    assert torch.equal(result.scores[0].images, expected)
    assert result.scores[0].metrics == {"psnr": float("inf"), "ssim": pytest.approx(1)}
    assert result.scores[1].metrics["psnr"] < 100
    assert result.scores[1].summary.flops == half.flops()


@pytest.mark.parametrize("boundary", [0.875, 1.1])  # the second transformer from the second step, or from the first
def test_videos_of_two_transformers_are_compared_frame_by_frame(boundary):
    bench = wan22()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    bench.pipe.register_modules(vae=vae.double().eval())
    bench.pipe.register_to_config(boundary_ratio=boundary)
    inputs = {name: value for name, value in bench.inputs(steps=3).items() if name not in ("generator", "output_type")}
    plan = ah.search(bench.pipe, inputs, threshold=0.5, progress=False)
    assert plan.switch == (1 if boundary < 1 else 0)
    calls = []
    for transformer in (bench.pipe.transformer, bench.pipe.transformer_2):
        transformer.register_forward_hook(lambda *_: calls.append(1))
    result = evaluate(bench.pipe, {"plan": plan}, inputs, seeds=(1, 2), progress=False)
    assert len(calls) == 6 * 3 * 2  # a seed untimed, two timed, raw and with the plan; two calls a step
    made = [bench.pipe(**inputs, generator=torch.Generator().manual_seed(s), output_type="pt").frames[0] for s in (1, 2)]
    torch.testing.assert_close(result.raw, torch.cat(made).float())
    assert result.scores[0].images.shape == result.raw.shape == (10, 3, 64, 48)
    assert result.scores[0].metrics["psnr"] < 100


@pytest.mark.parametrize("wrong", [{"seeds": ()}, {"plans": {}}, {"inputs": {"class_labels": [1], "generator": None}}])
def test_evaluation_refuses_what_it_cannot_pair(wrong):
    pipe = ah.tiny.load("dit")
    inputs = {"class_labels": [1], "num_inference_steps": 2}
    plan = ah.search(pipe, inputs, threshold=0, progress=False)
    with pytest.raises(InputsInvalid, match="at least one seed"):
        evaluate(pipe, **{"plans": {"a": plan}, "inputs": inputs, "seeds": (1,), "progress": False} | wrong)


def test_demo_writes_what_it_promises(tmp_path, monkeypatch):
    dit, mmdit = demo.DEMOS
    small = (
        replace(dit, common={**dit.common, "num_inference_steps": 6}, calibration=(3,), seeds=(0, 1)),
        replace(mmdit, model="mmdit32", common={**mmdit.common, "num_inference_steps": 5}, calibration=mmdit.calibration[:1]),
    )
    small = tuple(replace(show, drawn=show.drawn[:3], titles=show.titles[:3]) for show in small)
    monkeypatch.setattr(demo, "DEMOS", small)
    said = invoke("demo", "--out", tmp_path)
    assert said.startswith("You are looking at")
    assert {p.name for p in tmp_path.iterdir()} == {"dit", "mmdit32"}
    for model, asks, steps, images in (("dit", "class_labels", 6, 6), ("mmdit32", "prompt", 5, 3)):
        folder = tmp_path / model
        assert {p.name for p in folder.iterdir()} == {"plan.json", "plan.png", "images.png", "results.json"}
        results = json.loads((folder / "results.json").read_text())
        strong = ah.Plan.load(folder / "plan.json")
        measured = results["plans"]["a third"]
        assert results["images"] == images
        assert measured["flops"]["module"] == pytest.approx(strong.flops().module)
        assert sum(measured["cells"].values()) == steps * len(strong.target.sites)
        reused = [paper_name(cell) for row in strong.cells for cell in row if isinstance(cell, Reuse)]
        assert reused
        assert {name: measured["cells"].get(name, 0) for name in set(reused)} == Counter(reused)
        assert measured["flops"]["module"] <= results["plans"]["half"]["flops"]["module"] <= 1
        assert measured["peak_cache_bytes"] == max(strong.cache_bytes(images=len(results["inputs"][asks]), itemsize=4))


def test_bundled_model_follows_its_labels():
    pipe = ah.tiny.load("dit")

    def image(label):
        return pipe([label], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images

    assert image(0).shape == (1, 3, 32, 32)
    assert torch.equal(image(0), image(0))
    assert not torch.allclose(image(0), image(6), atol=0.05)
    with pytest.raises(ValueError, match="each from 0 to 9"):
        image(10)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "tools/perceptual.py").exists(), reason="needs the CIFAR-10 classifier of ../shared/tools")
def test_bundled_model_draws_what_it_is_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(SHARED / "tools")
    from perceptual import CifarResNet56

    labels = torch.arange(10).repeat(5)
    pipe = ah.tiny.load("dit")
    images = pipe(labels.tolist(), num_inference_steps=20, output_type="pt", generator=torch.Generator().manual_seed(11)).images
    assert (CifarResNet56()(images)[0].argmax(-1) == labels).float().mean() >= 0.5  # 0.1 is chance; 50 images


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(os.fspath(ROOT / "examples/quickstart.py"))
    assert "10 of 10" in capsys.readouterr().out
    assert ah.Plan.load(tmp_path / "demo/quickstart.json").steps == 10
