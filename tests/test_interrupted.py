"""Ctrl-C at any line of `apply`, `remove` and a search's first step: nothing stays behind that `remove` does not take off."""

import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from own import Own, STDiT2
from pipelines import dit, sd3
from replay import plan as uniform_plan
from test_own import plan_of, sites_of
from untouched import parts

import arrowhead as ah
from arrowhead.errors import ArrowheadError
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL
from arrowhead.plans.layout import Tokens
from arrowhead.plans.plan import Plan

SOURCE = str(Path(ah.__file__).parent)
INSTALLING = tuple(f"{SOURCE}/{part}" for part in ("engine", "calibration", "models/model.py", "upstream.py"))
"""The files whose lines are interrupted: those that change a pipeline, or call what does."""
SAMPLES = 40


@dataclass
class Subject:
    """One way in which a model is wrapped: `search` searches, `generate` gives a picture, in few steps."""

    pipe: Any
    plan: Plan
    adapter: ah.Adapter | None
    generate: Callable[[], torch.Tensor]
    search: Callable[[], object]

    def state(self) -> dict[str, Any]:
        carrier = self.pipe if self.adapter is None else SimpleNamespace(transformer=self.pipe)
        scheduler = getattr(self.pipe, "scheduler", None)
        return parts(carrier) | {
            "step": "step" in vars(scheduler) if scheduler else None,
            "rng": torch.get_rng_state().tolist(),
        }


def pipeline_subject(bench, plan) -> Subject:
    def generate() -> torch.Tensor:
        return torch.as_tensor(bench.pipe(**bench.inputs(steps=2))[0]).clone()

    def search() -> object:
        return ah.search(bench.pipe, bench.inputs(steps=2), threshold=0.5, progress=False)

    return Subject(bench.pipe, plan, None, generate, search)


def processors() -> Subject:
    bench = dit(torch.float32, num_layers=1)
    return pipeline_subject(bench, uniform_plan(bench, ["F", "R"]))


def blocks_of(bench, kinds) -> Plan:
    target = target_of(find(bench.pipe, kinds))
    rows = tuple((cell,) * len(target.sites) for cell in (FULL, AST))
    return Plan(rows, target, Tokens(bench.visual, bench.text), guided=True)


def blocks() -> Subject:
    bench = sd3(torch.float32, num_layers=1)
    return pipeline_subject(bench, blocks_of(bench, {"block"}))


def compiled() -> Subject:
    """A feed-forward that is compiled on its own: its wrapper stands outside of its graph."""
    bench = dit(torch.float32, num_layers=1)
    plan = blocks_of(bench, {"self_attention", "feed_forward"})
    bench.pipe.transformer.transformer_blocks[0].ff.compile(backend="eager")
    return pipeline_subject(bench, plan)


def custom() -> Subject:
    own = Own(STDiT2(layers=1, fused=True), ah.open_sora(guidance_scale=3.0), steps=2, images=1)
    kinds = {"self_attention", "feed_forward"}
    sites = sites_of(own, kinds)
    plan = plan_of(own, [[FULL] * len(sites), [AST] * len(sites)], kinds)

    def search() -> object:
        return ah.search(own.model, own.sample, adapter=own.adapter, threshold=0.5, progress=False)

    return Subject(own.model, plan, own.adapter, own.sample, search)


SUBJECTS = {"processors": processors, "blocks": blocks, "compiled": compiled, "custom model": custom}


@contextmanager
def interrupted_at(line: int | None):
    """Raise KeyboardInterrupt at the line with this number of those that run; None: at none. Gives the lines that ran."""
    lines: list[tuple[str, int]] = []

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(INSTALLING):
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def lines_of(work: Callable[[], object], every: bool) -> list[int]:
    """The numbers of the lines that are interrupted: each line of code when it runs first and last, or some of these."""
    with interrupted_at(None) as lines:
        work()
    first = {line: number for number, line in reversed([*enumerate(lines)])}
    last = {line: number for number, line in enumerate(lines)}
    numbers = sorted({*first.values(), *last.values()})
    return numbers[:: 1 if every else len(numbers) // SAMPLES + 1]


def put_right(here: Subject) -> None:
    """As who was interrupted would: `remove`, unless there is no plan."""
    with suppress(ArrowheadError):
        ah.remove(here.pipe)


@pytest.mark.filterwarnings("error::arrowhead.errors.ArrowheadWarning")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some lines", "all lines"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_ctrl_c_in_apply_and_remove(name, every):
    here = SUBJECTS[name]()
    untouched = here.generate()
    before = here.state()

    def apply() -> None:
        ah.apply(here.pipe, here.plan, here.adapter)

    apply()
    wanted = here.generate()
    ah.remove(here.pipe)
    assert here.state() == before
    assert not torch.equal(wanted, untouched)
    for work, other in ((apply, lambda: ah.remove(here.pipe)), (lambda: ah.remove(here.pipe), apply)):
        if work is not apply:
            apply()
        lines = lines_of(work, every)
        if work is apply:
            other()
        for line in lines:
            if work is not apply:
                apply()
            with pytest.raises(KeyboardInterrupt), interrupted_at(line):
                work()
            put_right(here)
            assert here.state() == before, line
            apply()
            assert line % 8 or torch.equal(here.generate(), wanted), line
            ah.remove(here.pipe)
            assert here.state() == before, line
    assert torch.equal(here.generate(), untouched)


@pytest.mark.filterwarnings("error::arrowhead.errors.ArrowheadWarning")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some lines", "all lines"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_ctrl_c_in_a_search(name, every):
    """At any line that a search of two steps runs there: before, between and after its steps."""
    here = SUBJECTS[name]()
    untouched = here.generate()
    before = here.state()
    ah.apply(here.pipe, here.plan, here.adapter)
    wanted = here.generate()
    ah.remove(here.pipe)
    here.search()  # what is prepared once is prepared then
    for line in lines_of(here.search, every):
        with pytest.raises(KeyboardInterrupt), interrupted_at(line):
            here.search()
        assert here.state() == before, line
        if line % 16 == 0:
            ah.apply(here.pipe, here.plan, here.adapter)
            assert torch.equal(here.generate(), wanted), line
            ah.remove(here.pipe)
    assert here.state() == before
    assert torch.equal(here.generate(), untouched)
