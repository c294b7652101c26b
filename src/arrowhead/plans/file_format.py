"""How a plan is written as JSON that a person can read, and read back."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from arrowhead.plans import limits
from arrowhead.plans.cells import (
    Arrow,
    Attend,
    Box,
    Cached,
    Cell,
    Full,
    Method,
    Precision,
    Reuse,
    extrapolates,
    paper_name,
)
from arrowhead.plans.layout import Tokens
from arrowhead.plans.target import Target

if TYPE_CHECKING:  # it imports this file
    from arrowhead.plans.plan import Plan

FORMAT = 4
READABLE = (2, 3, FORMAT)
"""Format 3 is without slopes, grids and a second transformer, format 2 without precisions besides; else they mean the same."""
SYMBOLS = {
    "full": "F",
    "ASC": "C",
    "WA": "w",
    "WA+ASC": "v",
    "WA-RS": "W",
    "WA-RS+ASC": "V",
    "AST": "R",
    "extrapolate": "E",
    "cached": "K",
    "cached+ASC": "L",
    "full-int8": "f",
    "full-int8+ASC": "c",
    "WA-int8": "a",
    "WA-int8+ASC": "b",
    "WA-RS-int8": "A",
    "WA-RS-int8+ASC": "B",
    "box": "x",
    "box+ASC": "y",
    "box-RS": "X",
    "box-RS+ASC": "Y",
    "box-int8": "m",
    "box-int8+ASC": "n",
    "box-RS-int8": "M",
    "box-RS-int8+ASC": "N",
    "head-wise": "H",
    "head-wise+ASC": "I",
}


def write(plan: "Plan") -> str:
    """A plan as JSON: a legend of its cells, and a line of symbols for each step."""
    legend = _legend(plan.cells)
    symbol = {cell: name for name, cell in legend.items()}
    content = {
        "format": FORMAT,
        "about": dict(plan.about),
        "guided": plan.guided,
        "calls": plan.calls,
        "switch": plan.switch,
        "tokens": asdict(plan.tokens),
        "target": plan.target.as_json(),
        "legend": {name: _CellModel.of(cell).model_dump(exclude_none=True) for name, cell in legend.items()},
        "cells": [" ".join(symbol[cell] for cell in row) for row in plan.cells],
    }
    return json.dumps(content, indent=1, default=str, allow_nan=False) + "\n"


def read(text: bytes) -> dict[str, Any]:
    """The arguments of `Plan` from what `write` gave.

    Raises:
        ValueError: it is no JSON, of another format, or larger than anything real, see `limits`.
    """
    try:
        content = limits.parsed(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version not in READABLE:
        raise ValueError(f"got format {version!r}, wanted {' or '.join(map(str, READABLE))}, which this version reads")
    return _PlanModel.model_validate_json(text, strict=True).fields()


def _legend(cells: Sequence[Sequence[Cell]]) -> dict[str, Cell]:
    """A symbol for every distinct cell, numbered where the papers' name alone does not tell them apart."""
    legend: dict[str, Cell] = {}
    for cell in dict.fromkeys(cell for row in cells for cell in row):
        name, number = SYMBOLS[paper_name(cell)], 1
        while (symbol := name if number == 1 else f"{name}{number}") in legend:
            number += 1
        legend[symbol] = cell
    return legend


class _CellModel(pydantic.BaseModel, extra="forbid"):
    """A cell as the file spells it: `attend` with a method's word, or with one for each head, `reuse`, or `extrapolate`.

    The words: full, cached, arrow:R, arrow:R+residual, where R is the radius in tokens, or a box's in frames, rows and columns,
    such as 1x4xall; with +int8 where that is the precision.
    """

    does: Literal["attend", "reuse", "extrapolate"]
    heads: str | None = None
    share_cfg: bool | None = None
    slope: float | None = None

    @classmethod
    def of(cls, cell: Cell) -> "_CellModel":
        if isinstance(cell, Reuse):
            does, whole = "extrapolate" if extrapolates(cell) else "reuse", cell.extrapolate in (0, 1)
            return cls(does=does, slope=None if whole else cell.extrapolate)
        methods = cell.method if isinstance(cell.method, tuple) else (cell.method,)
        return cls(does="attend", heads=" ".join(map(_word, methods)), share_cfg=cell.share_cfg)

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "_CellModel":
        if (self.does == "attend") != bool(self.heads and self.heads.split()):
            raise ValueError("a site that attends says how its heads do, and only such a site")
        if self.share_cfg and self.does != "attend":
            raise ValueError("what is reused is not computed, so there is nothing to share")
        if self.slope is not None and (self.does != "extrapolate" or not 0 < self.slope < 1):
            raise ValueError("of a line there may be a part of the slope, between 0 and 1; none of anything else")
        self.cell()  # refuses words that mean nothing
        return self

    def cell(self) -> Cell:
        if self.heads is None:
            return Reuse((self.slope or 1.0) if self.does == "extrapolate" else 0.0)
        return Attend(tuple(map(_method, self.heads.split())), bool(self.share_cfg))


def _word(method: Method) -> str:
    if isinstance(method, Cached):
        return "cached"
    word = "full" if isinstance(method, Full) else f"arrow:{method.radius}" + ("+residual" if method.residual else "")
    return word if method.precision == "native" else f"{word}+{method.precision}"


REACH = "([0-9]+|all)"


def _method(word: str) -> Method:
    if word == "cached":
        return Cached()
    found = re.fullmatch(rf"(?:full|arrow:(?:([0-9]+)|{REACH}x{REACH}x{REACH})(\+residual)?)(\+int8)?", word)
    if found is None:
        raise ValueError(
            f"got a head that does {word!r}, wanted cached, full, arrow:R or arrow:R+residual, these with +int8 or without"
        )
    tokens, *box, residual, int8 = found.groups()
    precision: Precision = "int8" if int8 else "native"
    if tokens is None and box[0] is None:
        return Full(precision)
    radius = int(tokens) if tokens else Box(*(None if reach == "all" else int(reach) for reach in box))
    return Arrow(radius, bool(residual), precision)


class _PlanModel(pydantic.BaseModel, extra="forbid"):
    """A plan as the file spells it."""

    format: int
    about: dict[str, Any]
    guided: bool
    calls: Literal[1, 2]
    switch: int | None = None
    tokens: Tokens
    target: Target
    legend: dict[str, _CellModel]
    cells: list[str]

    @pydantic.model_validator(mode="after")
    def _of_real_size(self) -> "_PlanModel":
        limits.require_sizes(len(self.cells), self.tokens, self.target.sites)
        return self

    @pydantic.model_validator(mode="after")
    def _known_symbols(self) -> "_PlanModel":
        if unknown := {symbol for row in self.cells for symbol in row.split()} - set(self.legend):
            raise ValueError(f"cells use {sorted(unknown)}, which the legend does not explain")
        return self

    @pydantic.model_validator(mode="after")
    def _words_for_the_site_s_heads(self) -> "_PlanModel":
        words = {symbol: len((cell.heads or "").split()) for symbol, cell in self.legend.items()}
        for row in self.cells:
            for symbol, site in zip(row.split(), self.target.sites, strict=False):  # lengths are checked by Plan
                if words.get(symbol, 1) not in (0, 1, site.heads):
                    raise ValueError(f"{symbol} has {words[symbol]} heads at {site.path}, wanted one word, or {site.heads}")
        return self

    def fields(self) -> dict[str, Any]:
        """The arguments of `Plan`."""
        legend = {symbol: model.cell() for symbol, model in self.legend.items()}
        cells = tuple(tuple(legend[symbol] for symbol in row.split()) for row in self.cells)
        return {
            "cells": cells,
            "target": self.target,
            "tokens": self.tokens,
            "guided": self.guided,
            "about": self.about,
            "calls": self.calls,
            "switch": self.switch,
        }
