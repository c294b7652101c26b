"""What is particular about FLUX.2 and Z-Image: guidance that a pipeline's settings rule out, pictures to go by."""

import pytest
import torch
from families import flux2
from replay import assert_identical, trace
from test_families import INNER, STEPS, plan_of

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.methods import FULL
from arrowhead.models import find


def test_distilled_klein_is_not_guided():
    bench = flux2()
    bench.pipe.register_to_config(is_distilled=True)
    model = find(bench.pipe, INNER)
    untouched = trace(bench, bench.inputs())
    assert len(untouched.outputs) == STEPS
    with ah.applied(bench.pipe, plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guided=False)) as run:
        assert_identical(trace(bench, bench.inputs()), untouched)
        assert run.summary().notes == ()
    assert not ah.search(bench.pipe, bench.inputs(), threshold=0.7, progress=False).guided


def test_a_picture_to_go_by_is_refused():
    bench = flux2()
    model = find(bench.pipe)
    inputs = bench.inputs(image=torch.rand(1, 3, 16, 16))
    with pytest.raises(InputsInvalid, match=r"an image, whose tokens.*wanted.*leave it out"):
        ah.search(bench.pipe, inputs, threshold=0.7, progress=False)
    plan = plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS)
    with ah.applied(bench.pipe, plan), pytest.raises(InputsInvalid, match="an image, whose tokens"):
        bench.pipe(**inputs)
