"""Writes a plan as JSON that a person can read, and reads it back.

A *legend* gives each distinct cell a symbol, and each step has one line of symbols, one for each site:

    "legend": {
     "F": {"does": "attend", "heads": "full", "share_cfg": false},
     "W": {"does": "attend", "heads": "arrow:128+residual", "share_cfg": false},
     "R": {"does": "reuse"}
    },
    "cells": [
     "F F F",
     "W R W"
    ]
"""

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

if TYPE_CHECKING:  # plan.py imports this file
    from arrowhead.plans.plan import Plan

FORMAT = 6
READABLE = (2, 3, 4, 5, FORMAT)
"""Format 5 has no stacks, and one slope for both branches; format 4 no noise levels; format 3 no slopes, grids or second
transformer; format 2 no precisions either."""
SYMBOLS = {  # by the papers' names
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
    """The JSON text of a plan."""
    legend = _legend(plan.cells)
    symbols = {cell: symbol for symbol, cell in legend.items()}
    content = {
        "format": FORMAT,
        "about": dict(plan.about),
        "guided": plan.guided,
        "calls": plan.calls,
        "switch": plan.switch,
        "tokens": asdict(plan.tokens),
        "target": plan.target.as_json(),
        "legend": {symbol: _CellModel.of(cell).model_dump(exclude_none=True) for symbol, cell in legend.items()},
        "cells": [" ".join(symbols[cell] for cell in row) for row in plan.cells],
    }
    return json.dumps(content, indent=1, default=str, allow_nan=False) + "\n"


def read(text: bytes) -> dict[str, Any]:
    """The arguments of `Plan`, from a text that `write` gave, in this version or an earlier one.

    Raises:
        ValueError: the text is not JSON, of an unknown format, no plan, or larger than anything real (see `limits.py`).
    """
    try:
        content = limits.parse_json(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version not in READABLE:
        raise ValueError(f"got format {version!r}, wanted {' or '.join(map(str, READABLE))}, which this version reads")
    return _PlanModel.model_validate_json(text, strict=True).fields()


def _legend(cells: Sequence[Sequence[Cell]]) -> dict[str, Cell]:
    """A symbol for each distinct cell. Cells with the same name in the papers are numbered: W, W2, W3."""
    legend: dict[str, Cell] = {}
    for cell in dict.fromkeys(cell for row in cells for cell in row):
        name, number = SYMBOLS[paper_name(cell)], 1
        while (symbol := name if number == 1 else f"{name}{number}") in legend:
            number += 1
        legend[symbol] = cell
    return legend


class _CellModel(pydantic.BaseModel, extra="forbid"):
    """A cell as files spell it.

    `does` is "attend", "reuse" or "extrapolate". A cell that attends has in `heads` one word for all heads, or one for each:
    full, cached, arrow:R or arrow:R+residual, where R is the radius in tokens, or a box such as 1x4xall (frames, rows,
    columns); full and arrow with +int8 in that precision. A cell that extrapolates has in `slope` the part of the change per
    step that it takes, unless that is 1; one that does not compute has in `scale` what the output is multiplied by, unless that
    is 1. Either is a number, or a list of two: for the conditional and for the unconditional branch.
    """

    does: Literal["attend", "reuse", "extrapolate"]
    heads: str | None = None
    share_cfg: bool | None = None
    slope: float | tuple[float, float] | None = None
    scale: float | tuple[float, float] | None = None

    @classmethod
    def of(cls, cell: Cell) -> "_CellModel":
        """The spelling of a cell."""
        if isinstance(cell, Reuse):
            slope, scale = None if cell.extrapolate in (0, 1) else cell.extrapolate, None if cell.scale == 1 else cell.scale
            return cls(does="extrapolate" if extrapolates(cell) else "reuse", slope=slope, scale=scale)
        methods = cell.method if isinstance(cell.method, tuple) else (cell.method,)
        return cls(does="attend", heads=" ".join(map(_word, methods)), share_cfg=cell.share_cfg)

    @pydantic.model_validator(mode="after")
    def _is_sound(self) -> "_CellModel":
        if (self.does == "attend") != bool(self.heads and self.heads.split()):
            raise ValueError("got heads for a cell that reuses, or none for one that attends; wanted them where it attends")
        if self.share_cfg and self.does != "attend":
            raise ValueError("got share_cfg=true for a cell that reuses; wanted it only where a cell attends")
        if self.slope is not None and (self.does != "extrapolate" or self.slope in (0, 1)):
            raise ValueError(f"got slope={self.slope}, wanted one that is neither 0 nor 1, and only where a cell extrapolates")
        if self.scale is not None and (self.does == "attend" or self.scale == 1):
            raise ValueError(f"got scale={self.scale}, wanted another than 1, and only where a cell does not compute")
        self.cell()  # refuses unknown words
        return self

    def cell(self) -> Cell:
        """The cell that is spelt."""
        if self.heads is None:
            slope = 1.0 if self.slope is None else self.slope
            return Reuse(slope if self.does == "extrapolate" else 0.0, 1.0 if self.scale is None else self.scale)
        return Attend(tuple(map(_method, self.heads.split())), bool(self.share_cfg))


def _word(method: Method) -> str:
    """The word for a method."""
    if isinstance(method, Cached):
        return "cached"
    word = "full" if isinstance(method, Full) else f"arrow:{method.radius}" + ("+residual" if method.residual else "")
    return word if method.precision == "native" else f"{word}+{method.precision}"


_REACH = "([0-9]+|all)"
_METHOD = re.compile(rf"(?:full|arrow:(?:([0-9]+)|{_REACH}x{_REACH}x{_REACH})(\+residual)?)(\+int8)?")


def _method(word: str) -> Method:
    """The method that a word stands for."""
    if word == "cached":
        return Cached()
    if (found := _METHOD.fullmatch(word)) is None:
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
    """A plan as files spell it."""

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
    def _a_word_for_each_head(self) -> "_PlanModel":
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
