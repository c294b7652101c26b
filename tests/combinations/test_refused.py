"""Bad input, on each mechanism: an error in words before anything is changed."""

import json
from dataclasses import replace

import pytest
import torch
from matrix import combines
from subjects import STEPS, subject

import arrowhead as ah
from arrowhead.errors import InputsInvalid, KernelUnavailable, PlanInvalid, PlanMismatch


def left_alone(here, refused, error, words):
    """It is refused, and what is generated then is what was generated before."""
    before = here.generate(1)
    with pytest.raises(error, match=words):
        refused()
    assert torch.equal(here.generate(1), before)


@combines("Bad input", "a plan file with a value changed", "refused: what was got, and what is wanted")
def test_a_plan_file_with_a_value_changed(mechanism, outcome, tmp_path):
    here = subject(mechanism)
    content = json.loads(here.plan(seed=1).text())
    content["cells"][0] = content["cells"][0].replace("F", "R", 1)
    content["legend"]["R"] = {"does": "reuse"}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    left_alone(
        here, lambda: here.applied(ah.Plan.load(tmp_path / "plan.json")), PlanInvalid, "reuses an output.*begin with full"
    )


@combines("Bad input", "a plan file cut short", "refused: it is not JSON")
def test_a_plan_file_cut_short(mechanism, outcome, tmp_path):
    here = subject(mechanism)
    text = here.plan(seed=1).text()
    (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    left_alone(here, lambda: ah.Plan.load(tmp_path / "plan.json"), PlanInvalid, "is not JSON.*wanted")


@combines("Bad input", "a plan of another model", "refused: with every difference")
def test_a_plan_of_another_model(mechanism, outcome):
    here = subject(mechanism)
    other = subject({"sd3": "flux", "flux": "own", "own": "sd3"}[mechanism]).plan(seed=1)
    left_alone(here, lambda: here.compressed(other), PlanMismatch, "transformer: plan .*pipeline .*")


AS_MANY = "works: the plan is carried over; with changes='refuse' refused"


@combines(
    "Bad input",
    "a plan for another number of steps",
    {"sd3": AS_MANY, "flux": AS_MANY, "own": "refused: the loop goes on after the plan's last step"},
)
def test_a_plan_for_another_number_of_steps(mechanism, outcome):
    """A pipeline says it before the first step, a custom loop after the plan's last."""
    here = subject(mechanism)
    plan = here.plan(seed=1)
    shorter = replace(plan, cells=plan.cells[: STEPS - 1])

    def refused():
        with here.applied(shorter, changes="refuse"):
            here.generate(0)

    said = "the loop has more steps" if mechanism == "own" else f"plan is for {STEPS - 1} steps.*search again"
    left_alone(here, refused, PlanMismatch, said)


@combines("Bad input", "a kernel that is not there", "refused: with those that are")
def test_a_kernel_that_is_not_there(mechanism, outcome):
    here = subject(mechanism)

    def refused():
        with here.applied(here.plan(seed=1), kernel="fussed"):
            pass

    left_alone(here, refused, KernelUnavailable, "wanted one of auto, chunked")


@combines("Bad input", "a threshold, a budget or an extent that means nothing", "refused: before the model runs")
def test_settings_that_mean_nothing(mechanism, outcome):
    here = subject(mechanism)
    for settings in ({"threshold": float("nan")}, {"budget": 0.5}, {"extent": {"ages": 3}}, {"strategy": "best"}):
        left_alone(here, lambda: here.search(**settings), InputsInvalid, "got .*wanted")  # noqa: B023


@combines("Bad input", "inputs of another kind", "refused: a pipeline takes arguments, a module a callable")
def test_inputs_of_another_kind(mechanism, outcome):
    here = subject(mechanism)
    inputs = {"steps": 3} if mechanism == "own" else lambda: here.generate(0)
    left_alone(
        here, lambda: ah.search(here.pipe, inputs, adapter=here.adapter, progress=False), InputsInvalid, "got inputs.*wanted"
    )
