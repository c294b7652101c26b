"""Texts that look like f-strings, and have lost their f: a reader would see `{setting['seed']}`, braces and all."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "examples", "benchmarks", "training")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
REPLACED = re.compile(r"\{([^{}\n]+)\}")


def is_expression(inside):
    """Whether braces hold a name, or what starts with one, as in {a.b[0]!r:.3f} or {len(x)}."""
    written = re.split(r"![rsa]|:(?=[^\]]*$)", inside)[0]
    try:
        found = ast.parse(written, mode="eval").body
    except SyntaxError:
        return False
    return isinstance(found, ast.Name | ast.Attribute | ast.Subscript | ast.Call)


def formatted_later(tree):
    """Strings on which `.format` is called or taken, templates that are logged, and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("format", "format_map", "replace"):
            yield from (id(part) for part in ast.walk(node.value))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield id(node.value)


def suspects(text):
    """Line and text of the string constants of a source that hold an expression in braces, outside of f-strings."""
    tree = ast.parse(text)
    skipped = set(formatted_later(tree))
    return [
        (node.lineno, match[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped
        for match in REPLACED.finditer(node.value)
        if is_expression(match[1])
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_text_has_lost_its_f(path):
    assert suspects(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("""x = f"a {b}" "of FID by the {setting['fid']}, where" """, ["{setting['fid']}"]),
        ('x = "got {name!r}, wanted {len(names):>3}"', ["{name!r}", "{len(names):>3}"]),
        ('x = "{seed.value:.2f}"', ["{seed.value:.2f}"]),
        ('x = f"{a}{{b}}"', ["{b}"]),
        ("""x = '{"a": 1}'; y = "{0} {}"; z = r"\\d{3}"; s = "{1, 2}" """, []),
        ('"""Of {a} documentation."""; x = "{a}".format(a=1); y = "{a}".format', []),
    ],
)
def test_it_finds_them(source, found):
    assert [text for _, text in suspects(source)] == found
