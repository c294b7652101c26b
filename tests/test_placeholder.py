"""What a pipeline computes with the output of a step's first call, which a search knows after the second call."""

import pytest
import torch
from families import wan
from replay import trace
from video_benches import cosmos

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.placeholder import Placeholder
from arrowhead.calibration.run import CalibrationRun
from arrowhead.errors import NotIntercepted
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL


def doubled(x):
    x *= 2
    return x


def written(x):
    whole = torch.zeros(2, *x.shape)
    whole[1] = x
    return whole.sum(0)


COMPUTED = {
    "itself": lambda x: x,
    "a copy": lambda x: x.clone(),
    "preconditioned": lambda x: (0.3 * x.new_ones(x.shape) - 0.7 * x.float()).to(x.dtype),
    "in place": doubled,
    "of a part": lambda x: torch.stack([doubled(part) for part in x.chunk(2)]).flatten(0, 1),
    "a view, changed": lambda x: doubled(x.view(-1)).view(x.shape) + x,
    "written into a tensor": written,
    "by a function": lambda x: torch.where(x > 0, x, torch.zeros_like(x)).softmax(-1),
    "with others": lambda x: torch.cat([x, torch.ones_like(x)]).addmm(torch.ones(8, 2), x[:2]),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_was_computed_follows_the_output(name):
    example, output = torch.randn(4, 3), torch.randn(4, 3)
    placeholder = Placeholder((example, torch.ones(1)))
    with placeholder:
        given = COMPUTED[name](placeholder.output[0])
        other = torch.ones(3) + 1  # nothing of it
    placeholder.fill((output, torch.zeros(1)))
    torch.testing.assert_close(given, COMPUTED[name](output.clone()))
    assert not placeholder.output[1].any()
    assert other.eq(2).all()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x.mean().item(),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda x: torch.zeros(4, 3).add_(x),
        lambda x: torch.mul(x, 2, out=torch.empty(4, 3)),
    ],
    ids=["condition", "number", "list", "comparison", "sum elsewhere", "out"],
)
def test_what_cannot_be_done_again_is_refused(read):
    placeholder = Placeholder(torch.randn(4, 3))
    with placeholder, pytest.raises(NotIntercepted, match="before it makes the second call"):
        read(placeholder.output)


@pytest.mark.parametrize("make", [wan, cosmos])
def test_a_calibration_run_generates_what_the_untouched_pipeline_does(make):
    """Cosmos computes with the first output before it asks for the second."""
    bench = make()
    untouched = trace(bench, bench.inputs())
    run = CalibrationRun(driver_of(bench.pipe, bench.inputs()), find(bench.pipe))
    result = run.run(lambda step: step.finish([FULL] * len(step.sites), {site: [FULL] for site in step.sites}))
    torch.testing.assert_close(result[0], untouched.result)


def test_an_error_between_the_calls_leaves_no_mode():
    bench, calls = cosmos(), []

    def fails_at_the_second(*_):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("between the calls")

    with bench.pipe.transformer.register_forward_pre_hook(fails_at_the_second), pytest.raises(ValueError, match="between"):
        ah.search(bench.pipe, bench.inputs(), threshold=0.5, progress=False)
    assert len(calls) == 2
    assert torch.overrides._get_current_function_mode() is None
