"""Figures of an analysis, and the command that draws them."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import dit, sd3
from test_analyze import BENCHES
from test_edge import INPUTS, invoke

import arrowhead as ah
from arrowhead.analysis.arrays import REUSED, Analysis, AttentionMap
from arrowhead.analysis.draw_attention import LABELS, draw
from arrowhead.cli import analyze
from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import Tokens

FIGURES = ("attention_map", "locality", "reuse_errors", "similarity", "steps")


@pytest.fixture(autouse=True)
def text_stays_text(monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


def text_of(path) -> str:
    """All that an SVG says."""
    return " ".join("".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("text"))


def check(files, folder, names):
    assert sorted(file.name for file in files) == sorted(f"{name}.{ending}" for name in names for ending in ("png", "svg"))
    assert sorted(files) == sorted(folder.iterdir())
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 10
        assert "step" in text_of(folder / f"{name}.svg")


def made_up(sites=3, heads=2, steps=4, text=0, guided=True, **more) -> Analysis:
    """Arrays at random."""
    draw_from, tokens = np.random.default_rng(torch.seed() % 2**32), Tokens(16, text)

    def some(*shape):
        return draw_from.random(shape, np.float32)

    return Analysis(
        sites=tuple(f"blocks.{i}.attn" for i in range(sites)),
        heads=(heads,) * sites,
        steps=steps,
        tokens=tokens,
        guided=guided,
        radius=3,
        attention_map=AttentionMap(1, 2, (1,), tokens, some(1, tokens.total, tokens.total) / tokens.total),
        reuse_errors=some(len(REUSED), sites * heads, steps),
        step_similarity=some(sites, steps, steps),
        branch_similarity=some(sites, steps) if guided else None,
        band_mass=some(sites * heads, steps) / 2,
        text_mass=some(sites * heads, steps) / 2,
    )


@pytest.mark.parametrize(("name", "guided"), [("dit", True), ("sd3", False), ("flux", True)])
def test_every_figure_is_drawn_and_says_what_it_shows(name, guided, tmp_path):
    bench = BENCHES[name]()
    inputs = bench.inputs(guidance=3.0 if guided else 1.0)
    found = ah.analyze(bench.pipe, inputs, heads=(2, 0), step=1, radius=4, progress=False)
    tmp_path = tmp_path / "new"
    check(draw(found, tmp_path), tmp_path, FIGURES)
    said = {figure: text_of(tmp_path / f"{figure}.svg") for figure in FIGURES}
    for words in (found.sites[found.attention_map.site], "step 1", "head 2", "head 0", "4 before or after"):
        assert words in said["attention_map"]
    assert ("7 text tokens" in said["attention_map"]) == bool(bench.text)
    assert ("on text" in said["locality"]) == bool(bench.text)
    assert ("CFG branches" in said["similarity"], "no guidance" in said["similarity"]) == (guided, not guided)
    assert all(label in said["reuse_errors"] for label, _ in LABELS.values())
    weights, band = found.attention_map.weights, abs(np.subtract.outer(range(16), range(16))) <= 4
    image = slice(-16, None) if name == "flux" else slice(0, 16)
    text = slice(0, -16) if name == "flux" else slice(16, None)
    for head, own in zip((2, 0), weights, strict=True):
        inside = (own[image, image] * band).sum(1).mean() + own[image, text].sum(1).mean()
        assert f"head {head}: {inside:.0%}" in said["attention_map"]


def test_many_sites_are_too_many_panels(tmp_path):
    found = replace(made_up(sites=40, steps=3), attention_map=None, reuse_errors=None, band_mass=None)
    draw(found, tmp_path)
    said = text_of(tmp_path / "steps.svg")
    assert "24 of 40" in said
    assert [f"site {i}" in said for i in (0, 39)] == [True, True]


@pytest.mark.parametrize(
    ("absent", "names"),
    [
        ({"attention_map", "reuse_errors", "band_mass", "text_mass", "step_similarity"}, ["similarity"]),
        ({"step_similarity", "branch_similarity", "reuse_errors"}, ["attention_map", "locality"]),
        ({"attention_map", "branch_similarity", "band_mass", "text_mass"}, ["reuse_errors", "similarity", "steps"]),
    ],
)
def test_figures_follow_the_arrays(absent, names, tmp_path):
    check(draw(replace(made_up(), **dict.fromkeys(absent)), tmp_path), tmp_path, names)


@pytest.mark.parametrize("kind", ["constant", "negative", "peaked"])
def test_extreme_arrays_are_drawn(kind, tmp_path):
    found = made_up(text=2)
    array = {"constant": np.ones, "negative": lambda shape, dtype: np.full(shape, -1, dtype), "peaked": np.zeros}[kind]
    blank = {name: array(value.shape, np.float32) for name, value in found.arrays.items() if name != "attention_map"}
    weights = np.zeros_like(found.attention_map.weights)
    weights[..., 0] = kind != "constant"
    found = replace(found, **blank, attention_map=replace(found.attention_map, weights=weights))
    assert len(draw(found, tmp_path)) == 10


def test_the_numbers_in_json_are_the_arrays(tmp_path):
    found = made_up(sites=2, heads=3)
    said = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    for place, name in enumerate(REUSED):
        assert said["median_reuse_error"][name] == pytest.approx(np.median(found.reuse_errors[place], 0), rel=1e-3)
    for site in range(2):
        assert said["median_band_mass"][site] == pytest.approx(np.median(found.band_mass[3 * site : 3 * site + 3], 0), rel=1e-3)
        before = said["similarity_to_step_before"][site]
        assert before[0] is None
        assert before[1:] == pytest.approx([found.step_similarity[site, t, t + 1] for t in range(3)], rel=1e-3)
    assert "branch_similarity" not in made_up(guided=False).as_dict()


def test_the_command_and_its_arrays_drawn_again(tmp_path):
    first, again, plan = tmp_path / "a", tmp_path / "b", tmp_path / "p.json"
    invoke("search", "tiny:dit", *INPUTS, "--threshold", "0", "--out", plan)
    asked = ["--site", 3, "--head", 1, "--head", 0, "--step", 2, "--radius", 16]
    said = invoke("analyze", "tiny:dit", *INPUTS, *asked, "--plan", plan, "--out", first)
    names = {f"{name}.{ending}" for name in (*FIGURES, "plans") for ending in ("png", "svg")}
    assert {p.name for p in first.iterdir()} == names | {"analysis.npz", "analysis.json"}
    found = Analysis.load(first / "analysis.npz")
    at = found.attention_map
    assert (at.site, at.heads, at.step, found.radius) == (3, (1, 0), 2, 16)
    assert json.loads((first / "analysis.json").read_text()) == found.as_dict()
    assert f"similarity {np.median(found.branch_similarity):.3f}" in said
    assert f"its residual {np.nanmedian(found.reuse_errors[2]):.2g}" in " ".join(said.split())
    repeated = invoke("analyze", first / "analysis.npz", "--out", again)
    assert all(" ".join(analyze.findings(found)) in " ".join(text.split()) for text in (said, repeated))
    for name in FIGURES:
        assert (again / f"{name}.png").read_bytes() == (first / f"{name}.png").read_bytes()
    with pytest.raises(InputsInvalid, match="got input, heads with"):
        invoke("analyze", first / "analysis.npz", *INPUTS, "--head", 1, "--out", again)


def test_the_command_without_guidance_says_so(tmp_path):
    inputs = [*INPUTS, "-i", "guidance_scale=1.0"]
    with pytest.raises(InputsInvalid, match="without guidance"):
        invoke("analyze", "tiny:dit", *inputs, "--only", "branches", "--out", tmp_path / "a")
    assert not any((tmp_path / "a").iterdir())
    said = invoke("analyze", "tiny:dit", *inputs, "--only", "steps", "--out", tmp_path)
    assert "no guidance" in said


@pytest.mark.parametrize("make", [dit, sd3])
def test_an_analysis_is_of_this_pipeline(make):
    bench = make()
    about = ah.analyze(bench.pipe, bench.inputs(seed=7), progress=False).about
    assert about["pipeline"] == type(bench.pipe).__name__
    assert about["seeds"] == [7]
    assert about["analysis"]["radius"] == 2
