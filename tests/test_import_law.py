"""Who may import whom, read from the sources; and what a bare `import arrowhead` leaves alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import arrowhead

ROOT = Path(arrowhead.__file__).parent
LAYERS = [  # lowest first: a package imports from those below it, and from itself
    {"errors", "versions", "upstream"},
    {"plans"},
    {"models", "kernels"},
    {"engine"},
    {"calibration"},
    {"searches"},
    {"evaluation", "analysis"},
    {"report"},
    {"__init__"},  # the public API, which only the command line uses
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ASIDE = {"metrics", "tiny"}  # they know of nothing but errors
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path):
    """Dotted names of all that a file imports, wherever in it: `from a import b` gives a.b."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path):
    """First component under arrowhead of each import of it; the package itself counts as __init__."""
    for name in imports(path):
        package, *parts = name.split(".")
        if package == "arrowhead":
            yield parts[0] if parts and parts[0] in {*LEVEL, *ASIDE} else "__init__"


def packages_imported(path):
    return {name.split(".")[0] for name in imports(path)}


def allowed(room, other):
    if room == other:
        return True
    if room in ASIDE:
        return other == "errors"
    if other in ASIDE:
        return LEVEL[room] >= LEVEL["calibration"]
    return LEVEL[other] < LEVEL[room]


def test_every_room_has_a_place():
    assert {room_of(path) for path in FILES} <= {*LEVEL, *ASIDE}


@every_file
def test_imports_go_down(path):
    room = room_of(path)
    assert [f"{room} imports {other}" for other in rooms_imported(path) if not allowed(room, other)] == []


@every_file
def test_outside_packages_stay_in_their_rooms(path):
    room, packages = room_of(path), packages_imported(path)
    assert "matplotlib" not in packages or (room == "analysis" and path.stem.startswith("draw"))
    assert not packages & {"typer", "rich"} or room == "cli"
    assert "diffusers" not in packages or room != "kernels"


@every_file
def test_only_the_command_line_prints(path):
    prints = [
        n.lineno for n in nodes(path) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"
    ]
    assert not prints or room_of(path) == "cli"


@pytest.mark.parametrize(
    ("room", "other"),
    [
        ("kernels", "models"),
        ("models", "kernels"),
        ("plans", "engine"),
        ("engine", "calibration"),
        ("metrics", "plans"),
        ("tiny", "engine"),
        ("plans", "metrics"),
    ],
)
def test_the_law_forbids(room, other):
    assert not allowed(room, other)


def test_the_law_is_read_from_imports_of_every_form(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "import arrowhead as ah\nimport matplotlib.pyplot as plt\nfrom arrowhead import plans, Plan\n"
        "def late():\n    from arrowhead.kernels import flex\n    import arrowhead.searches.greedy\n"
    )
    assert sorted(rooms_imported(path)) == ["__init__", "__init__", "kernels", "plans", "searches"]
    assert packages_imported(path) == {"arrowhead", "matplotlib"}


def test_importing_arrowhead_loads_nothing_heavy():
    heavy = ["diffusers", "matplotlib", "torchmetrics", "transformers", "triton", "typer"]
    code = f"import sys, arrowhead; sys.exit(' '.join(name for name in {heavy} if name in sys.modules) or 0)"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (fresh.returncode, fresh.stderr) == (0, "")
