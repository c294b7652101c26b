"""Mistakes in calls and commands: one line that says what to do; and `--traceback` shows where an error was raised."""

import sys

import accelerate
import pytest
import torch
from pipelines import dit
from replay import plan as plan_for

import arrowhead as ah
from arrowhead.cli import main
from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.evaluation.request import Request
from arrowhead.evaluation.resumable import measure
from arrowhead.evaluation.side_by_side import evaluate
from arrowhead.evaluation.work_folder import MANIFEST, open_work
from arrowhead.models.model import did_you_mean

STEPS = ["-i", "num_inference_steps=2"]
LABEL = ["-i", "class_labels=[1]"]


@pytest.fixture(scope="module")
def tiny():
    return ah.tiny.load("dit")


@pytest.fixture
def command(monkeypatch, capsys, tiny, tmp_path):
    """Runs a command in an empty folder; gives its exit status and standard error."""
    monkeypatch.setattr(main, "load", lambda *_: tiny)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["arrowhead", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["generate", "tiny:dit", *STEPS, "-i", "class_labels=[7000]"],
            1,
            "ValueError: got class_labels=[7000], wanted at least one, each from 0 to 9",
        ),
        (
            ["search", "tiny:dit", *STEPS, "-i", "class_labels=[7000]", "--threshold", 0.1],
            1,
            "ValueError: got class_labels=[7000], wanted at least one, each from 0 to 9",
        ),
        (["generate", "tiny:dit", *LABEL, "-i", "num_inference_steps=-3"], 1, "Error: "),
        (["search", "tiny:dit", *LABEL, "-i", "num_inference_steps=-3"], 1, "Error: "),
        (
            ["generate", "tiny:dit", *STEPS, "-i", f"class_labels={'[' * 100_000}"],
            2,
            "got --input 'class_labels=[[[",
        ),
        (["generate", "tiny:dit", *STEPS, "-i", f"class_labels={'1' * 5000}"], 2, "wanted a shorter value"),
        (["generate", "tiny:dit", *STEPS, "-i", "class_label=[1]"], 2, "did you mean class_labels for class_label?"),
        (["evaluate", "tiny:dit", *STEPS, *LABEL, "--seed", 2**64 - 1, "--images", 2], 2, "wanted seeds below 2**64"),
    ],
    ids=["label", "label in search", "steps", "steps in search", "nested", "digits", "name", "last seed"],
)
def test_an_error_is_one_line(command, arguments, code, said):
    found, error = command(*arguments)
    assert found == code
    assert said in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if "Error" in line or "Invalid" in line]) == 1
    assert ("--traceback shows where" in error) == (code == 1)


@pytest.mark.parametrize("before", [True, False])
def test_a_traceback_is_shown_when_it_is_asked_for(command, monkeypatch, before):
    asked = ["generate", "tiny:dit", *STEPS, "-i", "class_labels=[7000]"]
    asked = ["--traceback", *asked] if before else [*asked, "--traceback"]
    monkeypatch.setattr(sys, "argv", ["arrowhead", *map(str, asked)])
    with pytest.raises(ValueError, match="each from 0 to 9"):
        main.main()


@pytest.mark.parametrize("seed", [2**70, 2**64, -(2**63) - 1])
def test_a_seed_that_torch_has_not(command, seed):
    code, error = command("generate", "tiny:dit", *STEPS, *LABEL, "--seed", seed)
    assert code == 2
    assert "Invalid value for '--seed'" in error
    assert str(2**64 - 1 if seed > 0 else -(2**63)) in error
    for far in (-(2**63), 2**64 - 1):
        torch.Generator().manual_seed(far)


def test_long_names_of_plans_are_refused_before_anything_runs(tiny, command, tmp_path):
    found = ah.search(tiny, {"class_labels": [1], "num_inference_steps": 2}, threshold=0.5, progress=False)
    inputs = {"class_labels": [1], "num_inference_steps": 2}
    hook = tiny.transformer.register_forward_hook(lambda *_: pytest.fail("the transformer has run"))
    try:
        for name in ("x" * 300, "猫" * 90):
            with pytest.raises(InputsInvalid, match=r"name of \d+ bytes.*wanted 200 at most; rename"):
                evaluate(tiny, {name: found}, inputs, seeds=[0], progress=False)
            with pytest.raises(InputsInvalid, match=r"name of \d+ bytes.*wanted 200 at most; rename"):
                measure(tiny, {name: found}, inputs, images=1, work=tmp_path / "work", progress=False)
    finally:
        hook.remove()
    assert not (tmp_path / "work").exists()
    (tmp_path / ("x" * 200 + "-123456789012")).mkdir()  # the longest folder that a name gives


def test_links_within_a_work_folder_are_refused(tmp_path):
    elsewhere, work = tmp_path / "elsewhere", tmp_path / "work"
    elsewhere.mkdir()
    open_work(work, {"model": "m"})
    (work / "raw").mkdir()
    open_work(work, {"model": "m"})
    for place in (work / "plan-0123", work / "raw" / "images"):
        place.symlink_to(elsewhere)
        with pytest.raises(InputsInvalid, match=rf"got .*{place.name}, a link to .*elsewhere.*wanted folders of its own"):
            open_work(work, {"model": "m"})
        place.unlink()
    linked = tmp_path / "linked"
    linked.symlink_to(work)
    open_work(linked, {"model": "m"})  # whoever names the folder knows where it is
    assert [path.name for path in work.iterdir() if path.is_file()] == [MANIFEST]
    assert not any(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["facebook/DiT-XL-2-256", "path"])
def test_the_name_of_a_model_is_no_pipeline(name, tmp_path):
    name, inputs = tmp_path if name == "path" else name, {"class_labels": [1], "num_inference_steps": 2}
    plan = plan_for(dit(), ["FFF"] * 2)
    for call in (
        lambda: ah.search(name, inputs),
        lambda: ah.search(name, inputs, threshold=0.1),
        lambda: ah.search(name, inputs, strategy="headwise"),
        lambda: ah.calibrate(name, inputs),
        lambda: ah.calibration_bytes(name, inputs),
        lambda: ah.analyze(name, inputs),
        lambda: ah.apply(name, plan),
        lambda: evaluate(name, {"p": plan}, inputs, seeds=[0]),
        lambda: measure(name, {"p": plan}, inputs, images=1, work=tmp_path / "work"),
    ):
        with pytest.raises(UnsupportedPipeline, match=r"got a \w+, '.*', wanted a pipeline; load it with .*from_pretrained"):
            call()


def test_an_argument_that_is_nearly_right(tiny):
    wrong = {"class_label": [1], "num_inference_steps": 2}
    meant = r"did you mean class_labels for class_label\?"
    plan = ah.search(tiny, {"class_labels": [1], "num_inference_steps": 2}, threshold=0.5, progress=False)
    for call in (
        lambda: ah.search(tiny, wrong, threshold=0.1, progress=False),
        lambda: ah.search(tiny, wrong, progress=False),
        lambda: ah.analyze(tiny, wrong, progress=False),
        lambda: ah.evaluate(tiny, {"p": plan}, wrong, seeds=[0], progress=False),
        lambda: Request.of(wrong, 1),
    ):
        with pytest.raises(InputsInvalid, match=meant) as error:
            call()
        assert "wanted" in str(error.value)
    with ah.applied(tiny, plan), pytest.raises(InputsInvalid, match=meant):
        tiny(**wrong)
    assert did_you_mean(["class_labels", "qqq"], ["class_labels"]) == ""


def test_a_transformer_without_weights_is_refused():
    bench = dit()
    plan = plan_for(bench, ["FFF"] * 5)
    accelerate.cpu_offload(bench.pipe.transformer, execution_device=torch.device("cpu"))  # weights on meta, with hooks
    with ah.applied(bench.pipe, plan):
        bench.pipe(**bench.inputs())
    empty = dit()
    empty.pipe.transformer.to("meta")
    said = r"DiTTransformer2DModel on the meta device, such as .*weight.*wanted weights; load them"
    for call in (
        lambda: ah.apply(empty.pipe, plan),
        lambda: ah.search(empty.pipe, empty.inputs(), threshold=0.1, progress=False),
        lambda: ah.search(empty.pipe, empty.inputs(), strategy="headwise", progress=False),
        lambda: ah.search(empty.pipe, empty.inputs(), progress=False),
        lambda: ah.analyze(empty.pipe, empty.inputs(), progress=False),
    ):
        with pytest.raises(UnsupportedPipeline, match=said):
            call()
