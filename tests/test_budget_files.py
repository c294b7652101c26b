"""Tables in files: what is written is read, and whatever else a file may hold is refused in words."""

import json
from dataclasses import fields, replace

import pytest
import torch
from budget import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from independent import plans
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import Site
from arrowhead.plans.target import Target

TENSORS = ("outputs", "residuals")
EVERY = (*TENSORS, "roundings")
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

tables = st.builds(
    synthetic,
    st.integers(0, 2**32),
    steps=st.integers(1, 5),
    count=st.integers(1, 3),
    heads=st.integers(1, 3),
    radii=st.sampled_from([(), (4,), (16, 4)]),
    ages=st.integers(1, 3),
    guided=st.booleans(),
    text=st.integers(0, 3),
    calls=st.sampled_from([1, 2]),
    feed_forward=st.booleans(),
    precisions=st.sampled_from([(), ("int8",)]),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def parts(path):
    """A table file's header, and its tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["arrowhead"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def written(path, header, tensors):
    save_file(tensors, path, metadata={"arrowhead": header if isinstance(header, str) else json.dumps(header)})


def is_refused(path):
    with pytest.raises(InputsInvalid, match=r"no sound table; wanted a file that Table\.save wrote"):
        ah.Table.load(path)
    return True


def places(value, path=()):
    """Of all that a header holds, by how to get there."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(value, path, new):
    """The header with one place of it changed."""
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], new)
    return copied


@few
@given(table=tables, about=st.dictionaries(st.text(max_size=3), json_values, max_size=3))
def test_what_is_saved_is_read(table, about, tmp_path):
    table = replace(table, about=about)
    table.save(tmp_path / "table")
    read = ah.Table.load(tmp_path / "table")
    for field in fields(table):
        mine, theirs = getattr(table, field.name), getattr(read, field.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        else:
            assert mine == theirs, field.name
            assert type(mine) is type(theirs), field.name


def test_a_table_that_was_read_gives_the_same_plans(tmp_path):
    table = synthetic(3, feed_forward=True, radii=(12, 4))
    table.save(str(tmp_path / "table.safetensors"))
    for budget in (ah.Budget(module_flops=0.5), ah.Budget(transformer_flops=0.5, granularity="site")):
        assert ah.solve(ah.Table.load(tmp_path / "table.safetensors"), budget) == ah.solve(table, budget)


def test_a_view_of_a_table_is_saved(tmp_path):
    """Its tensors are parts of larger ones."""
    table = synthetic(3, feed_forward=True).attention_alone()
    table = replace(table, outputs=table.outputs[..., :2], residuals=table.residuals[..., :2])
    table.save(tmp_path / "table")
    assert torch.equal(ah.Table.load(tmp_path / "table").outputs, table.outputs)


@few
@given(table=tables, data=st.data())
def test_a_file_cut_short_or_changed_in_a_byte(table, data, tmp_path):
    """It is refused, or still a table: a byte of a number is a number."""
    table.save(tmp_path / "table")
    content = (tmp_path / "table").read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    (tmp_path / "cut").write_bytes(content[:cut])
    assert is_refused(tmp_path / "cut")
    place, byte = data.draw(st.integers(0, min(len(content), 1500) - 1)), data.draw(st.integers(0, 255))
    (tmp_path / "changed").write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
    try:
        assert isinstance(ah.Table.load(tmp_path / "changed"), ah.Table)
    except InputsInvalid as refusal:
        assert "wanted a file that Table.save wrote" in str(refusal)  # noqa: PT017, either will do


@pytest.mark.parametrize("content", [b"", b"no table", b"{}", b"\xff" * 100, json.dumps({"format": 1}).encode()], ids=repr)
def test_what_is_no_such_file(content, tmp_path):
    (tmp_path / "table").write_bytes(content)
    assert is_refused(tmp_path / "table")


def test_a_folder_or_nothing_at_all(tmp_path):
    assert is_refused(tmp_path)
    assert is_refused(tmp_path / "nothing")


@few
@given(plan=plans())
def test_a_plan_is_no_table(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert is_refused(tmp_path / "plan.json")


@pytest.mark.parametrize("metadata", [None, {}, {"other": "{}"}, {"arrowhead": ""}, {"arrowhead": "[" * 10**5}], ids=str)
def test_tensors_of_somebody_else(metadata, tmp_path):
    table = synthetic(0)
    save_file({name: getattr(table, name) for name in TENSORS}, tmp_path / "table", metadata=metadata)
    assert is_refused(tmp_path / "table")


@few
@given(
    table=tables,
    name=st.sampled_from(EVERY),
    how=st.sampled_from(["missing", "longer", "flatter", "half", "empty"]),
    dim=st.integers(0, 5),
)
def test_tensors_that_do_not_fit(table, name, how, dim, tmp_path):
    table.save(tmp_path / "table")
    header, tensors = parts(tmp_path / "table")
    if name not in tensors:
        return
    tensor = tensors.pop(name)
    dim = min(dim, tensor.ndim - 2)  # the last one's length is free, if both have it
    if how == "longer":
        tensors[name] = (
            torch.cat([tensor, tensor[(slice(None),) * dim + (slice(0, 1),)]], dim) if tensor.numel() else tensor[None]
        )
    elif how == "flatter":
        tensors[name] = tensor.flatten(dim)
    elif how == "half":
        tensors[name] = tensor.repeat(*[1] * (tensor.ndim - 1), 2) if tensor.numel() else tensor[None]
    elif how == "empty":
        tensors = {key: value[..., :0].contiguous() for key, value in {**tensors, name: tensor}.items()}
    written(tmp_path / "table", header, tensors)
    assert is_refused(tmp_path / "table")


@few
@given(
    table=tables,
    name=st.sampled_from((*TENSORS, "quantisation_errors")),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    data=st.data(),
)
def test_tensors_that_are_not_finite(table, name, bad, data, tmp_path):
    tensor = getattr(table, name)
    if tensor is None or not tensor.numel():
        return
    tensor = tensor.clone()
    tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = bad
    replace(table, **{name: tensor}).save(tmp_path / "table")
    assert is_refused(tmp_path / "table")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_type(name, dtype, tmp_path):
    synthetic(0).save(tmp_path / "table")
    header, tensors = parts(tmp_path / "table")
    written(tmp_path / "table", header, tensors | {name: tensors[name].to(dtype)})
    assert is_refused(tmp_path / "table")


@few
@given(table=tables, data=st.data(), new=json_values)
def test_a_header_with_something_else_in_one_place(table, data, new, tmp_path):
    """It is refused, or says something else that a table can say, and is solved or refused for what it says."""
    table.save(tmp_path / "table")
    header, tensors = parts(tmp_path / "table")
    place = data.draw(st.sampled_from(list(places(header))))
    written(tmp_path / "table", changed(header, place, new), tensors)
    try:
        read = ah.Table.load(tmp_path / "table")
    except InputsInvalid:
        return
    try:
        plan = ah.solve(read, ah.Budget(transformer_flops=0.9, granularity="site"))
    except InputsInvalid as refusal:
        assert "wanted at least" in str(refusal)  # noqa: PT017, either will do
    else:
        assert plan.steps == len(header["gains"])


@pytest.mark.parametrize("name", ["format", "target", "tokens", "branches", "radii", "ages", "gains", "final", "elements"])
def test_a_header_that_lacks_something(name, tmp_path):
    synthetic(0).save(tmp_path / "table")
    header, tensors = parts(tmp_path / "table")
    del header[name]
    written(tmp_path / "table", header, tensors)
    assert is_refused(tmp_path / "table")


WITHIN = TypeAdapter(Site).dump_python(synthetic(0).target.sites[0], mode="json", by_alias=True)
LEVELS = TypeAdapter(Target).dump_python(synthetic(0).target, mode="json", by_alias=True) | {"levels": [1.0]}
BLOCK = WITHIN | {"path": "blocks.0", "heads": 1, "kind": "block", "within": [WITHIN]}
SENSELESS = {
    "noise levels of other steps": {"target": LEVELS},
    "another format": {"format": 2},
    "a block of nothing": {"blocks": [BLOCK | {"within": []}]},
    "a block of something else": {"blocks": [BLOCK | {"within": [BLOCK | {"path": "blocks.0.ff", "kind": "feed_forward"}]}]},
    "a block that is none": {"blocks": [BLOCK | {"kind": "feed_forward"}]},
    "a format to come": {"format": 8},
    "a switch after its steps": {"switch": 100},
    "a switch before its steps": {"switch": -1},
    "a precision that it has no products of": {"precisions": ["int8"]},
    "a precision that is native": {"precisions": ["native"]},
    "a precision that is none": {"precisions": ["int7"]},
    "another number of answers": {"answers": [1.0]},
    "an answer of nothing": {"answers": [0.0] * 6},
    "an answer below nothing": {"answers": [-1.0] * 6},
    "an endless answer": {"answers": [float("inf")] * 6},
    "a power above 1": {"feedback": 1.5},
    "a power below nothing": {"feedback": -0.5},
    "a power that is no number": {"feedback": float("nan")},
    "more than there is": {"more": 1},
    "a radius below nothing": {"radii": [-4]},
    "a radius that is no number of tokens": {"radii": [4.5]},
    "a box in no grid": {"radii": [{"frames": None, "rows": 1, "columns": 1}]},
    "a box of less than nothing": {"radii": [{"frames": None, "rows": -1, "columns": 1}]},
    "another number of radii": {"radii": [4, 2]},
    "no steps": {"gains": []},
    "another number of steps": {"gains": [1.0]},
    "a gain that is no number": {"gains": ["1"] * 6},
    "a gain below nothing": {"gains": [-1.0] * 6},
    "a gain that is not finite": {"gains": [float("nan")] * 6},
    "an endless gain": {"gains": [float("inf")] * 6},
    "nothing in the end": {"final": 0.0},
    "less than nothing in the end": {"final": -1.0},
    "no elements": {"elements": 0},
    "ages below nothing": {"ages": -1},
    "FLOPs below nothing": {"other_flops": -1.0},
    "unknown branches": {"branches": {"order": "cond_last", "guided": True}},
    "one branch of two": {"branches": {"order": "cond_first", "guided": False}},
    "no tokens": {"tokens": {"visual": 0, "text": 0, "text_first": False}},
}


@pytest.mark.parametrize("change", SENSELESS.values(), ids=SENSELESS)
def test_a_header_that_makes_no_sense(change, tmp_path):
    synthetic(0).save(tmp_path / "table")
    header, tensors = parts(tmp_path / "table")
    written(tmp_path / "table", header | change, tensors)
    assert is_refused(tmp_path / "table")


def test_a_header_with_a_block(tmp_path):
    synthetic(0).save(tmp_path / "table")
    header, tensors = parts(tmp_path / "table")
    written(tmp_path / "table", header | {"blocks": [BLOCK]}, tensors)
    read = ah.Table.load(tmp_path / "table")
    assert [site.path for site in read.in_blocks] == ["blocks.0", "blocks.1.attn"]
    read.save(tmp_path / "again")
    assert ah.Table.load(tmp_path / "again").blocks == read.blocks


@pytest.mark.parametrize("version", [4, 5])
def test_a_file_from_before_there_were_precisions_or_grids(version, tmp_path):
    """It has none, and is otherwise the same."""
    table = synthetic(0)
    table.save(tmp_path / "table")
    header, tensors = parts(tmp_path / "table")
    del header["precisions"], header["switch"], header["tokens"]["grid"]
    written(tmp_path / "table", header | {"format": version}, tensors)
    read = ah.Table.load(tmp_path / "table")
    assert (read.precisions, read.quantisation_errors) == ((), None)
    assert ah.solve(read, ah.Budget(module_flops=0.5)) == ah.solve(table, ah.Budget(module_flops=0.5))


@pytest.mark.parametrize("precisions", [["int8", "int8"], ["native"], []], ids=str)
def test_precisions_that_do_not_fit_the_tensors(precisions, tmp_path):
    """Of none at all, what is written of one is not looked at."""
    synthetic(0, precisions=("int8",)).save(tmp_path / "table")
    header, tensors = parts(tmp_path / "table")
    written(tmp_path / "table", header | {"precisions": precisions}, tensors)
    if precisions:
        assert is_refused(tmp_path / "table")
    else:
        assert ah.Table.load(tmp_path / "table").quantisation_errors is None


def test_a_table_without_steps(tmp_path):
    """Its tensors fit."""
    table = synthetic(0)
    table = replace(table, sampler_gains=(), outputs=table.outputs[:0], residuals=table.residuals[:0])
    table.save(tmp_path / "table")
    assert is_refused(tmp_path / "table")


def test_a_table_without_sites(tmp_path):
    table = synthetic(0)
    table = replace(
        table, target=replace(table.target, sites=()), outputs=table.outputs[:, :0], residuals=table.residuals[:, :0]
    )
    table.save(tmp_path / "table")
    assert is_refused(tmp_path / "table")
