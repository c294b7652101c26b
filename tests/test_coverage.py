"""Every transformer of the installed diffusers is supported, refused with a reason, or refused by name."""

import importlib
import inspect
import pkgutil
import re
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
from arrowhead.models.unsupported import UNSUPPORTED, UNSUPPORTED_PIPELINES

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


NAMED = {name for family in FAMILIES for name in family.branch_order if not name.startswith("Tiny")}


def transformer_of(pipeline):
    """The first class of transformers that a pipeline's constructor names as its `transformer`; None where it has none."""
    parameter = inspect.signature(pipeline.__init__).parameters.get("transformer")
    found = parameter and re.search("|".join(rf"\b{name}\b" for name in CLASSES), str(parameter.annotation))
    return found and found[0]


def pipelines():
    """The names of the installed pipelines that have a transformer, with its class."""
    found = {name: getattr(diffusers, name) for name in diffusers._import_structure["pipelines"] if name.endswith("Pipeline")}
    of = {name: transformer_of(cls) for name, cls in found.items() if issubclass(cls, diffusers.DiffusionPipeline)}
    return {name: transformer for name, transformer in of.items() if transformer}


PIPELINES = pipelines()


def test_transformer_classes_are_found():
    assert len(PIPELINES) > 100
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
    with pytest.raises(UnsupportedPipeline, match=f"with a {name}.*wanted a transformer like.*docs/families.md") as caught:
        find(pipe)
    assert UNSUPPORTED.get(name, "") in str(caught.value)
    assert str(caught.value).startswith("take a model" if name in UNSUPPORTED else "describe the transformer with an")


def test_the_nearest_families_are_named_in_one_line():
    kandinsky6 = CLASSES["Kandinsky6Transformer3DModel"]
    transformer = kandinsky6.__new__(kandinsky6)
    nn.Module.__init__(transformer)
    with pytest.raises(UnsupportedPipeline, match=r"like Kandinsky5Transformer3DModel \(Kandinsky 5\)") as caught:
        find(SimpleNamespace(transformer=transformer))
    assert len(str(caught.value)) < 450
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_PIPELINES))
def test_pipelines_that_need_more_are_refused_with_the_reason(name):
    family = next(f for f in FAMILIES if f.transformer == PIPELINES[name])
    transformer = CLASSES[family.transformer].__new__(CLASSES[family.transformer])
    nn.Module.__init__(transformer)
    made = getattr(diffusers, name).__new__(getattr(diffusers, name))
    vars(made)["transformer"] = transformer
    transformer.register_to_config(num_frame_per_block=1)
    with pytest.raises(UnsupportedPipeline, match=f"^take another pipeline.*got {name}, which has ") as caught:
        find(made)
    assert UNSUPPORTED_PIPELINES[name] in str(caught.value)


def test_each_pipeline_of_a_supported_class_is_supported_or_has_a_reason():
    of_covered = {name for name, transformer in PIPELINES.items() if transformer in COVERED}
    assert of_covered == NAMED | UNSUPPORTED_PIPELINES.keys()
    assert not NAMED & UNSUPPORTED_PIPELINES.keys()


def test_how_much_of_diffusers_is_covered(capsys):
    with capsys.disabled():
        print(f"\ndiffusers {diffusers.__version__}: {len(NAMED)} of {len(PIPELINES)} pipelines with a transformer, ", end="")
        print(f"{len(COVERED)} of {len(CLASSES)} transformer classes; {len(UNSUPPORTED_PIPELINES)} pipelines and ", end="")
        print(f"{len(UNSUPPORTED)} classes refused with a reason")
    assert len(NAMED) >= 113
    assert len(COVERED) >= 49


def test_a_second_transformer_is_refused():
    transformer = CLASSES["DiTTransformer2DModel"].__new__(CLASSES["DiTTransformer2DModel"])
    nn.Module.__init__(transformer)
    with pytest.raises(UnsupportedPipeline, match=r"second transformer.*wanted one"):
        find(SimpleNamespace(transformer=transformer, transformer_2=transformer))


def test_supported_gives_the_families():
    table = {row.transformer: row for row in ah.supported()}
    assert table.keys() == COVERED
    assert all(row.pipelines and row.left_alone and row.tested and row.cfg for row in table.values())
    assert table["DiTTransformer2DModel"].compressed == ("self_attention", "feed_forward", "block", "stack")
    assert table["PixArtTransformer2DModel"].compressed == (
        "self_attention",
        "cross_attention",
        "feed_forward",
        "block",
        "stack",
    )
    assert table["FluxTransformer2DModel"].cfg == "two calls"


def test_the_page_has_the_table_as_the_command_prints_it():
    printed = CliRunner().invoke(main.app, ["families", "--markdown"])
    assert printed.exit_code == 0
    assert printed.output.strip() in PAGE.read_text(encoding="utf-8")


def test_the_command_shows_every_family():
    shown = CliRunner().invoke(main.app, ["families"], terminal_width=200)
    assert shown.exit_code == 0
    assert all(row.family in shown.output for row in ah.supported())
