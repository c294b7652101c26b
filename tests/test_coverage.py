"""Every transformer of the installed diffusers is supported, refused with a reason, or refused by name."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
from diffusers import ModelMixin
from diffusers.models import transformers as package
from torch import nn
from typer.testing import CliRunner

import arrowhead as ah
from arrowhead.cli import main
from arrowhead.errors import UnsupportedPipeline
from arrowhead.models.families import FAMILIES
from arrowhead.models.find import find
from arrowhead.models.unsupported import UNSUPPORTED

PAGE = Path(__file__).parents[1] / "docs/families.md"


def transformer_classes():
    """The transformer classes of the installed diffusers, by name."""
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__
            if own and issubclass(cls, ModelMixin):
                found[name] = cls
    return found


CLASSES = transformer_classes()
COVERED = {family.transformer for family in FAMILIES}


def test_transformer_classes_are_found():
    assert len(CLASSES) > 30
    assert {"DiTTransformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel"} <= CLASSES.keys()


def test_supported_and_unsupported_classes_exist():
    assert CLASSES.keys() >= COVERED
    assert UNSUPPORTED.keys() <= CLASSES.keys()
    assert not COVERED & UNSUPPORTED.keys()
    named = [name for family in FAMILIES for name in family.branch_order if not name.startswith("Tiny")]
    assert [name for name in named if not hasattr(diffusers, name)] == []
    assert len(named) == len({*named})


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - COVERED))
def test_every_other_class_is_refused_by_name(name):
    transformer = CLASSES[name].__new__(CLASSES[name])
    nn.Module.__init__(transformer)
    pipe = SimpleNamespace(transformer=transformer)
    with pytest.raises(UnsupportedPipeline, match=f"with a {name}.*wanted one of.*DiTPipeline") as caught:
        find(pipe)
    assert UNSUPPORTED.get(name, "") in str(caught.value)


def test_a_second_transformer_is_refused():
    transformer = CLASSES["DiTTransformer2DModel"].__new__(CLASSES["DiTTransformer2DModel"])
    nn.Module.__init__(transformer)
    with pytest.raises(UnsupportedPipeline, match=r"second transformer.*wanted one"):
        find(SimpleNamespace(transformer=transformer, transformer_2=transformer))


def test_supported_gives_the_families():
    table = {row.transformer: row for row in ah.supported()}
    assert table.keys() == COVERED
    assert all(row.pipelines and row.left_alone and row.tested and row.cfg for row in table.values())
    assert table["DiTTransformer2DModel"].compressed == ("self_attention", "feed_forward", "block")
    assert table["PixArtTransformer2DModel"].compressed == ("self_attention", "cross_attention", "feed_forward", "block")
    assert table["FluxTransformer2DModel"].cfg == "two calls"


def test_the_page_has_the_table_as_the_command_prints_it():
    printed = CliRunner().invoke(main.app, ["families", "--markdown"])
    assert printed.exit_code == 0
    assert printed.output.strip() in PAGE.read_text(encoding="utf-8")


def test_the_command_shows_every_family():
    shown = CliRunner().invoke(main.app, ["families"], terminal_width=200)
    assert shown.exit_code == 0
    assert all(row.family in shown.output for row in ah.supported())
