"""The page of `compare`, by reading its text: pictures, maps, figures, and that it asks for nothing from outside."""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import by_head, few, plans
from pages import PLANS, Page, evaluation, score
from PIL import Image

from arrowhead.analysis.palette import COLOURS, MEANINGS, ink
from arrowhead.evaluation.side_by_side import Evaluation
from arrowhead.plans.cells import Arrow, Attend, Reuse, method_name, paper_name
from arrowhead.plans.file_format import SYMBOLS
from arrowhead.plans.plan import Plan
from arrowhead.report.chart import LETTER, LINE, chart
from arrowhead.report.page import HERE, compare
from arrowhead.report.pictures import captions, data_uri

HOSTILE = """<script>alert(1)</script><img src=x onerror="alert(2)"> & 'it' \\u003c "quoted" {{ 7 * 7 }} </title>"""
ONE = torch.zeros(2, 3, 8, 8)
some = settings(max_examples=25, deadline=None)


def decoded(uri):
    kind, data = uri.split(";base64,")
    assert kind == "data:image/webp"
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))))


class TestPictures:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_every_picture_is_in_the_page_as_it_was(self, channels):
        result = evaluation(raw=torch.rand(6, channels, 8, 12))
        shown = [own for own in Page(compare(result, title="m")).all("img") if "alt" in own]
        assert len(shown) == 6 * 3
        for i in range(6):
            said = f"class label {[1, 7, 9][i % 3]}, seed {[0, 4][i // 3]}"
            of_picture = [own for own in shown if own["alt"].startswith(said)]
            assert [own["alt"] for own in of_picture] == [f"{said}: {name}" for name in ("raw", *PLANS)]
            wanted = (result.raw, *(score.images for score in result.scores))
            for own, images in zip(of_picture, wanted, strict=True):
                exact = images[i].double().clamp(0, 1).numpy().transpose(1, 2, 0) * 255
                assert (abs(decoded(own["src"]) - exact) <= 0.5 + 1e-4).all()  # rounded to 8 bits, ties either way

    def test_as_many_as_fit_and_one_at_least(self):
        result = evaluation()
        sizes = [sum(len(data_uri(of[i])) for of in (result.raw, *(s.images for s in result.scores))) for i in range(6)]
        for room, count in ((1, 1), (sum(sizes[:3]), 3), (sum(sizes[:3]) - 1, 2), (sum(sizes), 6)):
            found = Page(compare(result, title="m", room=room))
            assert len(found.all("figure")) - len(found.all("figure", **{"class": "chart"})) == count
            assert (f"The first {count} of 6 pictures are shown" in found.said) == (count < 6)

    @pytest.mark.parametrize(
        ("inputs", "count", "said"),
        [
            (
                {"class_labels": [3, 5]},
                4,
                ["class label 3, seed 0", "class label 5, seed 0", "class label 3, seed 4", "class label 5, seed 4"],
            ),
            ({"prompt": "a cat", "height": 64}, 2, ["a cat, seed 0", "a cat, seed 4"]),
            ({"prompt": ["a", "b"], "num_images_per_prompt": 2}, 8, [f"{p}, seed {s}" for s in (0, 4) for p in "aabb"]),
            ({"prompt": ["a", "b"], "sigmas": [1.0, 0.5, 0.2]}, 4, [f"{p}, seed {s}" for s in (0, 4) for p in "ab"]),
            ({"num_inference_steps": 4}, 2, ["seed 0", "seed 4"]),
        ],
    )
    def test_captions(self, inputs, count, said):
        assert captions({"seeds": [0, 4], "inputs": inputs}, count) == said


class TestMaps:
    @some
    @given(plan=plans())
    def test_every_cell_and_head_of_a_plan_is_in_its_map_once(self, plan):
        sites, *heads = Page(compare(evaluation({"p": plan}, ONE), title="m")).maps
        apart = [i for i, c in enumerate(plan.columns) if any(isinstance(x, Attend) and isinstance(x.method, tuple) for x in c)]
        cells = {(row, step): cell for row, column in enumerate(plan.columns) for step, cell in enumerate(column)}
        assert {at: name for at, (name, _) in sites.cells().items()} == {at: paper_name(cell) for at, cell in cells.items()}
        assert sites.symbols() == {at: SYMBOLS[paper_name(cell)] for at, cell in cells.items()}
        assert sites.rows == [site.path for site in plan.target.sites]
        for at, (_, said) in sites.cells().items():
            for number in self.numbers(cells[at], plan.target.sites[at[0]].heads):
                assert re.search(rf" {number:g}\b" if isinstance(number, float) else rf" {number}\b", said)
        for i, of_site in zip(apart, heads, strict=True):
            site, column = plan.target.sites[i], plan.columns[i]
            assert of_site.rows == [f"{site.path}, head {head}" for head in range(site.heads)]
            assert {at: name for at, (name, _) in of_site.cells().items()} == {
                (head, step): self.of_head(cell, head, site.heads)
                for step, cell in enumerate(column)
                for head in range(site.heads)
            }

    def numbers(self, cell, heads):
        """What a cell's name does not say: how far its bands reach, and a part of a slope."""
        if isinstance(cell, Reuse):
            return {cell.extrapolate} - {0, 1}
        return {method.radius for method in by_head(cell, heads) if isinstance(method, Arrow)}

    def of_head(self, cell, head, heads):
        if not isinstance(cell, Attend):
            return paper_name(cell)
        name = method_name(by_head(cell, heads)[head])
        return {True: "ASC" if name == "full" else f"{name}+ASC", False: name}[cell.share_cfg]

    @some
    @given(plan=plans())
    def test_the_legend_says_what_part_of_the_cells_each_kind_is(self, plan):
        found = Page(compare(evaluation({"p": plan}, ONE), title="m"))
        count = Counter(paper_name(cell) for row in plan.cells for cell in row)
        for name, n in count.items():
            assert f" {SYMBOLS[name]} {name} {MEANINGS[name]}, {100 * n / count.total():.1f} %" in found.said

    def test_narrower_bands_are_paler(self):
        _, heads = Page(compare(evaluation({"bold": PLANS["bold"]}, ONE), title="m")).maps
        shades = {re.search(r"(\d+) tokens", said)[1]: shade for name, said, _, shade in heads.areas if name == "WA"}
        assert 0.3 < shades["2"] < shades["4"] == 1


class TestFigures:
    def test_the_table_has_a_row_for_every_plan(self):
        result = evaluation()
        said = Page(compare(result, title="m")).said
        for s in result.scores:
            flops = [f"{100 * share:.1f} %" for share in (s.summary.flops.attention, s.summary.flops.module)]
            metrics = [f"{value:.4g}" for value in s.metrics.values()]
            assert " ".join([s.name, *flops, f"{s.time_ratio:.2f} ×", "1.0 MiB", *metrics, "native × 5, chunked × 3"]) in said
            assert f"{s.name}: a note" in said

    def test_module_flops_of_different_wholes_are_not_drawn_over_one_axis(self):
        same = Page(compare(evaluation(), title="m"))
        bold = PLANS["bold"]
        one = replace(
            bold, cells=tuple(row[:1] for row in bold.cells), target=replace(bold.target, sites=bold.target.sites[:1])
        )
        apart = Page(compare(evaluation({"a": PLANS["careful"], "b": one}), title="m"))
        assert "over modules’ FLOPs left" in same.said
        assert "different wholes" not in same.said
        assert "over attention’s FLOPs left" in apart.said
        assert "over modules’ FLOPs left" not in apart.said
        assert "different wholes" in apart.said

    def test_what_is_infinite_is_said_and_left_out_of_the_charts(self):
        raw = torch.rand(2, 3, 8, 8)
        equal = score("equal", PLANS["careful"], raw, psnr=math.inf, ssim=1.0)
        setting = evaluation().setting
        said = Page(compare(Evaluation(raw, 1.0, (equal,), setting), title="m")).said
        assert "PSNR ∞ dB" in said
        assert "without equal, which equals raw" in said


values = st.dictionaries(
    st.text("abc", min_size=1, max_size=8),
    st.tuples(st.floats(0, 1.5), st.integers(-(10**9), 10**9).map(lambda n: n / 1e6)),
    min_size=1,
    max_size=12,
)


class TestChart:
    @few
    @given(values=values)
    def test_points_lie_where_the_ticks_say(self, values):
        drawn = chart("x", ("y", ""), values)
        assert {point.name for point in drawn.points} == set(values)
        for at, ticks in ((0, drawn.x_ticks), (1, drawn.y_ticks)):
            (a, low), *_, (b, high) = [(place, float(said.rstrip("%")) / (100 if at == 0 else 1)) for place, said in ticks]
            assert 2 <= len(ticks) <= 9
            for point in drawn.points:
                place = (point.x, point.y)[at]
                assert min(a, b) - 0.11 <= place <= max(a, b) + 0.11
                assert low + (place - a) / (b - a) * (high - low) == pytest.approx(
                    values[point.name][at], abs=0.02 * (high - low)
                )

    @few
    @given(values=values)
    def test_labels_do_not_meet(self, values):
        boxes = []
        for point in chart("x", ("y", ""), values).points:
            start = point.label_x - (LETTER * len(point.name) if point.anchor == "end" else 0)
            boxes.append((start, start + LETTER * len(point.name), point.label_y))
        for i, (start, end, y) in enumerate(boxes):
            assert all(end <= a or b <= start or abs(y - other) >= LINE - 1e-6 for a, b, other in boxes[:i])

    def test_nothing_to_draw(self):
        drawn = chart("x", ("y", ""), {"a": (1.0, math.inf), "b": (1.0, math.nan)})
        assert (drawn.points, drawn.left_out) == ((), ("a", "b"))


class TestText:
    def test_whatever_is_said_is_text(self):
        result = evaluation(prompt=["a", "b", "c"])
        hostile = replace(PLANS["careful"], about={"search": {HOSTILE: HOSTILE}})
        bold, other = (replace(score, plan=hostile) for score in result.scores)
        result = replace(result, scores=(bold, other))
        setting = {**result.setting, "inputs": {"prompt": [HOSTILE, "b", "c"]}}
        changed = replace(result, scores=(replace(bold, name=HOSTILE), other), setting=setting)
        harmless = Page(compare(result, title="m", command="c"))
        found = Page(compare(changed, title=HOSTILE, command=HOSTILE))
        assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]
        assert {key for _, own in found.elements for key in own} == {key for _, own in harmless.elements for key in own}
        assert found.said.count(" ".join(HOSTILE.split())) > 8
        assert found.all("img")[1]["alt"] == f"{HOSTILE}, seed 0: {HOSTILE}"

    def test_nothing_is_fetched_and_only_our_own_script_and_style_run(self):
        found = Page(compare(evaluation(), title="m", command="c"))
        references = [
            own[key]
            for _, own in found.elements
            for key in ("src", "href", "srcset", "data", "action", "xlink:href")
            if key in own
        ]
        assert references
        assert all(reference.startswith("data:") for reference in references)
        assert not [own for _, own in found.elements for key in own if key.startswith("on") or key == "style"]
        assert {tag for tag, _ in found.elements} & {"link", "iframe", "object", "embed", "base", "video", "audio"} == set()
        (policy,) = (own["content"] for own in found.all("meta", **{"http-equiv": "Content-Security-Policy"}))
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
        assert rules.pop("img-src") == "data:"
        for kind in ("style", "script"):
            (text,) = found.raw[kind]
            assert rules.pop(f"{kind}-src") == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            assert not re.search(r"https?:|url\(|@import|fetch|import\(", text)
        assert rules == {}

    def test_the_plans_can_be_taken_from_it(self, tmp_path):
        links = Page(compare(evaluation(), title="m")).all("a")
        assert [own["download"] for own in links] == [f"{name}.json" for name in PLANS]
        for own, plan in zip(links, PLANS.values(), strict=True):
            (tmp_path / own["download"]).write_bytes(
                base64.b64decode(own["href"].removeprefix("data:application/json;base64,"))
            )
            assert Plan.load(tmp_path / own["download"]) == plan

    def test_it_says_how_to_make_it_again(self):
        result = evaluation(prompt=["é", "ü", "o"], guidance_scale=3.5)
        said = Page(compare(result, title="m", command="arrowhead compare m")).said
        assert "arrowhead compare m" in said
        assert f"prompt {json.dumps(['é', 'ü', 'o'], ensure_ascii=False)}; guidance_scale 3.5" in said
        assert "seeds [0, 4]" in said


def luminance(colour):
    channels = [
        int(part * 2 if len(colour) == 4 else part, 16) / 255
        for part in re.findall(r"[0-9a-f]" * (len(colour) // 3), colour[1:])
    ]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


class TestContrast:
    def test_letters_on_every_colour(self):
        assert {name for name in COLOURS if contrast(COLOURS[name], ink(name)) < 4.5} == set()

    @pytest.mark.parametrize("scheme", [0, 1])
    def test_words_in_light_and_dark(self, scheme):
        css = (HERE / "page.css").read_text()
        colours = {name: pair.split(", ")[scheme] for name, pair in re.findall(r"--(\w+): light-dark\(([^)]*)\)", css)}
        for words in ("ink", "soft", "accent"):
            for ground in ("back", "panel"):
                assert contrast(colours[words], colours[ground]) >= 4.5
