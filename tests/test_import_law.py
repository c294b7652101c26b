"""Who may import whom, and touch others' private names, read from the sources; what a bare `import arrowhead` leaves alone."""

import ast
import re
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
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
ASIDE = {"metrics", "tiny"}  # they know of nothing but errors, and of private names
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def unit_of(path):
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


def units_imported(path):
    """First component under arrowhead of each import of it; the package itself counts as __init__."""
    for name in imports(path):
        package, *parts = name.split(".")
        if package == "arrowhead":
            yield parts[0] if parts and parts[0] in {*LEVEL, *ASIDE} else "__init__"


def packages_imported(path):
    return {name.split(".")[0] for name in imports(path)}


def allowed(unit, other):
    if unit == other:
        return True
    if unit in ASIDE:
        return other in ("errors", "upstream")
    if other in ASIDE:
        return LEVEL[unit] >= LEVEL["calibration"]
    return LEVEL[other] < LEVEL[unit]


def test_every_unit_has_a_place():
    assert {unit_of(path) for path in FILES} <= {*LEVEL, *ASIDE}


@every_file
def test_imports_go_down(path):
    unit = unit_of(path)
    assert [f"{unit} imports {other}" for other in units_imported(path) if not allowed(unit, other)] == []


@every_file
def test_outside_packages_stay_in_their_units(path):
    unit, packages = unit_of(path), packages_imported(path)
    assert "matplotlib" not in packages or (unit == "analysis" and path.stem.startswith("draw"))
    assert not packages & {"typer", "rich"} or unit == "cli"
    assert "huggingface_hub" not in packages or path == ROOT / "plans" / "hub.py"
    assert "diffusers" not in packages or unit != "kernels"


@every_file
def test_only_the_command_line_prints(path):
    prints = [
        n.lineno for n in nodes(path) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"
    ]
    assert not prints or unit_of(path) == "cli"


@pytest.mark.parametrize(
    ("unit", "other"),
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
def test_the_law_forbids(unit, other):
    assert not allowed(unit, other)


def test_the_law_is_read_from_imports_of_every_form(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "import arrowhead as ah\nimport matplotlib.pyplot as plt\nfrom arrowhead import plans, Plan\n"
        "def late():\n    from arrowhead.kernels import flex\n    import arrowhead.searches.greedy\n"
    )
    assert sorted(units_imported(path)) == ["__init__", "__init__", "kernels", "plans", "searches"]
    assert packages_imported(path) == {"arrowhead", "matplotlib"}


PRIVATE = re.compile(r"_[a-zA-Z]\w*")
UPSTREAM = ROOT / "upstream.py"


def private_names_used(path):
    """Private names that a file takes from objects, imports, or spells in a string: (line, name)."""
    every = nodes(path)
    parts_of_f_strings = {part for node in every if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in every:
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif node in parts_of_f_strings:
            continue
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            found = [*node.module.split("."), *(alias.name for alias in node.names)]
        else:
            continue
        yield from ((node.lineno, name) for name in found if PRIVATE.fullmatch(name))


def private_names_defined(path):
    """Private names that a file gives to functions, classes, variables, and attributes of self."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Constant) and str(node.value).startswith("_arrowhead"):  # set on classes made at run time
            yield node.value


OURS = {name for path in FILES for name in private_names_defined(path)} - {name for _, name in private_names_used(UPSTREAM)}


def foreign_names(path, ours=OURS):
    return [f"line {line}: {name}" for line, name in private_names_used(path) if name not in ours]


@pytest.mark.parametrize(
    "path", [path for path in FILES if path != UPSTREAM], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_private_names_of_other_packages_are_in_upstream_alone(path):
    assert foreign_names(path) == []


@pytest.mark.parametrize(
    "line",
    [
        "module._call_impl()",
        "getattr(module, '_forward_hooks')",
        "vars(module).get('_diffusers_hook')",
        "module._old_forward = None",
        "del pipe._progress_bar_config",
        "import torch._dynamo",
        "import torch\ntorch._inductor.config",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.utils._python_dispatch import anything",
        "from diffusers.models.attention_dispatch import _AttentionBackendRegistry",
        "self._modules",
        "class Ours:\n    def __init__(self, module):\n        module._parallel_config = self",
    ],
)
def test_a_private_name_of_another_package_is_found(line, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(line)
    assert len(foreign_names(path)) == 1


def test_own_private_names_are_free(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "class A:\n    def _own(self):\n        self._more = 1\n        return '_'\n\n\nb = A()._own() + A()._more\n"
    )
    assert foreign_names(path, OURS | {*private_names_defined(path)}) == []


def test_every_private_name_in_upstream_is_said_to_be_needed():
    """Each function and constant there says what breaks without it, or undoes one that does."""
    tree = ast.parse(UPSTREAM.read_text(encoding="utf-8"))
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef) and node.name not in (
            "uncompiled",
            "named_modules",
            "restore_progress_bar_config",
        ):
            assert "Without it" in (ast.get_docstring(node) or ""), node.name
        if isinstance(node, ast.Assign | ast.AnnAssign):
            assert isinstance(following, ast.Expr), ast.unparse(node)


def test_importing_arrowhead_loads_nothing_heavy():
    heavy = ["diffusers", "huggingface_hub", "matplotlib", "torchmetrics", "transformers", "triton", "typer"]
    code = f"import sys, arrowhead; sys.exit(' '.join(name for name in {heavy} if name in sys.modules) or 0)"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (fresh.returncode, fresh.stderr) == (0, "")
