"""What outcomes are compared with: a plan replayed on a subject by hand, and all that has to be left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from family_replay import replaying
from own import Own
from own import replaying as own_replaying
from subjects import Subject, TwoCalls
from untouched import parts

from arrowhead.models.find import find
from arrowhead.plans.plan import Plan


def loop_of(here: Subject, cls: type = Own, **settings: Any) -> Any:
    """The loop over a custom model, or another loop over it."""
    return cls(here.pipe, here.adapter, **settings)


@contextmanager
def by_hand(here: Subject, plan: Plan, cells: Any = None) -> Iterator[None]:
    """Within the block the subject computes what the plan says, or other cells, with nothing of arrowhead's engine."""
    cells = plan.cells if cells is None else cells
    if here.adapter is not None:
        columns = tuple(zip(*cells, strict=True))
        with own_replaying(loop_of(here), list(plan.target.sites), columns):
            yield
        return
    tokens = plan.tokens
    bench: Any = SimpleNamespace(
        pipe=here.pipe,
        two_calls=isinstance(here, TwoCalls),
        conditional_first=False,  # in a batch
        tokens=tokens,
        visual=tokens.visual,
        frames=1,
        grid=None,
        switch=None,
    )
    with replaying(bench, dict(find(here.pipe).modules), cells, plan.guided):
        yield


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """But for rounding."""
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@contextmanager
def as_it_was(here: Subject) -> Iterator[None]:
    """After the block the subject has the same parts, and generates the same to the last bit."""
    wanted = here.generate(1)  # first: some pipelines set attributes of their own when called
    carrier = here.pipe if here.adapter is None else SimpleNamespace(transformer=here.transformer)
    before = parts(carrier)
    yield
    assert parts(carrier) == before
    assert torch.equal(here.generate(1), wanted)


def after(step, do):
    """A callback of a pipeline that does something at the end of a step, and may give tensors back."""
    return lambda pipe, i, t, given: (do(pipe, given) if i == step else None) or {}
