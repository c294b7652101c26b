"""The subjects themselves: plans at random run on each, and leave it as it was."""

import torch
from matrix import combines
from subjects import subject


@combines("Alone", "a plan, put on and taken off")
def test_a_plan_runs_and_leaves_nothing(mechanism, outcome):
    here = subject(mechanism)
    untouched = here.generate(1)
    found = here.compressed(here.plan(seed=3), 1)
    assert not torch.equal(found, untouched)
    assert torch.equal(here.generate(1), untouched)
