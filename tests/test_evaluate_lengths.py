"""`arrowhead evaluate` over prompts of any length, on a pipeline whose prompt and negative prompt come in two calls."""

import json
import sys

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from families import CHANNELS, qwen
from family_replay import random_cells
from pipelines import randomise
from test_families import plan_of
from typer.testing import CliRunner

import arrowhead as ah
from arrowhead.cli import inputs as cli_inputs
from arrowhead.cli import main
from arrowhead.errors import InputsInvalid
from arrowhead.metrics.images import psnr
from arrowhead.models.find import find

pytestmark = pytest.mark.filterwarnings("ignore::arrowhead.errors.ArrowheadWarning")
PROMPTS = ["fox", "a red fox", "a red fox in the snow at dawn"]
CALL = {"negative_prompt": "blurred picture", "true_cfg_scale": 3.0, "num_inference_steps": 3, "height": 64, "width": 80}


def embeds(self, prompt, _):
    """A token for each word, padded and masked."""
    words = [text.split() for text in prompt]
    longest = max(map(len, words))
    found = torch.zeros(len(words), longest, CHANNELS)
    for row, own in zip(found, words, strict=True):
        for place, word in enumerate(own):
            row[place] = torch.randn(CHANNELS, generator=torch.Generator().manual_seed(sum(word.encode())))
    return found, torch.tensor([[place < len(own) for place in range(longest)] for own in words])


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(QwenImagePipeline, "_get_qwen_prompt_embeds", embeds)
    made = qwen(torch.float32)
    vae = AutoencoderKLQwenImage(
        base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.1] * 4
    )
    randomise(vae, 1)
    made.pipe = QwenImagePipeline(made.pipe.scheduler, vae, None, None, made.pipe.transformer)
    made.pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(sys.modules["arrowhead.cli.evaluate"], "load", lambda *_: made.pipe)
    return made


@pytest.mark.parametrize("given", ["captions", "input"])
def test_the_plan_is_judged_on_prompts_of_any_length(given, bench, tmp_path):
    model = find(bench.pipe)
    plan = plan_of(bench, model, random_cells(1, model.sites, 3, share=True))
    assert any(getattr(cell, "share_cfg", False) for row in plan.cells for cell in row)
    plan.save(tmp_path / "plan.json")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = [
        "evaluate",
        "small",
        "--plan",
        tmp_path / "plan.json",
        "--batch",
        2,
        "--images",
        3,
        "--out",
        tmp_path / "table.json",
    ]
    asked += ["--captions", tmp_path / "prompts.txt"] if given == "captions" else ["-i", f"prompt=@{tmp_path / 'prompts.txt'}"]
    asked += [part for name, value in CALL.items() for part in ("-i", f"{name}={value}")]
    CliRunner().invoke(main.app, list(map(str, asked)), catch_exceptions=False)
    row = json.loads((tmp_path / "table.json").read_text())["plans"]["plan"]

    def pictures():
        for some in (slice(0, 2), slice(2, 3)):
            generators = [torch.Generator().manual_seed(i) for i in range(3)[some]]
            made = bench.pipe(PROMPTS[some], generator=generators, output_type="pt", **CALL).images
            yield (made.clamp(0, 1) * 255).round() / 255

    untouched = torch.cat([*pictures()])
    with ah.applied(bench.pipe, plan) as run:
        wanted = torch.cat([*pictures()])
        assert "other lengths" in "".join(run.summary().notes)
    assert row["psnr"] == pytest.approx(psnr(wanted, untouched), rel=1e-3)
    assert 5 < row["psnr"] < 60


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputsInvalid, match=r"no file of that name.*in quotes"):
        cli_inputs.parse([f"prompt=@{tmp_path / 'none.txt'}"])
    assert cli_inputs.parse(['prompt="@home"']) == {"prompt": "@home"}
