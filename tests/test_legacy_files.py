"""Plans and tables that earlier versions wrote: read with the same content, and solved as before. See legacy/README.md."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import arrowhead as ah
from arrowhead.plans.cells import Cached, Cell, Full, Method, Radius, Reuse
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.target import Target

FOLDER = Path(__file__).parent / "legacy"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
PLANS, TABLES = EXPECTED["plans"], EXPECTED["tables"]
SOLVED = [
    pytest.param(
        name, solved, id="-".join([name.split(".")[0], *(f"{key}={value}" for key, value in solved["budget"].items())])
    )
    for name, table in TABLES.items()
    for solved in table["solved"]
]
TABLE_FIELDS = (  # names in files, in the order of Table's fields
    *("target", "tokens", "branches", "radii", "ages", "outputs", "residuals", "gains", "final", "elements", "other_flops"),
    *("images", "regions", "itemsize", "answers", "feedback", "blocks", "about", "switch", "precisions", "roundings"),
    "other_texts",
)


def spelled_radius(radius: Radius) -> int | list[int | None]:
    return radius if isinstance(radius, int) else [*radius.reaches]


def spelled_method(method: Method) -> list[Any]:
    if isinstance(method, Cached):
        return ["cached"]
    if isinstance(method, Full):
        return ["full", method.precision]
    return ["arrow", spelled_radius(method.radius), method.residual, method.precision]


def spelled_cell(cell: Cell) -> dict[str, Any]:
    if isinstance(cell, Reuse):
        return {"reuse": cell.extrapolate}
    methods = cell.method if isinstance(cell.method, tuple) else (cell.method,)
    return {"attend": list(map(spelled_method, methods)), "share_cfg": cell.share_cfg}


def spelled_tokens(tokens: Tokens) -> dict[str, Any]:
    grid = tokens.grid and [tokens.grid.frames, tokens.grid.rows, tokens.grid.columns]
    return vars(tokens) | {"grid": grid}


def spelled_site(site: Site) -> dict[str, Any]:
    found = vars(site) | {"within": list(map(spelled_site, site.within))}
    found["heads_apart"] = found.pop("separable_heads")
    return found


def require_target(target: Target, wanted: dict[str, Any]) -> None:
    assert target.transformer == wanted["transformer"]
    assert target.scheduler == wanted["scheduler"]
    assert target.scheduler_config == wanted["scheduler_config"]
    assert list(map(spelled_site, target.sites)) == wanted["sites"]


def require_cells(plan: ah.Plan, wanted: dict[str, Any]) -> None:
    cells = [[wanted["distinct_cells"][number] for number in row] for row in wanted["cells"]]
    assert [list(map(spelled_cell, row)) for row in plan.cells] == cells


def table_fields(table: ah.Table) -> dict[str, Any]:
    """A table's fields by their names in files."""
    return {name: getattr(table, field.name) for name, field in zip(TABLE_FIELDS, fields(table), strict=True)}


def require_tensor(tensor: torch.Tensor | None, wanted: dict[str, Any] | None) -> None:
    """Check a tensor by its shape, its sum and its sum of squares."""
    assert (tensor is None) == (wanted is None)
    if tensor is not None:
        assert list(tensor.shape) == wanted["shape"]
        assert tensor.dtype == torch.float32
        exact = tensor.double()
        assert [exact.sum().item(), exact.square().sum().item()] == pytest.approx([wanted["sum"], wanted["squares"]])


def test_every_file_is_expected() -> None:
    assert {file.name for file in FOLDER.glob("plan_*")} == {*PLANS}
    assert {file.name for file in FOLDER.glob("table_*")} == {*TABLES}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_read(name: str, tmp_path: Path) -> None:
    plan, wanted = ah.Plan.load(FOLDER / name), PLANS[name]
    for field in ("steps", "guided", "calls", "switch", "about"):
        assert getattr(plan, field) == wanted[field]
    assert spelled_tokens(plan.tokens) == wanted["tokens"]
    require_target(plan.target, wanted)
    require_cells(plan, wanted)
    plan.save(tmp_path / name)
    assert ah.Plan.load(tmp_path / name) == plan


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read(name: str, tmp_path: Path) -> None:
    table, wanted = ah.Table.load(FOLDER / name), TABLES[name]
    found = table_fields(table)
    for field in ("ages", "final", "elements", "other_flops", "images", "regions", "itemsize", "feedback", "switch", "about"):
        assert found[field] == wanted[field]
    for field in ("gains", "answers", "precisions"):
        assert list(found[field]) == wanted[field]
    assert list(map(spelled_radius, table.radii)) == wanted["radii"]
    assert spelled_tokens(table.tokens) == wanted["tokens"]
    assert vars(table.branches) == wanted["branches"]
    require_target(table.target, wanted)
    assert list(map(spelled_site, table.blocks)) == wanted["blocks"]
    table.save(tmp_path / name)
    for tensors in (found, table_fields(ah.Table.load(tmp_path / name))):
        for field, numbers in wanted["tensors"].items():
            require_tensor(tensors[field], numbers)


@pytest.mark.parametrize(("name", "wanted"), SOLVED)
def test_a_table_is_solved_as_before(name: str, wanted: dict[str, Any]) -> None:
    budget = {key: tuple(value) if isinstance(value, list) else value for key, value in wanted["budget"].items()}
    plan = ah.solve(ah.Table.load(FOLDER / name), ah.Budget(**budget))
    assert [site.path for site in plan.target.sites] == wanted["sites"]
    require_cells(plan, wanted)
    assert plan.about["search"]["predicted_error"] == pytest.approx(wanted["predicted_error"], rel=0.01)
