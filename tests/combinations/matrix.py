"""Makes docs/combinations.md from what each test states that it shows; run by `make matrix`."""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from subjects import MECHANISMS

PAGE = Path(__file__).parents[2] / "docs/combinations.md"
WORKS = "works"
HEAD = """# What goes together

Each cell is stated by a test of `tests/combinations`, which fails if it is not true. `make matrix` makes the page from the
tests, and `make test-all` compares it with them. *Works* means: the output agrees with an independent computation, and after
the plan is removed the pipeline gives the same bits as before. *Refused* means: an error that says what to do, before anything
is changed. The columns are the ways in which attention is reached: in a processor that calls torch's function (SD3, DiT,
PixArt, ...), through diffusers' `dispatch_attention_fn` (FLUX, Qwen-Image, Wan, ...), and in a custom model (`ah.Adapter`).
All of it on the CPU, with small random models.
"""


def combines(group: str, what: str, outcomes: Mapping[str, str] | str = WORKS) -> Callable[[Any], Any]:
    """Run a test on each subject, as `mechanism` and `outcome`, and note what it shows.

    `outcomes` are by the subject's name, or one for all: `works`, `refused: why`, or `works: with what limit`.
    """
    by_name = dict.fromkeys(MECHANISMS, outcomes) if isinstance(outcomes, str) else outcomes
    rows = [
        pytest.param(name, outcome, marks=pytest.mark.combination(group, what, MECHANISMS[name], outcome), id=name)
        for name, outcome in by_name.items()
    ]
    return pytest.mark.parametrize(("mechanism", "outcome"), rows)


def states(group: str, what: str, outcome: str = WORKS, mechanism: str = "any") -> Any:
    """The same of a test that needs no subject of each kind, or knows its own."""
    return pytest.mark.combination(group, what, mechanism, outcome)


class Collector:
    """A plugin that keeps what collected tests state."""

    def __init__(self) -> None:
        self.stated: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        self.cases = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("combination"):
                group, what, mechanism, outcome = mark.args
                self.cases += 1
                before = self.stated[group, what].setdefault(mechanism, outcome)
                assert before == outcome, f"{what} of {mechanism}: {before} and {outcome}"


def collected() -> Collector:
    """What all tests here state, without running one."""
    found = Collector()
    code = pytest.main(["--collect-only", "-q", str(Path(__file__).parent)], plugins=[found])
    assert code == pytest.ExitCode.OK, code
    return found


def page(found: Collector) -> str:
    """The document."""
    groups: dict[str, list[str]] = {}
    columns = list(MECHANISMS.values())
    for (group, what), outcomes in found.stated.items():
        same = outcomes.get("any")
        cells = [outcomes.get(column, same or "–") for column in columns]
        groups.setdefault(group, []).append(f"| {what} | {' | '.join(cells)} |")
    tables = (
        f"## {group}\n\n| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}\n" + "\n".join(rows) + "\n"
        for group, rows in sorted(groups.items())
    )
    return f"{HEAD}\n{found.cases} cases.\n\n" + "\n".join(tables)


if __name__ == "__main__":
    PAGE.write_text(page(collected()))
    sys.stdout.write(f"written to {PAGE}\n")
