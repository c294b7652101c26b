"""One version, said in three places."""

import re
import tomllib
from pathlib import Path

import arrowhead as ah

ROOT = Path(__file__).parent.parent


def test_they_agree():
    """The changelog's latest release is the one that the package is."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == ah.__version__
    released = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == ah.__version__
    assert len(released) == len(set(released))
