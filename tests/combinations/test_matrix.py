"""The page of combinations says what the tests say."""

import subprocess
import sys
from pathlib import Path

import matrix
import pytest


@pytest.mark.slow
def test_the_page_is_what_the_tests_state(tmp_path):
    """In a process of its own: collecting within a run would collect into it."""
    code = f"import matrix, pathlib; pathlib.Path({str(tmp_path / 'page.md')!r}).write_text(matrix.page(matrix.collected()))"
    folders = [str(Path(matrix.__file__).parent), str(Path(matrix.__file__).parents[1])]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}; {code}"], check=True, capture_output=True)
    assert (tmp_path / "page.md").read_text() == matrix.PAGE.read_text(), "run make matrix"
