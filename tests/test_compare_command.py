"""`arrowhead compare`: one command, one page; and what it refuses before any work."""

import os
import sys

import pytest
import torch
from pages import Page

import arrowhead as ah
from arrowhead.cli import main
from arrowhead.errors import PlanMismatch
from arrowhead.evaluation.side_by_side import evaluate
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL
from arrowhead.plans.layout import Tokens

INPUTS = {"class_labels": [1, 7], "num_inference_steps": 3}
OPTIONS = ["-i", "class_labels=[1, 7]", "-i", "num_inference_steps=3"]


@pytest.fixture(scope="module")
def pipe():
    return ah.tiny.load("dit")


@pytest.fixture
def plans(pipe, tmp_path):
    """Two plans that fit, and one for more steps, in files."""
    full, reused = (FULL,) * 8, (AST,) * 8
    files = {}
    for name, cells in {"once": (full, reused, reused), "often": (full, reused, full), "long": (full,) * 4}.items():
        files[name] = tmp_path / f"{name}.json"
        ah.Plan(cells, target_of(find(pipe)), Tokens(256), guided=True).save(files[name])
    return files


def compare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["arrowhead", "compare", "tiny:dit", *OPTIONS, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code


def test_it_writes_a_page_of_what_was_measured(plans, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "page.html"
    chosen = ["--plan", plans["once"], "--plan", plans["often"], "--seeds", 2, "--out", out]
    assert compare(monkeypatch, *chosen) == 0
    assert f"{out.stat().st_size / 2**20:.1f} MiB" in " ".join(capsys.readouterr().out.split())
    found = Page(out.read_text(encoding="utf-8"))
    labels = [f"class label {label}, seed {seed}" for seed in (0, 1) for label in (1, 7)]
    assert [own["alt"] for own in found.all("img")] == [
        f"{said}: {name}" for said in labels for name in ("raw", "once", "often")
    ]
    assert "4 pictures, drawn in full and under 2 plans" in found.said
    assert (
        " ".join(["arrowhead compare tiny:dit -i 'class_labels=[1, 7]' -i num_inference_steps=3", *map(str, chosen)])
        in found.said
    )
    assert [len(own.cells()) for own in found.maps] == [24, 24]


@pytest.fixture
def no_generation(monkeypatch):
    """Fails when the transformer has run."""
    load = main.load

    def watched(*arguments):
        pipe = load(*arguments)
        pipe.transformer.register_forward_hook(lambda *_: pytest.fail("the transformer has run"))
        return pipe

    monkeypatch.setattr(main, "load", watched)


def test_refusals_come_before_the_work(plans, tmp_path, monkeypatch, capsys, no_generation):
    other = tmp_path / "other"
    other.mkdir()
    again = other / "once.json"
    again.write_bytes(plans["once"].read_bytes())
    (tmp_path / "file").write_text("kept")
    good = ["--plan", plans["once"]]
    for wrong, said in (
        ([*good, "--plan", again], "files of different names"),
        ([*good, "--plan", plans["long"]], "plan is for 4 steps, pipeline runs 3"),
        ([*good, "--out", tmp_path / "file" / "page.html"], "wanted a path that can be written"),
        ([*good, "--out", other], "is a directory"),
        ([*good, "-i", "prompt=a cat"], "cannot be called so"),
    ):
        with monkeypatch.context() as patch:
            patch.chdir(other)
            assert compare(patch, *wrong) != 0
        error = capsys.readouterr().err
        assert said in " ".join(error.replace("│", " ").split())
        assert not (other / "compare.html").exists()
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("order", [("once", "long"), ("long", "once")])
def test_an_evaluation_refuses_any_plan_that_does_not_fit_before_it_generates(pipe, plans, order):
    loaded = {name: ah.Plan.load(plans[name]) for name in order}
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    try:
        with pytest.raises(PlanMismatch, match="plan is for 4 steps, pipeline runs 3"):
            evaluate(pipe, loaded, INPUTS, seeds=(0,), progress=False)
    finally:
        hook.remove()
    assert calls == []
    assert torch.equal(state, torch.get_rng_state())
    generator = torch.Generator().manual_seed(0)
    assert pipe(**INPUTS, generator=generator, output_type="pt").images.isfinite().all()  # as usable as before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(plans, tmp_path, monkeypatch, capsys, no_generation):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert compare(monkeypatch, "--plan", plans["once"], "--out", closed / "page.html") == 2
    assert "cannot write" in capsys.readouterr().err
