"""The public names, and the shape of the tree: packages at the root, and modules that no function hides."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import arrowhead as ah

ROOT = Path(ah.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PACKAGES = [path.parent for path in FILES if path.name == "__init__.py" and path.parent != ROOT]


def dotted(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [dotted(path) for path in FILES if path.name != "__main__.py"]


def test_dir_shows_the_public_names_alone():
    assert dir(ah) == sorted([*ah.__all__, "__version__"])


@pytest.mark.parametrize("name", ah.__all__)
def test_public_names_are_reachable_and_documented(name):
    assert getattr(ah, name).__doc__


def test_public_names_are_reachable_by_a_star_import():
    found = {}
    exec("from arrowhead import *", found)
    assert set(ah.__all__) <= set(found)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="evaluation_of"):
        ah.evaluation_of  # noqa: B018


# one process, in which every public name is used before the modules are imported: the order that hides a module is looked for
HIDDEN = """
import sys, types, arrowhead
[getattr(arrowhead, name) for name in dir(arrowhead)]
from importlib import import_module
names = sys.argv[1:]
for name in names:
    import_module(name)
def attribute(name):
    found = arrowhead
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found
wrong = [n for n in names if not isinstance(sys.modules[n], types.ModuleType) or attribute(n) is not sys.modules[n]]
print(*wrong)
"""


def test_no_function_hides_a_module():
    fresh = subprocess.run([sys.executable, "-c", HIDDEN, *MODULES], capture_output=True, text=True, check=False)
    assert (fresh.returncode, fresh.stdout.split()) == (0, []), fresh.stderr


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(sorted, id="first to last", marks=pytest.mark.slow),
        pytest.param(lambda names: sorted(names, reverse=True), id="last to first", marks=pytest.mark.slow),
    ],
)
def test_modules_are_imported_by_their_names(order):
    code = "\n".join(f"import {name} as m; assert m.__name__ == {name!r}, m" for name in order(MODULES))
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert fresh.returncode == 0, fresh.stderr


def test_at_the_root_are_packages_and_at_most_five_files():
    assert len([*ROOT.glob("*.py")]) <= 5
    assert [path for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__" and path not in PACKAGES] == []


@pytest.mark.parametrize("package", PACKAGES, ids=dotted)
def test_a_package_says_in_one_sentence_what_it_is(package):
    text = import_module(dotted(package / "__init__.py")).__doc__
    assert text.strip().endswith(".")
    assert text.count(". ") == text.count(".\n") == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_has_at_most_400_lines_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))
