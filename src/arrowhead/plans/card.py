"""The card of a repository on the Hugging Face Hub that holds a plan or a profile: a README.md with metadata in its head."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from arrowhead.errors import InputsInvalid
from arrowhead.plans.foreign_text import visible

Measured = Mapping[str, Mapping[str, float]]
"""Metrics such as LPIPS, by the names of the plans they were measured with."""
LIBRARY = "arrowhead"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A repository's name on the Hub, as no path of a folder is likely to be."""
LONGEST = 200
"""Characters of a setting that are shown."""
OF_ARROWHEAD = re.compile(rf'^library_name: "?{LIBRARY}"?\s*$', re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """What a card says: a title, what the file is, how it is read, facts by name, and tables, each with a row of heads.

    `about` is the provenance of what is in the file.
    """

    title: str
    what: str
    usage: Sequence[str]
    facts: Mapping[str, object]
    about: Mapping[str, Any]
    tables: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    def text(self, measured: Measured | None = None) -> str:
        """The README.md. Text that others wrote has no markup there.

        Raises:
            InputsInvalid: `measured` is no mapping of names to mappings of numbers.
        """
        model = str(self.about.get("model", ""))
        known = REPOSITORY.fullmatch(model) is not None
        head = {"library_name": LIBRARY, "tags": [LIBRARY, "diffusers"]} | ({"base_model": model} if known else {})
        metadata = [f"{name}: {json.dumps(value)}" for name, value in head.items()]
        facts = {"pipeline": self.about.get("pipeline", "")} | ({"model": model} if known else {}) | {**self.facts}
        tables = {**self.tables} | ({"Measured": _measured(measured)} if measured else {})
        given = {name: self.about.get(name) for name in ("inputs", "seeds", "device", "dtype", "created")}
        settings = {**self._entries("watched"), **self._entries("search"), **given}
        lines = ["---", *metadata, "---", "", f"# {_plain(self.title)}", "", self.what, ""]
        lines += ["```python", "import arrowhead as ah", "", *self.usage, "```", "", *_table([["", ""], *_rows(facts)])]
        for name, rows in tables.items():
            lines += ["", f"## {name}", "", *_table(rows)]
        lines += ["", "## Settings", "", *_table([["setting", "value"], *_rows(settings)])]
        lines += ["", "## Versions", "", *_table([["library", "version"], *_rows(self._entries("versions"))])]
        return "\n".join(lines) + "\n"

    def _entries(self, name: str) -> dict[str, Any]:
        """An entry of the provenance that has entries of its own; one that others wrote may be anything."""
        found = self.about.get(name, {})
        return {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {name: found}


def _measured(measured: Measured) -> list[list[str]]:
    """A table with a row for each plan and a column for each metric."""
    sound = isinstance(measured, Mapping) and all(
        isinstance(row, Mapping) and all(isinstance(value, Real) for value in row.values()) for row in measured.values()
    )
    if not sound:
        raise InputsInvalid(
            f"got measured={measured!r:.{LONGEST}}, wanted metrics by the names of plans, such as {{'half': {{'lpips': 0.01}}}}"
        )
    metrics = list(dict.fromkeys(name for row in measured.values() for name in row))
    rows = [[name, *(f"{row[metric]:.4g}" if metric in row else "" for metric in metrics)] for name, row in measured.items()]
    return [["plan", *metrics], *rows]


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    """Rows of names and values; nothing is said of what is empty."""
    return [[name.replace("_", " "), _short(value)] for name, value in values.items() if value not in (None, "", [], {})]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; the first row has the heads."""
    first, *others = rows
    lines = [f"| {' | '.join(map(_plain, row))} |" for row in (first, *others)]
    return [lines[0], "|" + " --- |" * len(first), *lines[1:]]


def _plain(text: str) -> str:
    """Text without markup: what steers Markdown or HTML is escaped."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>&~$-])", r"\\\1", visible(str(text)))
