"""A provenance that no file can have is refused by name before a file is touched."""

from dataclasses import replace

import pytest
from budget import synthetic
from test_corrupted import analysis, sound

import arrowhead as ah
from arrowhead.errors import InputsInvalid, PlanInvalid

deep: list = []
for _ in range(5000):
    deep = [deep]
WRONG = [{"search": [1]}, {"seeds": "0"}, {"note": float("nan")}, {"note": [float("inf")]}, {1: 2}, {"note": deep}]
MAKERS = {"plan": (sound, ah.Plan), "table": (lambda: synthetic(0, steps=3), ah.Table), "analysis": (analysis, ah.Analysis)}


@pytest.mark.parametrize("about", WRONG, ids=["search", "seeds", "nan", "inf", "key", "deep"])
@pytest.mark.parametrize("kind", MAKERS)
def test_it_is_refused_before_anything_is_written(kind, about, tmp_path):
    path, thing = tmp_path / "file", MAKERS[kind][0]()
    path.write_text("old")
    with pytest.raises(PlanInvalid if kind == "plan" else InputsInvalid, match=r"got an `about` that .*; wanted what a search"):
        replace(thing, about=about).save(path)
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("kind", MAKERS)
def test_other_values_are_saved_as_text(kind, tmp_path):
    make, cls = MAKERS[kind]
    replace(make(), about={"note": {1: tmp_path}, "seeds": [1]}).save(tmp_path / "file")
    assert cls.load(tmp_path / "file").about == {"note": {"1": str(tmp_path)}, "seeds": [1]}
