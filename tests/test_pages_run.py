"""README and docs/searches.md: their Python runs as it is written, in fewer steps, with a bundled model in the place of FLUX.

README's table holds the figures of the files that it names, and its relative links lead somewhere.
"""

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch

import arrowhead as ah

ROOT = Path(__file__).parents[1]
STEPS = 8


def blocks(page: str) -> list[str]:
    """The page's Python, in few steps and on the CPU."""
    text = (ROOT / page).read_text().replace('.to("cuda")', "").replace("torch.bfloat16", "torch.float32")
    found = re.findall(r"```python\n(.*?)```", text, re.S)
    assert found
    found = [re.sub(r"num_inference_steps=\d+", f"num_inference_steps={STEPS}", block) for block in found]
    return [re.sub(r'pipe\(("[^"]*")\)', rf"pipe(\1, num_inference_steps={STEPS})", block) for block in found]


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    monkeypatch.setenv("ARROWHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pipe = ah.tiny.load("mmdit32")
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda *_, **__: pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(pipe, prompt):
    return pipe(prompt, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1), output_type="pt").images


def test_readme(pipe):
    before = plain(pipe, "a noto of a owl")
    names: dict = {}
    for block in blocks("README.md"):
        exec(block, names)
    assert Path("dog.png").stat().st_size > 1000
    assert names["first"].size == names["second"].size
    assert torch.equal(plain(pipe, "a noto of a owl"), before)


@pytest.mark.slow
def test_searches(pipe):
    names: dict = {"ah": ah, "pipe": pipe}
    names["inputs"] = {"prompt": ["a noto of a owl"], "num_inference_steps": 4, "generator": torch.Generator().manual_seed(2)}
    for block in blocks("docs/searches.md"):
        exec(block.replace("num_inference_steps=8", "num_inference_steps=4"), names)
    assert Path("plan.json").exists()
    assert Path("flux.profile").exists()
    assert {site.kind for site in names["plan"].target.sites} == {"stack"}


def test_readmes_table():
    """Mean and standard error of LPIPS; each is rounded to as many digits as it shows."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (DiT|MMDiT), \d+ steps: (whole steps|single sites)[^|]* \| (.*) \|$", text, re.M)
    assert len(rows) == 4
    for model, kind, cells in rows:
        measured = json.loads(
            (ROOT / f"benchmarks/results/stack_{ {'DiT': 'dit', 'MMDiT': 'mmdit32'}[model] }.json").read_text()
        )
        for part, cell in zip(("55%", "40%", "30%", "20%"), cells.split(" | "), strict=True):
            lpips = measured["rows"][f"{part} {'stack' if kind == 'whole steps' else 'sites'}"]["lpips"]
            for shown, value in zip(cell.split(" ± "), (lpips["mean"], lpips["standard_error"]), strict=True):
                digits = len(shown.split(".")[1])
                assert abs(float(shown) - value) <= 0.51 * 10**-digits, (model, kind, part)
        assert f"{measured['pictures']} pictures, plans from {measured['inputs']} inputs" in text
        assert measured["date"] in text


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_readmes_families_are_supported():
    """Each name has the words of a family's name, versions included."""
    lists = re.findall(r"^- \*\*(?:Images|Video)\*\*: (.*?) and more\.$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(lists) == 2
    families = [row.family.replace(",", "").split() for row in ah.supported()]
    for name in ", ".join(" ".join(each.split()) for each in lists).split(", "):
        assert any(set(name.split()) <= set(family) or family[0].startswith(name) for family in families), name
