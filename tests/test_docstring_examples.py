"""The examples in the docstrings of plans run, and give what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

from arrowhead import plans

MODULES = [path.stem for path in sorted(Path(plans.__file__).parent.glob("*.py")) if path.stem != "__init__"]
EXAMPLES = {
    test.name.removeprefix("arrowhead.plans."): test
    for name in MODULES
    for test in doctest.DocTestFinder().find(import_module(f"arrowhead.plans.{name}"))
    if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    assert doctest.DocTestRunner().run(EXAMPLES[name]).failed == 0


def test_the_values_that_readers_meet_first_have_examples():
    assert {"cells", "cells.Attend", "cells.Reuse", "layout.Tokens", "lifetimes", "plan.Plan"} <= {*EXAMPLES}
