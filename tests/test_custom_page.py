"""docs/custom.md: its code can be run, and it names every adapter that there is."""

import re
from pathlib import Path

import arrowhead as ah
from arrowhead.models import adapters

PAGE = (Path(__file__).parents[1] / "docs/custom.md").read_text(encoding="utf-8")


def test_the_adapter_by_hand_is_one():
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "Adapter(" in block)
    space = {}
    exec(code, space)
    assert isinstance(space["adapter"], ah.Adapter)


def test_every_name_exists():
    names = {*re.findall(r"\bah\.([a-zA-Z_]+)", PAGE)}
    assert names
    assert all(hasattr(ah, name) for name in names)


def test_every_adapter_is_named_and_makes_one():
    made = [
        name
        for name, each in vars(adapters).items()
        if callable(each) and each.__module__ == adapters.__name__ and name[0] != "_"
    ]
    assert {*re.findall(r"`ah\.adapters\.(\w+)\(\)`", PAGE)} == {*made}
    assert all(isinstance(getattr(adapters, name)(), ah.Adapter) for name in made)
