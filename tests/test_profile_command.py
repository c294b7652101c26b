"""`arrowhead profile`, `solve` and `generate --speedup`: the same as the functions of these names, by files."""

import sys

import pytest
import torch
from PIL import Image
from test_hub import hub  # noqa: F401  # a fixture
from typer.testing import CliRunner

import arrowhead as ah
from arrowhead.cli import main, profile
from arrowhead.errors import HubUnavailable, InputsInvalid

INPUTS = {"class_labels": [1], "num_inference_steps": 6}
GIVEN = ["-i", "class_labels=[1]", "-i", "num_inference_steps=6"]


@pytest.fixture(scope="module")
def tiny():
    pipe = ah.tiny.load("dit")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A profile's file, as the function makes it."""
    path = tmp_path_factory.mktemp("made") / "profile.safetensors"
    ah.profile(tiny, INPUTS | {"generator": torch.Generator().manual_seed(0)}, progress=False).save(path)
    return path


@pytest.fixture
def command(monkeypatch, tiny, tmp_path):
    loaded = []
    for module in (main, profile):
        monkeypatch.setattr(module, "load", lambda *_: (loaded.append(1), tiny)[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARROWHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        """What is printed, or the error; and whether the model was loaded."""
        loaded.clear()
        monkeypatch.setattr(sys, "argv", ["arrowhead", *arguments])
        result = CliRunner().invoke(main.app, [*map(str, arguments)])
        if result.exception and not isinstance(result.exception, InputsInvalid | HubUnavailable):
            raise result.exception
        return result.exception or result.output, bool(loaded)

    return run


def test_profile_and_solve(command, made, tmp_path):
    said, _ = command("profile", "tiny:dit", *GIVEN, "-o", tmp_path / "p")
    found, wanted = ah.Profile.load(tmp_path / "p"), ah.Profile.load(made)
    assert torch.equal(found.products, wanted.products)
    assert torch.equal(found.changes, wanted.changes)
    assert "0.55" in said
    assert "written to" in said
    for budget, asked in {
        "transformer_flops=0.6": ah.Budget(transformer_flops=0.6),
        "light": ah.Budget(error=0.03),
        "error=0.2": ah.Budget(error=0.2),
    }.items():
        said, loaded = command("solve", made, "--budget", budget, "-o", tmp_path / "plan.json")
        assert ah.Plan.load(tmp_path / "plan.json") == ah.solve(wanted, asked)
        assert (loaded, "step   0" in said) == (False, True)
    command("solve", made, "--budget", "transformer_flops=0.7", "--steps", 4, "-o", tmp_path / "plan.json")
    assert ah.Plan.load(tmp_path / "plan.json") == ah.solve(wanted.resample(steps=4), ah.Budget(transformer_flops=0.7))


def test_generate_with_a_speedup(command, made, tiny, tmp_path):
    """By a profile, and by what an earlier command kept."""
    inputs = INPUTS | {"output_type": "pil"}
    generator = torch.Generator().manual_seed(0)
    raw = tiny(**inputs, generator=generator).images[0].tobytes()
    with ah.speedup(tiny, quality="strong", profile=made):
        fast = tiny(**inputs, generator=generator.manual_seed(0)).images[0].tobytes()

    def generated(*more):
        said, _ = command("generate", "tiny:dit", *GIVEN, "--speedup", "strong", "--out", tmp_path / "images", *more)
        return said, Image.open(tmp_path / "images/000.png").tobytes()

    assert raw != fast
    said, image = generated("--profile", made)
    assert image == fast
    assert "6 steps, " in said
    said, image = generated()
    assert image == raw
    assert "watched in full; from the next generation on 6 steps, " in said
    said, image = generated()
    assert image == fast
    assert "from the next" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["solve", "none/such"], "cannot read profile.safetensors of none/such"),
        (["solve", "MADE", "--budget", "cheap"], "wanted one of light, balanced, strong"),
        (["solve", "MADE", "--budget", "attention_flops=0.5"], "for a stack of blocks, wanted transformer_flops"),
        (["generate", "m", "--speedup", "0.5"], "got speedup=0.5, wanted a number above 1"),
        (["generate", "m", "--speedup", "fast"], "got 'fast', wanted one of light"),
        (["generate", "m", "--profile", "MADE"], "got --profile without --speedup"),
        (["generate", "m", "--speedup", "2", "--kernel", "flex"], "got --kernel with --speedup, wanted"),
        (["generate", "m", "--speedup", "2", "--profile", "none/such"], "cannot read profile.safetensors of none/such"),
        (["search", "m", "--budget", "cheap=1"], "got --budget cheap=1, wanted a name"),
        (["search", "m", "-i", "steps"], "got --input 'steps', wanted NAME=VALUE"),
        (["profile", "m", "-i", "steps"], "got --input 'steps', wanted NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_said_before_the_model_is_loaded(command, made, hub, arguments, said):  # noqa: F811
    arguments = [str(made) if each == "MADE" else each for each in arguments]
    inputs = GIVEN if arguments[0] != "solve" and "-i" not in arguments else []
    error, loaded = command(*arguments, *inputs)
    assert isinstance(error, HubUnavailable | InputsInvalid), error
    assert said in str(error)
    assert not loaded
