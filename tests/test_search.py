"""The greedy search against Algorithm 1 done by hand; and that a search leaves the pipeline and the world as they were."""

import math
import socket

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from greedy import search as by_hand
from pipelines import dit, dit_transformer, pixart_sigma, tiny
from replay import NAMES, Trace, assert_identical, assert_same, cell, compressed, plan
from untouched import left_as_it_was, parts, tensors_like

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.errors import InputsInvalid, NothingCompressed, NotIntercepted
from arrowhead.plans.cells import Reuse
from arrowhead.searches.api import THRESHOLDS
from arrowhead.searches.greedy import greedy_search

DELTAS = {"paper": [0.3, 0.5, 0.8], "signed": [0.3, 0.8, 1.5]}


def all_of(pipe, inputs, **settings):
    """Every trial of a greedy search, and what it found."""
    trials = []
    found = greedy_search(driver_of(pipe, inputs), on_trial=trials.append, **settings)
    return trials, found


def as_cells(bench, grid):
    radius = bench.visual // 8
    return tuple(tuple(cell(letter, radius, radius) for letter in row) for row in grid)


@pytest.mark.parametrize(("form", "delta"), [(form, delta) for form, deltas in DELTAS.items() for delta in deltas])
def test_greedy_is_algorithm_1(bench, form, delta):
    inputs = {"seed": 6, "images": 2, "steps": 4}
    wanted = by_hand(bench, bench.inputs(**inputs), delta, form)
    trials, found = all_of(bench.pipe, bench.inputs(**inputs), threshold=delta, loss=form)
    assert found.cells == as_cells(bench, wanted.grid)
    assert (found.branches.guided, found.tokens.total, found.passes) == (True, bench.visual, wanted.passes)
    assert [trial.site for trial in trials] == [f"transformer_blocks.{layer}.attn1" for _, layer, _, _ in wanted.trials]
    assert [trial.step for trial in trials] == [step for step, _, _, _ in wanted.trials]
    assert {trial.steps for trial in trials} == {4}
    assert [trial.cell for trial in trials] == list(as_cells(bench, [[letter for _, _, letter, _ in wanted.trials]])[0])
    np.testing.assert_allclose([t.error for t in trials], [error for *_, error in wanted.trials], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose([t.bound for t in trials], [(n + 1) / 3 * delta for _, n, _, _ in wanted.trials], rtol=1e-12)
    assert [t.accepted for t in trials] == [error < (n + 1) / 3 * delta for _, n, _, error in wanted.trials]


def test_the_thresholds_above_try_the_choices(bench):
    """Each technique is taken somewhere, and full attention kept somewhere, so that the comparison says something."""
    found = {
        letter for delta in DELTAS["paper"] for row in by_hand(bench, bench.inputs(6, 2, steps=4), delta).grid for letter in row
    }
    assert {"F", "R"} < found
    assert found & set("VWC")


@pytest.mark.parametrize("delta", [0.3, 0.8])
def test_without_guidance_nothing_is_shared(bench, delta):
    inputs = {"images": 2, "steps": 4, "guidance": 1.0}
    wanted = by_hand(bench, bench.inputs(**inputs), delta)
    trials, found = all_of(bench.pipe, bench.inputs(**inputs), threshold=delta)
    assert found.cells == as_cells(bench, wanted.grid)
    assert not found.branches.guided
    assert not any(getattr(trial.cell, "share_cfg", False) for trial in trials)
    np.testing.assert_allclose([t.error for t in trials], [error for *_, error in wanted.trials], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("delta", [0.3, 0.5, 0.8])
def test_the_plan_repeats_the_trajectory_of_its_search(bench, delta):
    inputs = {"seed": 6, "images": 2, "steps": 4}
    wanted = by_hand(bench, bench.inputs(**inputs), delta)
    the_plan = ah.search(bench.pipe, bench.inputs(**inputs), threshold=delta, progress=False)
    assert the_plan.cells == as_cells(bench, wanted.grid)
    assert_same(compressed(bench, the_plan, bench.inputs(**inputs)), Trace(wanted.result, wanted.outputs))


@pytest.mark.parametrize(("name", "delta"), [(f"D{i}", i * 0.025) for i in range(1, 7)])
def test_named_thresholds(name, delta):
    """The names are the papers' numbers, and lead to the same plan."""
    assert THRESHOLDS[name] == pytest.approx(delta, rel=1e-12)
    bench = dit()
    for attn in bench.attentions:
        attn.to_out[0].weight.data *= 0.01  # so that small errors are within reach
    named = ah.search(bench.pipe, bench.inputs(steps=3), threshold=name, progress=False)
    assert named.cells == as_cells(bench, by_hand(bench, bench.inputs(steps=3), delta).grid)
    assert named.about["search"]["threshold"] == pytest.approx(delta, rel=1e-12)


def test_a_threshold_of_nothing_compresses_nothing_and_says_nothing(either):
    the_plan = ah.search(either.pipe, either.inputs(), threshold=0, progress=False)
    assert the_plan.cells == as_cells(either, ["FFF"] * 5)
    assert the_plan.about["search"]["transformer_passes"] == 5


def test_a_threshold_too_small_is_said():
    bench = dit()
    with pytest.warns(NothingCompressed, match="within threshold"):
        the_plan = ah.search(bench.pipe, bench.inputs(), threshold=1e-9, progress=False)
    assert the_plan.cells == as_cells(bench, ["FFF"] * 5)


def test_a_huge_threshold_reuses_everything(either):
    the_plan = ah.search(either.pipe, either.inputs(), threshold=1e6, progress=False)
    assert the_plan.cells == as_cells(either, ["FFF", "RRR", "RRR", "RRR", "RRR"])
    assert all(one == Reuse() for row in the_plan.cells[1:] for one in row)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, -math.inf, "D7", "0,1", "", [], True])
def test_thresholds_that_are_none(threshold):
    bench = dit()
    with left_as_it_was(bench), pytest.raises(InputsInvalid, match=r"threshold=.*wanted a number of 0 or more, or one of D1"):
        ah.search(bench.pipe, bench.inputs(), threshold=threshold, progress=False)


@pytest.mark.parametrize("settings", [{"strategy": "beam"}, {"loss": "mse"}, {"loss": ""}])
def test_settings_that_are_none(settings):
    bench = dit()
    (name, value), *_ = settings.items()
    with left_as_it_was(bench), pytest.raises(InputsInvalid, match=f"got {name}='{value}', wanted"):
        ah.search(bench.pipe, bench.inputs(), progress=False, **settings)


def test_inputs_that_the_pipeline_does_not_take():
    bench = dit()
    with left_as_it_was(bench):
        with pytest.raises(InputsInvalid, match="prompt"):
            ah.search(bench.pipe, bench.inputs() | {"prompt": "a cat"}, progress=False)
        with pytest.raises(InputsInvalid, match="class_labels"):
            ah.search(bench.pipe, {"num_inference_steps": 3}, progress=False)
    bench = tiny()
    with left_as_it_was(bench), pytest.raises(ValueError, match="class_labels"):
        ah.search(bench.pipe, bench.inputs() | {"class_labels": [10**6]}, progress=False)  # the pipeline's own complaint


def test_a_pipeline_that_runs_no_step():
    bench = tiny()
    bench.pipe.scheduler.set_timesteps = lambda *_args, **_kwargs: setattr(bench.pipe.scheduler, "timesteps", torch.empty(0))
    before = parts(bench.pipe)
    with pytest.raises(NotIntercepted, match="never called its transformer"):
        ah.search(bench.pipe, bench.inputs(), progress=False)
    assert parts(bench.pipe) == before


def test_a_search_leaves_everything_as_it_was(bench):
    generator = torch.Generator().manual_seed(12)
    torch.rand(3, generator=generator)
    states = generator.get_state(), torch.get_rng_state()
    with left_as_it_was(bench):
        ah.search(bench.pipe, bench.inputs(generator=generator, steps=3), threshold=0.5, progress=False)
        assert torch.equal(generator.get_state(), states[0])
        assert torch.equal(torch.get_rng_state(), states[1])
        ah.search(bench.pipe, bench.inputs(generator=None, steps=3), threshold=0.5, progress=False)
        assert torch.equal(torch.get_rng_state(), states[1])
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        before = [g.get_state() for g in generators]
        ah.search(bench.pipe, bench.inputs(images=2, generator=generators, steps=3), threshold=0.5, progress=False)
        assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


@pytest.mark.parametrize("configured", [None, {"disable": False, "desc": "mine"}])
def test_the_progress_bar_of_the_pipeline_is_as_it_was(configured, capsys):
    bench = tiny()
    del bench.pipe._progress_bar_config
    if configured is not None:
        bench.pipe.set_progress_bar_config(**configured)
    before = parts(bench.pipe)
    ah.search(bench.pipe, bench.inputs(steps=3), threshold=0.5, progress=False)
    assert parts(bench.pipe) == before
    assert capsys.readouterr() == ("", "")
    ah.search(bench.pipe, bench.inputs(steps=3), threshold=0.5)
    assert "search" in capsys.readouterr().err


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_modes_between_trials_are_the_callers(either, enabled, inference):
    def modes(*_):
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    seen = set()
    with torch.inference_mode(inference), torch.set_grad_enabled(enabled):
        driver = driver_of(either.pipe, either.inputs(steps=3))
        greedy_search(driver, threshold=0.5, on_trial=lambda _: seen.add(modes()))
        assert seen == {(enabled, inference)} == {modes()}


def test_a_grad_mode_that_is_changed_between_trials_is_the_callers_again(either):
    def change(_):
        torch.set_grad_enabled(not torch.is_grad_enabled())

    with left_as_it_was(either):
        greedy_search(driver_of(either.pipe, either.inputs(steps=3)), threshold=0.5, on_trial=change)
        assert torch.is_grad_enabled()


class Closed(Exception):
    """Ends a search in the middle."""


@pytest.mark.parametrize("trials", [1, 4, 9])
def test_a_search_that_is_closed_midway(bench, trials):
    generator, seen = torch.Generator().manual_seed(2), []
    states = generator.get_state(), torch.get_rng_state()

    def close(trial):
        seen.append(trial)
        if len(seen) == trials:
            raise Closed

    with left_as_it_was(bench):
        driver = driver_of(bench.pipe, bench.inputs(generator=generator))
        with pytest.raises(Closed):
            greedy_search(driver, threshold=1e-6, on_trial=close)
        assert torch.is_grad_enabled()
        assert torch.equal(generator.get_state(), states[0])
        assert torch.equal(torch.get_rng_state(), states[1])
        assert greedy_search(driver, threshold=1e-6).passes > trials  # the driver serves again


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("place", ["transformer_blocks.1.attn1.to_q", "transformer_blocks.2.ff"])
@pytest.mark.parametrize("passes", [0, 1, 4, 12])
def test_a_search_that_is_interrupted(either, error, place, passes):
    """In the midst of the transformer, in the first step or while candidates are tried."""
    states, count = torch.get_rng_state(), []

    def interrupt(*_):
        count.append(1)
        if len(count) == passes + 1:
            raise error

    with left_as_it_was(either):
        hook = either.pipe.transformer.get_submodule(place).register_forward_hook(interrupt)
        with pytest.raises(error):
            ah.search(either.pipe, either.inputs(), threshold=1e-6, progress=False)
        hook.remove()
        assert torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), states)


def test_an_error_of_the_pipeline_itself_passes_through(either, monkeypatch):
    """Raised by the sampler, between two calls of the transformer."""
    step, count = either.pipe.scheduler.step, []

    def fail(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise ZeroDivisionError
        return step(*args, **kwargs)

    with left_as_it_was(either):
        monkeypatch.setattr(either.pipe.scheduler, "step", fail)
        with pytest.raises(ZeroDivisionError):
            ah.search(either.pipe, either.inputs(), threshold=0.5, progress=False)
        monkeypatch.undo()
        assert torch.is_grad_enabled()


def test_passes_are_counted(either):
    count = []
    hook = either.pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: count.append(1))
    the_plan = ah.search(either.pipe, either.inputs(), threshold=0.5, progress=False)
    hook.remove()
    assert the_plan.about["search"]["transformer_passes"] == len(count)
    assert len(count) > 5 + 4 * 3  # a run, and at each later step a reference and at least one trial per layer


class SkippingTransformer(DiTTransformer2DModel):
    """Its block number 1 never runs."""

    def forward(self, hidden_states, timestep=None, class_labels=None, return_dict=True):
        blocks, self.transformer_blocks = self.transformer_blocks, torch.nn.ModuleList([*self.transformer_blocks][::2])
        try:
            return super().forward(hidden_states, timestep, class_labels, return_dict=return_dict)
        finally:
            self.transformer_blocks = blocks


def test_a_site_that_is_never_reached():
    bench = dit()
    model = dit_transformer(cls=SkippingTransformer, out_channels=4).double()
    bench.pipe.register_modules(transformer=model)
    with left_as_it_was(bench), pytest.raises(NotIntercepted, match="passed 4 sites, wanted 6"):
        ah.search(bench.pipe, bench.inputs(), strategy="budget", progress=False)


def test_a_search_keeps_no_tensors():
    bench = pixart_sigma()
    shapes = (16, 24), (4, 16, 6)
    before = tensors_like(*shapes)
    the_plan = ah.search(bench.pipe, bench.inputs(), threshold=0.5, progress=False)
    assert any(one != Reuse() for row in the_plan.cells[1:] for one in row)
    assert tensors_like(*shapes).keys() == before.keys()


def test_a_plan_says_how_it_was_found(bench):
    inputs = bench.inputs(seed=77, steps=3)
    the_plan = ah.search(bench.pipe, inputs, threshold=1.5, loss="signed", progress=False)
    about = the_plan.about
    assert about["pipeline"] == type(bench.pipe).__name__
    assert about["search"].items() >= {"strategy": "greedy", "threshold": 1.5, "loss": "signed"}.items()
    assert about["seeds"] == [77]
    assert about["inputs"]["num_inference_steps"] == 3
    assert about["inputs"]["guidance_scale"] == 3.0
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert about["versions"]["diffusers"] == diffusers.__version__
    assert about["versions"]["arrowhead"] == ah.__version__
    assert (the_plan.tokens.visual, the_plan.tokens.text, the_plan.guided) == (bench.visual, 0, True)
    assert the_plan.target.scheduler == "DPMSolverMultistepScheduler"


def test_a_saved_plan_does_the_same(either, tmp_path):
    the_plan = ah.search(either.pipe, either.inputs(), threshold=0.6, progress=False)
    the_plan.save(tmp_path / "plan.json")
    again = ah.Plan.load(tmp_path / "plan.json")
    assert_identical(compressed(either, again, either.inputs()), compressed(either, the_plan, either.inputs()))


def test_plans_by_hand_and_by_search_are_alike(either):
    """A plan spelt out letter by letter is the plan that a search finds."""
    wanted = by_hand(either, either.inputs(), 0.5).grid
    found = ah.search(either.pipe, either.inputs(), threshold=0.5, progress=False)
    spelt = plan(either, wanted, near=either.visual // 8)
    assert found == spelt
    assert found.count() == {NAMES[letter]: "".join(wanted).count(letter) for letter in set("".join(wanted))}


def test_the_bundled_pipeline_loads_offline(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    pipe = ah.tiny.load("dit")
    images = [
        pipe([3, 5], generator=torch.Generator().manual_seed(seed), num_inference_steps=3, output_type="np").images
        for seed in (0, 0, 1)
    ]
    assert images[0].shape == (2, 32, 32, 3)
    assert np.array_equal(images[0], images[1])
    assert not np.allclose(images[0], images[2], atol=0.05)
    assert not np.allclose(images[0][0], images[0][1], atol=0.05)
    assert images[0].min() >= 0
    assert images[0].max() <= 1
    assert ah.tiny.load("dit", dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["DiT", "flux", ""])
def test_a_bundled_pipeline_that_is_none(name):
    with pytest.raises(InputsInvalid, match=f"got '{name}', wanted the name of a bundled pipeline: 'dit', 'mmdit'"):
        ah.tiny.load(name)
