"""Files that are no sound plans: each is refused, and the message names the file."""

import json
import re
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import PLAN

from arrowhead.errors import PlanInvalid
from arrowhead.plans import file_format
from arrowhead.plans.layout import Tokens
from arrowhead.plans.plan import Plan


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved-plan.json"
    PLAN.save(path)
    return path


def broken(change):
    """A function that applies `change` to the content of a sound file, and returns that."""

    def edit(content):
        change(content)
        return content

    return edit


UNSOUND_HEADS = {
    "a negative radius": "arrow:-1",
    "a radius in words": "arrow:wide",
    "half a token of radius": "arrow:2.5",
    "an arrow without radius": "arrow",
    "an arrow of nothing": "arrow:",
    "a radius in other digits": "arrow:٣",
    "a residual of its own": "arrow:8 +residual",
    "an unknown addition": "arrow:8+sum",
    "full attention with a radius": "full:3",
    "full attention with a residual": "full+residual",
    "a head that is cached in int8": "cached+int8",
    "a precision that is none": "full+int7",
    "a precision before the residual": "arrow:8+int8+residual",
    "a cached head with a radius": "cached:3",
    "an unknown word": "full skipped",
    "words with commas": "full, full",
    "shouting": "FULL",
    "empty heads": "",
    "blank heads": "  ",
    "heads too many": "full arrow:8 full",
}
UNSOUND = {
    "a list": lambda content: [content],
    "a number": lambda content: 3,
    "nothing": lambda content: None,
    "another dict": lambda content: {"name": "someone", "version": "1.0"},
    "an empty dict": lambda content: {},
    "only the format": lambda content: {"format": content["format"]},
    "a later format": broken(lambda c: c.update(format=c["format"] + 1)),
    "no format": broken(lambda c: c.pop("format")),
    "format in words": broken(lambda c: c.update(format="one")),
    "an unknown symbol": broken(lambda c: c["cells"].__setitem__(1, "F ?")),
    "an extra key": broken(lambda c: c.update(comment="mine")),
    "an extra key in the legend": broken(lambda c: c["legend"]["W"].update(width=3)),
    "an extra key in the tokens": broken(lambda c: c["tokens"].update(words=3)),
    "an extra key in the target": broken(lambda c: c["target"].update(vae="none")),
    "an extra key in a site": broken(lambda c: c["target"]["sites"][0].update(bias=True)),
    "no cells": broken(lambda c: c.pop("cells")),
    "no legend": broken(lambda c: c.pop("legend")),
    "no target": broken(lambda c: c.pop("target")),
    "no tokens": broken(lambda c: c.pop("tokens")),
    "no guidance": broken(lambda c: c.pop("guided")),
    "cells that are a string": broken(lambda c: c.update(cells="F F")),
    **{what: broken(lambda c, words=words: c["legend"]["W"].update(heads=words)) for what, words in UNSOUND_HEADS.items()},
    "heads in a list": broken(lambda c: c["legend"]["W"].update(heads=["arrow:8", "full"])),
    "heads that are null": broken(lambda c: c["legend"]["W"].update(heads=None)),
    "no heads": broken(lambda c: c["legend"]["W"].pop("heads")),
    "heads too few": broken(lambda c: c["legend"]["V"].update(heads="full arrow:8 full")),
    "sharing in words": broken(lambda c: c["legend"]["W"].update(share_cfg="yes")),
    "a radius beside the heads": broken(lambda c: c["legend"]["W"].update(radius=8)),
    "reuse with heads": broken(lambda c: c["legend"]["R"].update(heads="full")),
    "reuse with empty heads": broken(lambda c: c["legend"]["R"].update(heads="")),
    "equal words for more heads than there are": broken(lambda c: c["legend"]["F"].update(heads="full full full")),
    "extrapolation with heads": broken(lambda c: c["legend"]["R"].update(does="extrapolate", heads="full")),
    "extrapolation from one output": broken(lambda c: c["legend"]["R"].update(does="extrapolate")),
    "a slope where nothing is extrapolated": broken(lambda c: c["legend"]["R"].update(slope=0.5)),
    "extrapolation that shares": broken(lambda c: c["legend"]["R"].update(does="extrapolate", share_cfg=True)),
    "reuse that shares": broken(lambda c: c["legend"]["R"].update(share_cfg=True)),
    "an unknown kind of cell": broken(lambda c: c["legend"]["W"].update(does="dance")),
    "an unknown kind of site": broken(lambda c: c["target"]["sites"][0].update(kind="no_such_kind")),
    "fewer than no tokens": broken(lambda c: c["tokens"].update(visual=-64)),
    "a short row": broken(lambda c: c["cells"].__setitem__(1, "F")),
    "a long row": broken(lambda c: c["cells"].__setitem__(1, "F F F")),
    "an empty row": broken(lambda c: c["cells"].__setitem__(1, "")),
    "no steps": broken(lambda c: c.update(cells=[])),
    "no sites": broken(lambda c: c["target"].update(sites=[])),
    "a first step that reuses": broken(lambda c: c["cells"].__setitem__(0, "F R")),
    "a residual that was not computed": broken(lambda c: c["cells"].__setitem__(0, "W F")),
    "a first step that repeats a head": broken(lambda c: c["legend"]["F"].update(heads="cached")),
    "no calls": broken(lambda c: c.pop("calls")),
    "three calls": broken(lambda c: c.update(calls=3)),
    "two calls without guidance": broken(lambda c: c.update(calls=2, guided=False)),
}


PIECES = ["full", "cached", "arrow", ":", "8", "08", "0", "-1", "1x4xall", "allxallxall", "x", "+", "+residual", "+int8", "all"]
WORD = re.compile(r"cached|(full|arrow:(\d+|((\d+|all)x){2}(\d+|all))(\+residual)?)(\+int8)?")
words = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
likely = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["full", "arrow:8", "arrow:08x4xall"]),
        st.sampled_from(["", "+residual"]),
        st.sampled_from(["", "+int8"]),
    ),
)


@settings(max_examples=100, deadline=None)
@given(word=words | likely)
def test_a_word_is_read_if_and_only_if_it_is_written_for_some_method(word):
    """Up to zeros before a number."""
    content = json.loads(PLAN.text()) | {"tokens": asdict(Tokens.of_grid(1, 8, 8))}
    content["legend"]["W"]["heads"] = word
    try:
        plan = Plan(**file_format.read(json.dumps(content).encode()))
    except ValueError:
        assert not WORD.fullmatch(word)
        return
    assert WORD.fullmatch(word)
    written = json.loads(plan.text())
    assert re.sub(r"(?<!\d)0+(?=\d)", "", word) == written["legend"][written["cells"][1].split()[0]]["heads"]


class TestUnsoundFiles:
    def refused(self, path):
        """Check that the plan is refused, with a message that names the file."""
        with pytest.raises(PlanInvalid) as error:
            Plan.load(path)
        assert path.name in str(error.value)

    @pytest.mark.parametrize("change", UNSOUND.values(), ids=UNSOUND)
    def test_json_that_is_no_sound_plan(self, saved, change):
        saved.write_text(json.dumps(change(json.loads(saved.read_text()))))
        self.refused(saved)

    @pytest.mark.parametrize(
        "text", ["", "not json", "{", '{"format": 1,}', "{'format': 1}", "\ufeff{}", pytest.param("[" * 100_000, id="too deep")]
    )
    def test_text_that_is_no_json(self, saved, text):
        saved.write_text(text, encoding="utf-8")
        self.refused(saved)

    def test_a_file_cut_short(self, saved):
        saved.write_text(saved.read_text()[:-30])
        self.refused(saved)

    @pytest.mark.parametrize("data", [b"\x80\x04\x95\x10\x00\xff\xfe", b"\x00" * 64, b"\x89PNG\r\n\x1a\n\x00\x00"])
    def test_a_binary_file(self, saved, data):
        saved.write_bytes(data)
        self.refused(saved)

    def test_a_missing_file_is_the_ordinary_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Plan.load(tmp_path / "nowhere.json")

    def test_the_file_is_sound_before_it_is_changed(self, saved):
        assert Plan.load(saved) == PLAN
