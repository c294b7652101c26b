"""The page of `compare` in headless Chromium: the slider, the plans, the maps, dark and light, a phone."""

import random

import chromium
import numpy as np
import pytest
import torch
from pages import PLANS, SITES, evaluation, score
from PIL import Image

from arrowhead.analysis.palette import MEANINGS
from arrowhead.evaluation.side_by_side import Evaluation
from arrowhead.plans.cells import paper_name
from arrowhead.report.page import compare

pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="needs Chromium, as of Debian's package chromium")

GREY, BLUE, GREEN = (0.5, 0.5, 0.5), (0.1, 0.1, 0.9), (0.5, 0.52, 0.5)


def plain(*colours):
    """Pictures of one colour each, 8 × 8."""
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 8, 8)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.opened(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser, tmp_path):
    """A tab that shows the page of two plans; by the end it has fetched the file alone, and has complained of nothing."""
    raw = plain(GREY, GREY, GREY)
    scores = (
        score("careful", PLANS["careful"], plain(BLUE, BLUE, BLUE)),
        score("bold", PLANS["bold"], plain(GREY, BLUE, GREEN)),
    )
    setting = {"inputs": {"prompt": ["a", "b", "x" * 300]}, "seeds": [0]}
    path = tmp_path / "page.html"
    path.write_text(
        compare(Evaluation(raw, 1.0, scores, setting), title="a model " + "y" * 200, command="z" * 300), encoding="utf-8"
    )
    browser.events.clear()
    browser.look()
    browser.open(path)
    yield browser
    browser.run("1")  # whatever was said before this is in
    asked = [said["request"]["url"] for name, said in browser.events if name == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    wrong = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
    assert [said for name, said in browser.events if name in wrong] == []


def focus(tab, where):
    tab.run(f"document.querySelector('{where}').focus()")


def box(tab, where, number=0):
    found = f"document.querySelectorAll('{where}')[{number}].getBoundingClientRect()"
    return tab.run(f"(b => [b.x, b.y, b.width, b.height])({found})")


def clips(tab):
    return set(tab.run("[...document.querySelectorAll('.over')].map(own => getComputedStyle(own).clipPath)"))


def seen(tab, tmp_path, number=0):
    """The pixels of a picture as it is on the screen, (H, W, 3)."""
    tab.screenshot(tmp_path / "screen.png")
    left, top, width, height = map(round, box(tab, ".pair", number))
    return np.asarray(Image.open(tmp_path / "screen.png").convert("RGB"))[top : top + height, left : left + width]


def share_of(pixels, colour):
    """What part of the width is of this colour, in the middle row."""
    wanted = np.rint(np.array(colour) * 255)
    return (abs(pixels[len(pixels) // 2] - wanted) <= 1).all(-1).mean()


class TestSlider:
    def test_keys_move_it_and_raw_is_left_of_it(self, tab, tmp_path):
        assert clips(tab) == {"inset(0px 0px 0px 50%)"}
        focus(tab, "#split")
        tab.press("ArrowLeft")
        assert clips(tab) == {"inset(0px 0px 0px 49%)"}
        for key, left in (("Home", 0), ("End", 100)):
            tab.press(key)
            assert clips(tab) == {f"inset(0px 0px 0px {f'{left}%' if left else '0%'})"}
            pixels = seen(tab, tmp_path)
            assert share_of(pixels, GREY) == pytest.approx(left / 100, abs=0.03)
            assert share_of(pixels, BLUE) == pytest.approx(1 - left / 100, abs=0.03)

    @pytest.mark.parametrize("part", [0.2, 0.7])
    def test_it_is_dragged_on_any_picture(self, tab, tmp_path, part):
        left, top, width, height = box(tab, ".pair", 1)
        tab.mouse("mousePressed", left + width / 2, top + height / 2, held=True)
        tab.mouse("mouseMoved", left + width * part, top + height / 2, held=True)
        tab.mouse("mouseReleased", left + width * part, top + height / 2)
        tab.mouse("mouseMoved", left + width * 0.9, top + height / 2)  # no longer held
        assert float(tab.run("document.getElementById('split').value")) == pytest.approx(100 * part, abs=1.5)
        for number in range(3):
            pixels = seen(tab, tmp_path, number)
            assert share_of(pixels, GREY) == pytest.approx(part, abs=0.05)
            assert share_of(pixels, BLUE) == pytest.approx(1 - part, abs=0.05)

    def test_another_plan(self, tab, tmp_path):
        focus(tab, "input[name=plan]")
        tab.press("ArrowDown")
        assert tab.run("document.getElementById('chosen').value") == "bold"
        focus(tab, "#split")
        tab.press("Home")
        for number, colour in enumerate((GREY, BLUE, GREEN)):
            assert share_of(seen(tab, tmp_path, number), colour) > 0.95
        shown = tab.run("[...document.querySelectorAll('.pair img')].filter(own => own.checkVisibility()).map(own => own.alt)")
        assert shown == [f"{prompt}, seed 0: {name}" for prompt in ("a", "b", "x" * 300) for name in ("raw", "bold")]

    def test_most_changed_first(self, tab, tmp_path):
        tab.run("document.querySelectorAll('input[name=plan]')[1].click()")
        tab.run("(own => { own.value = 'changed'; own.dispatchEvent(new Event('change')) })(document.getElementById('order'))")
        order = "[...document.querySelectorAll('#gallery figcaption span:first-child')].map(own => own.textContent[0])"
        assert tab.run(order) == ["b", "x", "a"]  # what is equal comes last
        tab.run("(own => { own.value = 'made'; own.dispatchEvent(new Event('change')) })(document.getElementById('order'))")
        assert tab.run(order) == ["a", "b", "x"]

    def test_the_difference(self, tab, tmp_path):
        tab.run("document.querySelectorAll('input[name=plan]')[1].click(); document.getElementById('difference').click()")
        for number, colour in enumerate((GREY, BLUE, GREEN)):
            eight_bits = np.rint(np.array([GREY, colour]) * 255)
            assert share_of(seen(tab, tmp_path, number), np.clip(8 * abs(eight_bits[0] - eight_bits[1]), 0, 255) / 255) > 0.95


class TestMaps:
    def said(self, tab, number):
        return tab.run(f"document.querySelectorAll('.map output')[{number}].value")

    def words(self, plan, row, step):
        name = paper_name(plan.cells[step][row])
        meaning = "1 × full, 1 × WA of 4, 1 × cached" if name == "head-wise" else MEANINGS[name]
        return f"{SITES[row].path}, step {step}: {name}: {meaning}"

    def test_pointing_at_a_cell_says_what_it_does(self, tab):
        for number, plan in enumerate(PLANS.values()):
            tab.run(f"document.querySelectorAll('.map')[{number}].scrollIntoView({{block: 'center'}})")
            left, top, width, height = box(tab, ".map .cells", number)
            for step in range(3):
                for row in range(2):
                    tab.mouse(
                        "mouseMoved",
                        left + width * (step + random.uniform(0.1, 0.9)) / 3,
                        top + height * (row + random.uniform(0.1, 0.9)) / 2,
                    )
                    assert self.said(tab, number).startswith(self.words(plan, row, step))

    def test_arrow_keys_go_from_cell_to_cell_and_not_beyond(self, tab):
        plan = PLANS["careful"]
        tab.press("Tab")  # so that the focus is a keyboard's
        focus(tab, ".map .wide")
        assert self.said(tab, 0).startswith(self.words(plan, 0, 0))
        moves = [
            ("ArrowRight", 0, 1),
            ("ArrowDown", 1, 1),
            ("ArrowDown", 1, 1),
            ("ArrowRight", 1, 2),
            ("ArrowRight", 1, 2),
            ("ArrowUp", 0, 2),
            ("ArrowLeft", 0, 1),
        ]
        for key, row, step in moves:
            tab.press(key)
            assert self.said(tab, 0).startswith(self.words(plan, row, step))


@pytest.mark.parametrize("scheme", ["light", "dark"])
class TestLooks:
    def test_light_and_dark(self, tab, scheme, tmp_path):
        tab.look(scheme=scheme)
        tab.screenshot(tmp_path / "screen.png")
        corner = Image.open(tmp_path / "screen.png").convert("L").getpixel((3, 3))
        assert (corner > 230) if scheme == "light" else (corner < 40)

    def test_a_phone_scrolls_in_one_direction(self, tab, scheme):
        tab.look(width=360, height=740, scheme=scheme, touch=True)
        tab.run("for (const own of document.querySelectorAll('details')) own.open = true")
        assert tab.run("innerWidth") == 360
        assert tab.run("document.documentElement.scrollWidth") <= 360
        beyond = """[...document.querySelectorAll('body *')].filter(own => own.getBoundingClientRect().right > 361
          && !own.closest('.wide')).map(own => own.outerHTML.slice(0, 80))"""
        assert tab.run(beyond) == []
        assert tab.run("document.querySelector('#split').getBoundingClientRect().height") >= 24  # a finger's


def test_everything_that_does_something_has_a_name(tab):
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    able = {"slider", "radio", "checkbox", "combobox", "link", "application", "region", "image", "img", "DisclosureTriangle"}
    named = [
        (n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n["ignored"] and n["role"]["value"] in able
    ]
    assert {role for role, _ in named} >= {"slider", "radio", "checkbox", "combobox", "link", "application", "image"}
    assert [role for role, name in named if not name] == []


def test_without_javascript_pictures_and_maps_are_there(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(compare(evaluation(), title="m"), encoding="utf-8")
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.look()
        browser.open(path)
        browser.screenshot(tmp_path / "screen.png")
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert clips(browser) == {"inset(0px 0px 0px 50%)"}
    assert box(browser, ".map .cells")[2] > 40
