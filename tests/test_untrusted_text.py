"""Text that others wrote: names, paths, provenance and messages are shown as they are, and nothing obeys them."""

import json
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from budget import synthetic
from pages import PLANS, TARGET, Page, evaluation
from pipelines import dit
from replay import plan as plan_for
from safetensors import safe_open
from safetensors.torch import save_file

import arrowhead as ah
from arrowhead.analysis.draw import image_grid, plan_map
from arrowhead.cli import main
from arrowhead.errors import InputsInvalid, PlanDerived, PlanInvalid
from arrowhead.plans.foreign_text import visible
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.report.page import compare

ROOT = Path(__file__).parent.parent
RED, BACKWARDS, TITLE = "\x1b[31m", "\u202e", "\x1b]0;owned\x07"
HOSTILE = f"[/boo] [bold]b[/] :smile: {RED}{BACKWARDS}{TITLE}\x9b1m\u2066 a\nb \ufeff"
SHOWN = r"[/boo] [bold]b[/] :smile: \x1b[31m\u202e\x1b]0;owned\x07\x9b1m\u2066 a\nb \ufeff"
WRONG = [
    {"derived": 5},
    {"derived": {"steps": "5, was 3"}},
    {"derived": ["steps"]},
    {"derived": [{"steps": 5}]},
    {"search": []},
    {"search": "budget"},
    {"search": None},
    {"model": ["x"]},
    {"seeds": ["1"]},
    {"versions": {"torch": 2}},
    {"inputs": 3},
]


def steering(text):
    """Characters that a terminal or a browser obeys, by the bidi classes and general categories of Unicode."""
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return {c for c in text if c != "\n" and (unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in bidi)}


def run(monkeypatch, capsys, *arguments):
    """The exit status, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["arrowhead", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_every_character_of_unicode():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = visible(everything)
    assert not steering(shown.replace("\n", "\x00"))
    shown.encode()  # no surrogates are left
    assert {"\N{RIGHT-TO-LEFT MARK}", "\N{LINE SEPARATOR}", "\N{SOFT HYPHEN}"}.isdisjoint(shown)
    for kept in ("a cat, naïve café", "שלום", "日本", "👩\u200d🚒 می\u200cخواهم", "C:\\new", ""):
        assert visible(kept) == kept
    assert visible(HOSTILE) == SHOWN


def hostile_plan(**about):
    target = replace(TARGET, transformer=HOSTILE, sites=tuple(replace(site, path=HOSTILE + site.path) for site in TARGET.sites))
    known = {"search": {HOSTILE: HOSTILE, "radii": [HOSTILE]}, "derived": [{HOSTILE: HOSTILE}]}
    return replace(PLANS["bold"], target=target, about=known | about)


def test_show_prints_what_a_plan_says_and_obeys_none_of_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / f"[bold] {RED}\udcff plan.json"
    text = hostile_plan().text()
    content = json.loads(text)
    content["legend"] = {f"[/boo]{symbol}": cell for symbol, cell in content["legend"].items()}
    content["cells"] = [" ".join(f"[/boo]{symbol}" for symbol in row.split()) for row in content["cells"]]
    path.write_text(json.dumps(content))
    code, out, err = run(monkeypatch, capsys, "show", path, "--png", tmp_path / "x.png")
    assert (code, err) == (0, "")
    assert not steering(out)
    out.encode()
    lines = [line.rstrip() for line in out.splitlines()]
    whole = "".join(lines)
    assert f"{SHOWN} {SHOWN}, radii {SHOWN}".replace(" ", "") in whole.replace(" ", "")
    assert f"derived: {SHOWN} {SHOWN}".replace(" ", "") in whole.replace(" ", "")


def test_the_error_printer_prints_what_a_file_and_its_name_say(tmp_path, monkeypatch, capsys):
    path = tmp_path / f"[bold] {RED} plan.json"
    content = json.loads(PLANS["careful"].text())
    path.write_text(json.dumps(content | {"cells": [f"[/boo] F{RED}" for _ in content["cells"]]}))
    code, out, err = run(monkeypatch, capsys, "show", path)
    assert (code, out) == (2, "")
    assert not steering(err)
    assert err.count("\n") == 1
    assert err.startswith("PlanInvalid: ")
    assert r"[bold] \x1b[31m plan.json is no sound plan" in err
    assert "'[/boo]'" in err


@pytest.mark.parametrize("about", WRONG, ids=str)
def test_provenance_of_another_type_is_refused(about, tmp_path):
    plan = PLANS["careful"]
    with pytest.raises(PlanInvalid, match=next(iter(about))):
        replace(plan, about=about)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(plan.text()) | {"about": about}))
    with pytest.raises(PlanInvalid, match=next(iter(about))):
        Plan.load(path)
    synthetic(0).save(tmp_path / "table.safetensors")
    with safe_open(tmp_path / "table.safetensors", "pt") as file:
        header = {"arrowhead": json.dumps(json.loads(file.metadata()["arrowhead"]) | {"about": about})}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "table.safetensors", metadata=header)
    with pytest.raises(InputsInvalid, match=next(iter(about))):
        ah.Table.load(tmp_path / "table.safetensors")
    sound = ah.Analysis(("a",), (1,), 1, Tokens(4), guided=False, radius=1)
    with pytest.raises(InputsInvalid, match=next(iter(about))):
        replace(sound, about=about).save(tmp_path / "a.npz")
    sound.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = {name: file[name] for name in file.files}
    meta = np.array(json.dumps(json.loads(str(arrays.pop("meta"))) | {"about": about}))
    np.savez(tmp_path / "a.npz", meta=meta, **arrays)
    with pytest.raises(InputsInvalid, match=next(iter(about))):
        ah.Analysis.load(tmp_path / "a.npz")


def test_provenance_keeps_entries_that_nobody_knows(tmp_path):
    about = {"note": {"by": [1, None]}, "cpu_seconds": 0.5, "search": {"radii": [1], "of": None}, "seeds": [2**63]}
    replace(PLANS["careful"], about=about).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").about == about


def test_every_plan_in_the_repository_is_read():
    paths = [path for folder in ("tests/legacy", "benchmarks/results") for path in (ROOT / folder).rglob("*.json")]
    plans = [path for path in paths if '"legend"' in path.read_text() and "format" in json.loads(path.read_text())]
    assert len(plans) > 2
    for path in plans:
        assert Plan.load(path).about == json.loads(path.read_text())["about"]


def test_a_warning_of_a_derived_plan_shows_what_the_file_says():
    bench = dit()
    changed = replace(plan_for(bench, ["FFF"] * 5), about={"derived": [{"steps": TITLE}]})
    with pytest.warns(PlanDerived, match=r"steps \\x1b\]0;owned\\x07"), ah.applied(bench.pipe, changed):
        pass


def test_a_page_shows_controls_and_directions_as_such():
    plans = {HOSTILE: hostile_plan()}
    found = evaluation(plans, torch.zeros(2, 3, 8, 8), prompt=[HOSTILE])
    found = replace(found, setting={**found.setting, HOSTILE: {HOSTILE: HOSTILE}})
    found = replace(found, scores=tuple(replace(each, metrics={HOSTILE: 1.0}) for each in found.scores))
    text = compare(found, title=HOSTILE, command=HOSTILE)
    assert not steering(text)
    page = Page(text)
    assert page.said.count(SHOWN) > 10
    assert [own["alt"] for own in page.all("img") if "alt" in own][1] == f"{SHOWN}, seed 0: {SHOWN}"
    assert compare(evaluation(), title="C:\\new 👩\u200d🚒").count("C:\\new 👩\u200d🚒") >= 2


@pytest.mark.parametrize("name", ["$x^$", "a $ b", "$\\frac$", HOSTILE, "\udcff"])
def test_figures_draw_names_as_they_are(name, tmp_path, monkeypatch):
    titles, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: titles.extend(axis.get_title("left") for axis in figure.axes))
    plan_map({name: PLANS["careful"]}, tmp_path / "plan.png", title=name)
    image_grid({name: torch.zeros(1, 3, 4, 4)}, [name], tmp_path / "images.png", title=name)
    close("all")
    assert titles[0].replace(r"\$", "$").startswith(f"{visible(name)}: ")
    ah.analysis.draw.head_map(replace(PLANS["careful"], target=named_sites(name)), 0, tmp_path / "head.png")


def named_sites(name):
    return replace(
        TARGET, sites=tuple(Site(f"{name}{site.path}", site.heads, site.head_dim, site.channels) for site in TARGET.sites)
    )
