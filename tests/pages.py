"""Evaluations at random, and a page taken apart again: what stands in it, found by reading its text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import torch

from arrowhead.engine.stats import Summary
from arrowhead.evaluation.side_by_side import Evaluation, Score
from arrowhead.plans.cells import ASC, AST, FULL, Arrow, Attend, Cached, Full, wa_rs
from arrowhead.plans.flops import Flops
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import Target

SITES = (Site("blocks.0.attn", 3, 8, 16), Site("blocks.1.attn", 3, 8, 16))
TARGET = Target("Transformer", "Scheduler", {}, SITES)
APART = Attend((Full(), Arrow(4), Cached()))
PLANS = {
    "careful": Plan(((FULL, FULL), (wa_rs(8), FULL), (ASC, AST)), TARGET, Tokens(64), guided=True),
    "bold": Plan(((FULL, FULL), (APART, AST), (Attend(Arrow(2)), AST)), TARGET, Tokens(64), guided=True),
}


def score(name: str, plan: Plan, images: torch.Tensor, **values: float) -> Score:
    """A score with figures at random, but for those that are given."""
    attention, module = torch.rand(2).tolist()
    kernels = {"native": 5, "chunked": 3}
    summary: Any = Summary(
        plan.steps,
        plan.steps,
        plan.count(),
        {},
        0,
        kernels,
        Flops(attention, module),
        2**20,
        ("a note",),
        Flops(attention, module),
    )
    metrics = {"psnr": 20 + 20 * torch.rand(()).item(), "ssim": torch.rand(()).item()} | values
    return Score(name, plan, summary, torch.rand(()).item(), metrics, images)


def evaluation(plans: dict[str, Plan] = PLANS, raw: torch.Tensor | None = None, **inputs: Any) -> Evaluation:
    """Six pictures, 8 × 8, three of each of two seeds, unless others are given."""
    raw = torch.rand(6, 3, 8, 8) if raw is None else raw
    scores = tuple(score(name, plan, torch.rand(raw.shape)) for name, plan in plans.items())
    setting = {"inputs": inputs or {"class_labels": [1, 7, 9]}, "seeds": [0, 4], "versions": {"torch": "2"}, "device": "cpu"}
    return Evaluation(raw, 1.5, scores, setting)


@dataclass
class Map:
    """A map of a page: names of rows, areas as (name, what is said, path, opacity), and letters as (text, x, y)."""

    rows: list[str] = field(default_factory=list)
    areas: list[tuple[str, str, str, float]] = field(default_factory=list)
    letters: list[tuple[str, str, str]] = field(default_factory=list)

    def cells(self) -> dict[tuple[int, int], tuple[str, str]]:
        """Row and step to an area's name and words. No cell is in two areas."""
        found: dict[tuple[int, int], tuple[str, str]] = {}
        for name, said, path, _ in self.areas:
            runs = re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path)
            assert "".join(f"M{x} {y}h{a}v1h-{b}z" for x, y, a, b in runs) == path
            for x, y, length, back in runs:
                assert length == back
                for step in range(int(x), int(x) + int(length)):
                    assert found.setdefault((int(y), step), (name, said)) == (name, said)
        assert sum(int(length) for _, _, path, _ in self.areas for length in re.findall(r"h(\d+)v", path)) == len(found)
        return found

    def symbols(self, size: float = 18) -> dict[tuple[int, int], str]:
        """Row and step to the letter that stands there."""
        return {
            (int(float(y) // size), int(float(x) // size)): letter
            for text, xs, ys in self.letters
            for letter, x, y in zip(text, xs.split(), ys.split(), strict=True)
        }


class Page(HTMLParser):
    """All elements with their attributes, the text, the maps, and what style and script hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.maps: list[Map] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self._open.append((tag, attributes))
        if attributes.get("class") == "map":
            self.maps.append(Map())
        if "data-row" in attributes:
            self.maps[-1].rows.append(attributes["data-row"])

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        (above, attributes), (tag, own) = (
            self._open[-2] if len(self._open) > 1 else ("", {}),
            self._open[-1] if self._open else ("", {}),
        )
        if tag in self.raw:
            self.raw[tag].append(data)
            return
        self.words.append(data)
        if tag == "title" and "data-name" in attributes:
            self.maps[-1].areas.append(
                (attributes["data-name"], data, attributes["d"], float(attributes.get("fill-opacity", "1")))
            )
        if tag == "text" and above == "g" and attributes.get("class") == "symbols":
            self.maps[-1].letters.append((data, own["x"], own["y"]))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        """The attributes of all elements of a kind."""
        return [own for name, own in self.elements if name == tag and wanted.items() <= own.items()]

    @property
    def said(self) -> str:
        """All words, with single spaces."""
        return " ".join(" ".join(self.words).split())
