"""The package as people get it: a wheel with the bundled models, which runs outside of any checkout, offline."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import arrowhead as ah

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/arrowhead"
LARGEST = 48 * 2**20
"""Three models of 5 to 16 MB are nearly all of it; PyPI takes 100 MB."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `pip wheel .` builds it, but by the backend that is installed, offline."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_what_it_carries(wheel):
    """Every file of the package, the licence, and nothing else."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        assert all(file.read(f"arrowhead/{path}") == (SOURCE / path).read_bytes() for path in tracked())
        dist = f"arrowhead-{ah.__version__}.dist-info"
        assert file.read(f"{dist}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    expected = {f"arrowhead/{path}" for path in tracked()}
    expected |= {f"{dist}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == expected
    for model in ah.tiny.PIPELINES:
        assert f"arrowhead/tiny/{model}/transformer/diffusion_pytorch_model.safetensors" in names
    assert {f"arrowhead/compare/{name}" for name in ("page.html", "parts.html", "page.css", "page.js")} <= names
    assert wheel.stat().st_size < LARGEST


def tracked():
    """The files of the package, without what Python and editors leave there."""
    every = (path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*") if path.is_file())
    return sorted(path for path in every if "__pycache__" not in path and not path.startswith("."))


def test_what_it_says_of_itself(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as file:
        said = Parser().parsestr(file.read(f"arrowhead-{ah.__version__}.dist-info/METADATA").decode())
    assert said["Name"] == "arrowhead"
    assert said["Version"] == ah.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert said["License-File"] == "LICENSE"
    assert said.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert set(said.get_all("Classifier")) == set(project["classifiers"])
    plain = {line for line in said.get_all("Requires-Dist") if "extra ==" not in line}
    assert plain == set(project["dependencies"])


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    """A clean environment that has the wheel, and finds what it depends on where these tests do; its commands, to be run."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True)
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    (folder / "home").mkdir()
    nowhere = "http://127.0.0.1:9"
    env = {"HOME": str(folder / "home"), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"http_proxy": nowhere, "https_proxy": nowhere, "COLUMNS": "120"}

    def run(*command):
        whole = [str(folder / "venv/bin" / command[0]), *map(str, command[1:])]
        done = subprocess.run(whole, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    return run


def test_it_is_imported_from_where_it_was_installed(place):
    said = place("python", "-c", "import arrowhead; print(arrowhead.__file__, arrowhead.__version__)")
    file, version = said.split()
    assert Path(file).is_relative_to(place.folder)
    assert version == ah.__version__


def test_its_commands_run(place):
    assert "FluxPipeline" in place("arrowhead", "families", "--markdown")
    inputs = ["tiny:dit", "-i", "class_labels=[1]", "-i", "num_inference_steps=2"]
    place("arrowhead", "search", *inputs, "--threshold", "D4", "--out", "plan.json")
    assert ah.Plan.load(place.folder / "plan.json").steps == 2
    place("arrowhead", "generate", *inputs, "--plan", "plan.json", "--out", "images")
    assert (place.folder / "images/000.png").stat().st_size > 500
    place("arrowhead", "compare", *inputs, "--plan", "plan.json", "--seeds", "1", "--out", "page.html")
    assert "<html" in (place.folder / "page.html").read_text()


def test_a_prompt_needs_no_network(place):
    """Its tokenizer and text encoder are in the package, too."""
    inputs = ["tiny:mmdit32", "-i", "prompt=a twemoji of a fish", "-i", "num_inference_steps=2"]
    place("arrowhead", "generate", *inputs, "--out", "emoji")
    assert (place.folder / "emoji/000.png").exists()
