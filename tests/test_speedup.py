"""Profiles, schedules and `speedup`: compared with brute force, with the model itself, and with replays."""

import copy
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import final_latents, flux
from families import MORE
from pipelines import BENCHES, JOINT
from replay import assert_identical, distance, trace
from safetensors import safe_open
from safetensors.torch import save_file
from test_stack import blocks_of, replayed
from torch.utils.flop_counter import FlopCounterMode
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import AlreadyApplied, InputsInvalid, NothingLearnt, PlanAdapted, ProfileNotKept, UnsupportedPipeline
from arrowhead.models.find import find
from arrowhead.plans.cells import FULL
from arrowhead.plans.layout import Tokens
from arrowhead.plans.resample import Conditions, scaled_switch
from arrowhead.searches.budget import validation
from arrowhead.searches.stack import api as stack_api
from arrowhead.searches.stack import profile_file
from arrowhead.searches.stack import watch as watching
from arrowhead.searches.stack.interpolated import parts_of, positions_of
from arrowhead.searches.stack.schedule import schedules

STEPS = 8


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ARROWHEAD_CACHE", str(tmp_path / "cache"))


WATCHED = {**BENCHES, **JOINT, "flux": flux, **MORE}
some = pytest.mark.parametrize("name", ["dit_learned_sigma", "pixart_sigma", "sd3", "flux", "qwen", "wan", "z_image"])


def profile_of(bench, **inputs):
    return ah.profile(bench.pipe, bench.inputs(steps=STEPS, **inputs), progress=False)


@some
@pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "unguided"])
def test_watching_leaves_the_pipeline_as_it_was(name, guidance):
    bench = WATCHED[name](torch.float32)
    with left_as_it_was(bench, guidance=guidance):
        profile = profile_of(bench, guidance=guidance)
    assert profile.steps == STEPS
    assert profile.branches.guided == (guidance > 1)


@some
def test_changes_are_those_of_the_guided_output(name, monkeypatch):
    """By the model itself: blocks run, what the stack adds is nudged by 1e-4 on the way to what an earlier step added."""
    bench = WATCHED[name]()
    monkeypatch.setattr(watching, "EVERY", 1)
    profile = profile_of(bench, seed=3)
    model = find(bench.pipe, {"stack"})
    two, scale = model.branch_order == "two_calls", 3.0 + (model.family.name == "Z-Image")
    wanted = brute_changes(bench, model, two, scale)
    for step, age in [(1, 1), (4, 0), (4, 3), (7, 2), (7, 7)]:
        found, exact = float(profile.changes[step, age].sum(0).norm()), wanted[step, age]
        assert found == pytest.approx(exact, rel=0.25), (step, age)


@pytest.mark.parametrize("name", ["sd3", "wan22"])
def test_steps_between_those_that_are_measured(name, monkeypatch):
    """Their changes are those that the last layers of the next measured step make of what these steps gave."""
    bench, found = WATCHED[name](), []
    for every in (1, 3):
        monkeypatch.setattr(watching, "EVERY", every)
        found.append(profile_of(bench, seed=3))
    whole, part = found
    assert torch.allclose(whole.products, part.products)
    ends, begin = [2, 5, 7] if part.switch is None else [*range(2, part.switch - 1, 3), part.switch - 1, STEPS - 1], 0
    for end in sorted({*ends, *range((part.switch or 0) + 2, STEPS, 3)}):
        for step in range(begin, end + 1):
            back = whole.changes[end, end - step] if step < end else 0.0
            assert torch.allclose(part.changes[step, 0], whole.changes[end, 0] + back, atol=1e-4)
            for age in range(1, step - (part.switch or 0) * (step >= (part.switch or 0)) + 1):
                assert torch.allclose(part.changes[step, age], whole.changes[end, end - step + age] - back, atol=1e-4)
        begin = end + 1
    assert begin == STEPS


def brute_changes(bench, model, two, scale):
    """The norm of the change of the guided output over the size of the nudge, for each step and age."""
    blocks = blocks_of(model.transformer, model)
    own, state = model.transformer.forward, {"put": None}
    kept, found, pending = [[], []], {}, []

    def first(_, args, kwargs):
        state["began"] = (args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))).clone()

    def last(_, args, out):
        image = out[1] if isinstance(out, tuple) else out
        rows = image.shape[1] - state["began"].shape[1]
        if state["put"] is None:
            state["added"] = image[:, rows:] - state["began"]
            return None
        new = torch.cat([image[:, :rows], state["began"] + state["put"]], 1)
        return (out[0], new) if isinstance(out, tuple) else new

    def sample(out):
        value = out[0] if isinstance(out, tuple) else out.sample
        value = torch.stack(value) if isinstance(value, list) else value
        return value[:, : model.latent_channels]

    def parts(value, call):
        if two:
            return (scale if call == 0 else 1 - scale) * value
        a, b = value.chunk(2)
        conditional, other = (a, b) if model.branch_order == "cond_first" else (b, a)
        return scale * conditional + (1 - scale) * other

    def forward(*args, **kwargs):
        call = len(pending) if two else 0
        state["put"] = None
        out = own(*args, **kwargs)
        now, base = state["added"], parts(sample(out), call)
        changes = {}
        for age in range(len(kept[call]) + 1):
            towards = now if age == 0 else kept[call][-age] - now
            state["put"] = now + 1e-4 * towards
            changes[age] = (parts(sample(own(*args, **kwargs)), call) - base) / 1e-4
        kept[call].append(now)
        pending.append(changes)
        if not two or len(pending) == 2:
            for age in changes:
                found[len(kept[call]) - 1, age] = float(sum(each[age] for each in pending).norm())
            pending.clear()
        state["put"] = None
        return out

    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True), blocks[-1].register_forward_hook(last)]
    model.transformer.forward = forward
    try:
        bench.pipe(**bench.inputs(steps=STEPS, seed=3))
    finally:
        del model.transformer.forward
        for handle in handles:
            handle.remove()
    return found


def brute_schedule(changes, outputs, computed):
    """The error of a schedule by its definition: least squares on the stack's outputs by numpy, sums by loops."""
    steps, ages = changes.shape[0], changes.shape[1] - 1
    error, run = 0.0, 0.0
    for t in range(steps):
        if t in computed:
            error, run = error + float(np.sum(np.square(run))), 0.0
            continue
        done = [s for s in computed if s < t]
        j, i = done[-1], done[-2] if len(done) > 1 else None
        if t - (j if i is None else i) > ages:
            return np.inf
        total = 0.0
        for b in range(changes.shape[2]):
            now, later = changes[t, 0, b], changes[t, t - j, b]
            if i is None:
                total = total + later
                continue
            of_t, of_j, of_i = (outputs[s, b] for s in (t, j, i))
            columns = np.stack([of_j, (t - j) / (j - i) * (of_j - of_i)], 1)
            drawn = np.sqrt(np.array([1e-3, 0.05]) * np.square(columns).sum(0))
            rows, right = np.concatenate([columns, np.diag(drawn)]), np.concatenate([of_t, drawn * [1, 0.75]])
            scale, slope = np.linalg.lstsq(rows, right, rcond=None)[0]
            ahead = (t - j) / (j - i) * (later - changes[t, t - i, b])
            total = total + np.clip(scale, 0.5, 1.5) * (later + now) + np.clip(slope, -1, 2) * ahead - now
        run = run + total
    return error + float(np.sum(np.square(run)))


@pytest.mark.parametrize("seed", range(4))
def test_schedules_are_the_best_of_all(seed):
    profile, outputs = random_profile(seed)
    found = schedules(profile, 0.5)
    gains = np.array(profile.sampler_gains) * np.array(profile.model_feedback) ** 0.5
    changes = profile.changes.double().numpy() * gains[:, None, None, None]
    for count in range(1, profile.steps + 1):
        every = [
            brute_schedule(changes, outputs, (0, *rest)) for rest in itertools.combinations(range(1, profile.steps), count - 1)
        ]
        least = min(every)
        if np.isinf(least):
            assert count not in found
            continue
        assert found[count].error == pytest.approx(least, rel=1e-3)
        assert found[count].computed == count
        computed = tuple(t for t, cell in enumerate(found[count].cells) if cell == FULL)
        assert brute_schedule(changes, outputs, computed) == pytest.approx(least, rel=1e-3)


def random_profile(seed, steps=7, ages=4, branches=2, sketch=16):
    base = profile_of(BENCHES["dit"]())
    draw = torch.Generator().manual_seed(seed)
    walk = torch.randn(steps, branches, sketch, generator=draw).cumsum(0) + 3
    changes = torch.zeros(steps, ages + 1, branches, sketch)
    for t in range(steps):
        changes[t, 0] = walk[t]
        for k in range(1, min(ages, t) + 1):
            changes[t, k] = walk[t - k] - walk[t]
    numbers = torch.rand(2, steps, generator=draw) + 0.5
    products = torch.zeros(steps, branches, ages + 1, ages + 1)
    outputs = (torch.randn(steps, branches, 9, generator=draw).cumsum(0) + 2).double()
    for t in range(steps):
        for k, m in itertools.product(range(min(ages, t) + 1), repeat=2):
            products[t, :, k, m] = (outputs[t - k] * outputs[t - m]).sum(-1)
    gains, feedback = (tuple(each.tolist()) for each in numbers)
    made = replace(base, changes=changes, products=products, sampler_gains=gains, model_feedback=feedback, final=1.0)
    return made, outputs.numpy()


@some
def test_the_flops_that_a_plan_leaves_are_those_that_torch_counts(name):
    bench = WATCHED[name](torch.float32)
    plan = ah.solve(profile_of(bench), ah.Budget(transformer_flops=0.6))

    def counted():
        with FlopCounterMode(display=False, depth=1) as counter:
            bench.pipe(**bench.inputs(steps=STEPS))
        return sum(counter.flop_counts[type(bench.pipe.transformer).__name__].values())

    whole = counted()
    with ah.applied(bench.pipe, plan):
        left = counted() / whole
    assert left <= 0.6
    assert plan.about["search"]["transformer_flops"] == pytest.approx(left, abs=2e-3)


@some
def test_a_profile_is_read_as_it_was_written(name, tmp_path):
    profile = profile_of(WATCHED[name](torch.float32))
    profile.save(tmp_path / "profile")
    read = ah.Profile.load(tmp_path / "profile")
    assert vars(read) | {"changes": None, "products": None} == vars(profile) | {"changes": None, "products": None}
    assert torch.equal(read.products, profile.products)
    scale = profile.changes.abs().amax((1, 2, 3), keepdim=True)
    assert ((read.changes - profile.changes).abs() <= 2**-11 * scale + 1e-12).all()
    budget = ah.Budget(transformer_flops=0.6)
    assert [c == FULL for (c,) in ah.solve(read, budget).cells] == [c == FULL for (c,) in ah.solve(profile, budget).cells]


@some
def test_speedup(name):
    bench = WATCHED[name]()
    untouched, second = (trace(bench, bench.inputs(steps=STEPS, seed=seed)) for seed in (1, 2))
    with left_as_it_was(bench), ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6)) as sped:
        assert sped.plan is None
        assert torch.equal(bench.pipe(**bench.inputs(steps=STEPS, seed=1))[0], untouched.result)
        assert sped.plan is not None
        column = [cell for (cell,) in sped.plan.cells]
        given = trace(bench, bench.inputs(steps=STEPS, seed=2))
    with replayed(bench, column, guided=True):
        wanted = trace(bench, bench.inputs(steps=STEPS, seed=2))
    assert distance(given, wanted) < 1e-9
    assert distance(given, second) > 1e-6
    assert f"{STEPS} steps, {column.count(FULL)} computed" in str(sped)


def test_a_profile_serves_the_first_generation():
    bench = BENCHES["dit"]()
    profile = profile_of(bench)
    with ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6), profile=profile) as sped:
        given = trace(bench, bench.inputs(steps=STEPS, seed=5))
        column = [cell for (cell,) in sped.plan.cells]
    with replayed(bench, column, guided=True):
        assert distance(given, trace(bench, bench.inputs(steps=STEPS, seed=5))) < 1e-9


def test_remove_ends_a_speedup_before_and_after_the_first_generation():
    bench = BENCHES["dit"](torch.float32)
    with left_as_it_was(bench):
        ah.speedup(bench.pipe, quality="strong")
        ah.remove(bench.pipe)
        ah.speedup(bench.pipe, quality="strong")
        bench.pipe(**bench.inputs(steps=STEPS))
        ah.remove(bench.pipe)


def test_a_generation_that_cannot_be_watched_teaches_nothing():
    bench = BENCHES["dit"](torch.float32)
    untouched = trace(bench, bench.inputs(steps=STEPS))
    weight = bench.pipe.transformer.proj_out_2.bias
    kept = weight.data.clone()
    with ah.speedup(bench.pipe, quality="strong") as sped:
        weight.data[0] = torch.nan
        with pytest.warns(NothingLearnt, match="not finite"):
            bench.pipe(**bench.inputs(steps=STEPS))
        assert sped.plan is None
        assert "no plan: got values that are not finite" in str(sped)
        weight.data.copy_(kept)
        with pytest.raises(KeyboardInterrupt):
            interrupted(bench)
        assert sped.plan is None
        assert_identical(trace(bench, bench.inputs(steps=STEPS)), untouched)
        assert sped.plan is not None


def interrupted(bench):
    def stop(*_):
        raise KeyboardInterrupt

    hook = bench.pipe.transformer.transformer_blocks[1].attn1.to_q.register_forward_pre_hook(stop)
    try:
        bench.pipe(**bench.inputs(steps=STEPS))
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_what_was_done_is_said_by_counters(name):
    """Compared with the blocks that ran, with what torch counts, and with a clock around the calls."""
    bench, ran = WATCHED[name](torch.float32), []
    blocks = blocks_of(bench.pipe.transformer, find(bench.pipe, {"stack"}))
    hook = blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))  # in skipped steps, too: it lies outside of the plan
    inner = next(blocks[0].children()).register_forward_pre_hook(lambda *_: ran.append(0))

    def generated(**more):
        ran.clear()
        with FlopCounterMode(display=False, depth=1) as counter:
            bench.pipe(**bench.inputs(steps=STEPS, **more))
        calls = ran.count(1) // STEPS if not more else 1
        return ran.count(0) // calls, sum(counter.flop_counts[type(bench.pipe.transformer).__name__].values())

    with ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6), cache=False) as sped:
        assert "nothing has been generated yet" in str(sped)
        bench.pipe(**bench.inputs(steps=STEPS))
        error, first = sped.plan.about["search"]["predicted_error"], str(sped)
        computed, flops = generated()
        said = str(sped)
        with pytest.warns(PlanAdapted):
            bench.pipe(**bench.inputs(steps=5))
        other = str(sped)
    whole = generated()[1]
    hook.remove()
    inner.remove()
    done = f"{STEPS} steps, {computed} computed, {flops / whole:.0%} of the FLOPs"
    assert first == f"watched in full; from the next generation on {done}; expected error {error}"
    assert re.fullmatch(rf"{done}, \d+\.\d × faster than the first generation; expected error {error}", said), said
    assert re.fullmatch(rf"5 steps, \d computed, \d+% of the FLOPs; expected error {error} in {STEPS} steps", other), other


def test_a_profile_makes_no_generation_the_first():
    """No generation was in full: nothing is said of how much faster they are."""
    bench = BENCHES["dit"](torch.float32)
    with ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6), profile=profile_of(bench)) as sped:
        assert str(sped).startswith(f"from the next generation on {STEPS} steps, ")
        for _ in range(2):
            bench.pipe(**bench.inputs(steps=STEPS))
            assert re.fullmatch(rf"{STEPS} steps, \d computed, \d+% of the FLOPs; expected error [\d.e-]+", str(sped))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_interrupted_generation_teaches_nothing_and_says_so(name):
    """By a callback, as interfaces do it: the pipeline gives what it has, which is the untouched result, and runs once."""
    bench, calls = WATCHED[name](torch.float32), []

    def stopping(pipe, step, _, kwargs):
        calls.append(step)
        pipe._interrupt = step == 3
        return kwargs

    inputs = {"callback_on_step_end": stopping}
    untouched, whole = bench.pipe(**bench.inputs(steps=STEPS), **inputs)[0], trace(bench, bench.inputs(steps=STEPS))
    with ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6)) as sped:
        calls.clear()
        with pytest.warns(NothingLearnt, match=rf"ended after 4 of {STEPS} steps.*ran in full; the next one is watched"):
            assert torch.equal(bench.pipe(**bench.inputs(steps=STEPS), **inputs)[0], untouched)
        assert calls == [0, 1, 2, 3]
        assert (sped.plan, sped.profile) == (None, None)
        assert f"no plan: the pipeline's run ended after 4 of {STEPS} steps" in str(sped)
        assert_identical(trace(bench, bench.inputs(steps=STEPS)), whole)
        assert sped.plan is not None


def test_a_budget_that_cannot_be_met_leaves_the_pipeline_in_full():
    bench = BENCHES["dit"](torch.float32)
    untouched = trace(bench, bench.inputs(steps=STEPS))
    with ah.speedup(bench.pipe, 1000.0) as sped:
        with pytest.warns(NothingLearnt, match="at most"):
            assert_identical(trace(bench, bench.inputs(steps=STEPS)), untouched)
        assert sped.plan is None


@pytest.mark.parametrize(
    "wrong",
    [{}, {"times": 2, "quality": "light"}, {"quality": "best"}, {"times": 0.5}, {"budget": 0.4}, {"times": "2"}],
    ids=str,
)
def test_refused_arguments(wrong):
    bench = BENCHES["dit"](torch.float32)
    with left_as_it_was(bench), pytest.raises(InputsInvalid, match="wanted"):
        ah.speedup(bench.pipe, **wrong)


def test_refused_pipelines():
    bench = BENCHES["dit"](torch.float32)
    ah.speedup(bench.pipe, quality="light")
    with pytest.raises(AlreadyApplied, match="speedup already"):
        ah.speedup(bench.pipe, quality="light")
    ah.remove(bench.pipe)
    with pytest.raises(UnsupportedPipeline):
        ah.speedup(MORE["cogvideox"](torch.float32).pipe, quality="light")


class Ticking:
    """A clock that only moves where a block runs, by a second, and where the layer after the blocks runs."""

    def __init__(self, bench):
        self.now, self.after = 0.0, 0.25
        transformer, model = bench.pipe.transformer, find(bench.pipe, {"stack"})
        inside = set()
        for block in blocks_of(transformer, model):
            first, *_ = linears = [each for each in block.modules() if isinstance(each, torch.nn.Linear)]
            inside |= {*linears}
            first.register_forward_hook(lambda *_: self.tick(1.0))
        *_, last = (each for each in transformer.modules() if isinstance(each, torch.nn.Linear) and each not in inside)
        last.register_forward_hook(lambda *_: self.tick(self.after))
        self.blocks = len(blocks_of(transformer, model))

    def tick(self, seconds):
        self.now += seconds

    def of(self, bench):
        """The seconds of a generation."""
        before = self.now
        bench.pipe(**bench.inputs(steps=STEPS))
        return self.now - before


@pytest.mark.parametrize(
    ("name", "times", "after"), [("dit", 1.5, 0.25), ("dit", 2.2, 0.25), ("dit", 1.8, 0.75), ("flux", 1.8, 0.75)]
)
def test_a_speedup_is_met(name, times, after, monkeypatch):
    """By a clock that is known, with as many computed steps as can be; also where skipped steps take longer under a plan."""
    bench = WATCHED[name](torch.float32)
    ticking = Ticking(bench)
    for module in (watching, validation):
        monkeypatch.setattr(module, "clock", lambda: ticking.now)
    own = stack_api._checked

    def checked(*args):
        ticking.after = after
        return own(*args)

    monkeypatch.setattr(stack_api, "_checked", checked)
    plan = ah.search(bench.pipe, bench.inputs(steps=STEPS), budget=ah.Budget(speedup=times, corrections=1), progress=False)
    raw = ticking.of(bench)
    with ah.applied(bench.pipe, plan):
        sped = ticking.of(bench)
    assert raw / sped >= times
    assert raw / (sped + ticking.blocks * plan.calls) < times
    if "measured_speedup" in plan.about["search"]:
        assert plan.about["search"]["measured_speedup"] == pytest.approx(raw / sped, rel=5e-3)
    assert plan.about["search"]["predicted_speedup"] >= times


@pytest.mark.parametrize("name", ["dit_learned_sigma", "sd3", "flux"])
@pytest.mark.parametrize("budget", [{"transformer_flops": 0.6}, {"error": 0.3}], ids=str)
def test_search_by_stacks(name, budget):
    bench = WATCHED[name](torch.float32)
    inputs = {"steps": STEPS, "images": 2}
    with left_as_it_was(bench):
        plan = ah.search(bench.pipe, bench.inputs(**inputs), strategy="stack", budget=ah.Budget(**budget), progress=False)
    told = plan.about["search"]
    raw = final_latents(bench, bench.inputs(**inputs))
    with ah.applied(bench.pipe, plan):
        error = float((final_latents(bench, bench.inputs(**inputs)) - raw).norm() / raw.norm())
    assert told["measured_error"] == pytest.approx(error, rel=2e-2, abs=1e-4)
    if "error" in budget:
        assert error <= 0.3
    if "transformer_flops" in budget:
        assert told["transformer_flops"] <= 0.6


def test_a_profile_is_kept_for_the_same_model_and_call(tmp_path):
    bench, budget = BENCHES["dit"](torch.float32), ah.Budget(transformer_flops=0.6)
    with ah.speedup(bench.pipe, budget=budget):
        bench.pipe(**bench.inputs(steps=STEPS))
    files = [*(tmp_path / "cache").rglob("*.safetensors")]
    assert len(files) == 1
    with ah.speedup(bench.pipe, budget=budget) as sped:
        given = trace(bench, bench.inputs(steps=STEPS, seed=4))
        column = [cell for (cell,) in sped.plan.cells]
    with replayed(bench, column, guided=True):
        assert distance(given, trace(bench, bench.inputs(steps=STEPS, seed=4))) < 1e-4
    with ah.speedup(bench.pipe, budget=budget):
        bench.pipe(**bench.inputs(steps=STEPS - 1))  # another call
    other = BENCHES["dit"](torch.float32, 1)  # other weights
    with ah.speedup(other.pipe, budget=budget):
        other.pipe(**other.inputs(steps=STEPS))
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) == 3
    with ah.speedup(bench.pipe, budget=budget, cache=False):
        bench.pipe(**bench.inputs(steps=STEPS + 1))
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) == 3


def test_a_kept_profile_that_is_broken_is_written_anew(tmp_path):
    bench, budget = BENCHES["dit"](torch.float32), ah.Budget(transformer_flops=0.6)
    untouched = trace(bench, bench.inputs(steps=STEPS))
    with ah.speedup(bench.pipe, budget=budget):
        bench.pipe(**bench.inputs(steps=STEPS))
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    whole, kept = file.read_bytes(), ah.Profile.load(file)
    file.write_bytes(whole[: len(whole) // 2])
    with ah.speedup(bench.pipe, budget=budget), pytest.warns(NothingLearnt, match="no sound profile"):
        assert_identical(trace(bench, bench.inputs(steps=STEPS)), untouched)
    assert torch.equal(ah.Profile.load(file).changes, kept.changes)


def test_a_folder_that_cannot_be_written_loses_no_picture(tmp_path, monkeypatch):
    bench, budget = BENCHES["dit"](torch.float32), ah.Budget(transformer_flops=0.6)
    untouched = trace(bench, bench.inputs(steps=3))
    (tmp_path / "file").touch()
    monkeypatch.setenv("ARROWHEAD_CACHE", str(tmp_path / "file"))
    with left_as_it_was(bench), ah.speedup(bench.pipe, budget=budget) as sped:
        with pytest.warns(ProfileNotKept, match="cannot write"):
            assert_identical(trace(bench, bench.inputs(steps=3)), untouched)
        assert sped.plan is not None
        bench.pipe(**bench.inputs(steps=3))  # a second warning would be an error
        assert str(sped).startswith("3 steps, ")


def test_a_generation_that_failed_before_its_first_step_can_be_printed():
    bench = BENCHES["dit"](torch.float32)
    with ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6), cache=False) as sped:
        for _ in range(2):
            bench.pipe(**bench.inputs(steps=3))
        with pytest.raises(TypeError):
            bench.pipe(**bench.inputs(steps=3) | {"class_labels": None})
        assert str(sped).startswith("the latest generation ended before its first step; from the next generation on 3 steps, ")


def test_an_error_of_the_generation_is_no_fault_of_the_kept_profile():
    bench, calls = BENCHES["dit"](torch.float32), []
    budget = ah.Budget(transformer_flops=0.6)
    with ah.speedup(bench.pipe, budget=budget):
        bench.pipe(**bench.inputs(steps=3))

    def failing(*_):
        calls.append(1)
        raise InputsInvalid("the caller's own")

    with left_as_it_was(bench), ah.speedup(bench.pipe, budget=budget) as sped:
        hook = bench.pipe.transformer.register_forward_pre_hook(failing)
        with pytest.raises(InputsInvalid, match="the caller's own"):
            bench.pipe(**bench.inputs(steps=3))
        hook.remove()
        assert calls == [1]
        bench.pipe(**bench.inputs(steps=3))
        assert str(sped).startswith("3 steps, ")


def test_a_pipeline_that_is_being_watched_is_not_copied():
    bench, refused = BENCHES["dit"](torch.float32), []

    def copying(*_):
        with pytest.raises(AlreadyApplied, match="copy"):
            copy.copy(bench.pipe)
        refused.append(1)

    with ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6), cache=False):
        hook = bench.pipe.transformer.register_forward_pre_hook(copying)
        bench.pipe(**bench.inputs(steps=3))
        hook.remove()
        assert refused
        wanted = bench.pipe(**bench.inputs(steps=3))[0]
        assert torch.equal(copy.copy(bench.pipe)(**bench.inputs(steps=3))[0], wanted)


def test_a_plan_is_refused_where_a_speedup_is():
    bench = BENCHES["dit"](torch.float32)
    plan = ah.solve(profile_of(bench), ah.Budget(transformer_flops=0.6))
    with left_as_it_was(bench):
        ah.speedup(bench.pipe, quality="light")
        with pytest.raises(AlreadyApplied, match="has a speedup already"):
            ah.apply(bench.pipe, plan)
        ah.remove(bench.pipe)
        with ah.applied(bench.pipe, plan):
            pass


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, 0.99])
def test_profiles_cut_short_are_refused(cut, tmp_path):
    profile = profile_of(BENCHES["dit"](torch.float32))
    profile.save(tmp_path / "profile")
    whole = (tmp_path / "profile").read_bytes()
    (tmp_path / "profile").write_bytes(whole[: int(cut if cut >= 1 else cut * len(whole))])
    with pytest.raises(InputsInvalid, match="no sound profile"):
        ah.Profile.load(tmp_path / "profile")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", 2),
        ("sampler_gains", [1.0]),
        ("final", 0.0),
        ("flops", [-1.0, 1.0]),
        ("switch", 99),
        ("scales", [1e400]),
        ("about", {"seeds": "x"}),
        ("target", {}),
        ("unknown", 1),
    ],
)
def test_profiles_that_say_something_else_are_refused(name, value, tmp_path):
    profile_of(BENCHES["dit"](torch.float32)).save(tmp_path / "profile")
    with safe_open(tmp_path / "profile", "pt") as file:
        header = json.loads(file.metadata()["arrowhead_profile"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "profile", metadata={"arrowhead_profile": json.dumps({**header, name: value})})
    with pytest.raises(InputsInvalid, match="no sound profile"):
        ah.Profile.load(tmp_path / "profile")


def test_a_profile_that_takes_hours_to_solve_is_refused(tmp_path, monkeypatch):
    base = profile_of(BENCHES["dit"](torch.float32))

    def long(steps):
        shapes = (steps, 17, 2, 1), (steps, 2, 17, 17)
        changes, products = map(torch.zeros, shapes)
        ones, target = (1.0,) * steps, replace(base.target, levels=None)
        return replace(
            base, target=target, changes=changes, products=products, sampler_gains=ones, model_feedback=ones, switch=None
        )

    long(256).save(tmp_path / "profile")
    assert ah.Profile.load(tmp_path / "profile").steps == 256
    with pytest.raises(InputsInvalid, match="got 257 steps of 16 ages, 4112 together, wanted 4096 at most; resample"):
        long(257).save(tmp_path / "profile")
    monkeypatch.setattr(profile_file, "MAX_STEPS_TIMES_AGES", 10**6)
    long(4096).save(tmp_path / "profile")
    monkeypatch.undo()
    with pytest.raises(InputsInvalid, match=r"no sound profile.*got 4096 steps of 16 ages"):
        ah.Profile.load(tmp_path / "profile")


def test_a_pipeline_that_is_to_be_watched_is_not_copied():
    bench = BENCHES["dit"](torch.float32)
    with ah.speedup(bench.pipe, quality="light"), pytest.raises(AlreadyApplied, match="copy"):
        copy.copy(bench.pipe)


def test_copies_of_a_pipeline_that_was_watched_are_as_fast():
    bench = BENCHES["dit"](torch.float32)
    base, profile = type(bench.pipe), profile_of(bench)
    untouched = bench.pipe(**bench.inputs(steps=STEPS))[0]
    with ah.speedup(bench.pipe, quality="strong", profile=profile):
        wanted = bench.pipe(**bench.inputs(steps=STEPS))[0]
        other = copy.copy(bench.pipe)
        other.scheduler = type(other.scheduler).from_config(other.scheduler.config)
        before = bench.pipe.scheduler.timesteps
        assert torch.equal(other(**bench.inputs(steps=STEPS))[0], wanted)
        assert bench.pipe.scheduler.timesteps is before
    assert not torch.equal(wanted, untouched)
    assert type(other) is type(bench.pipe) is base
    assert vars(other).keys() == vars(bench.pipe).keys()
    assert torch.equal(other(**bench.inputs(steps=STEPS))[0], untouched)


def on_a_line(steps, noise_free):
    """A profile of outputs that lie on a parabola in the noise level, with one derivative for all steps."""
    base = profile_of(BENCHES["dit"](torch.float32))
    at = torch.arange(steps) / steps
    draw = torch.Generator().manual_seed(noise_free)
    a, b, c = torch.randn(3, 2, 12, generator=draw).double()
    outputs = a + b * at[:, None, None] + 0.1 * c * at[:, None, None] ** 2
    ages = min(16, steps - 1)
    changes, products = torch.zeros(steps, ages + 1, 2, 12), torch.zeros(steps, 2, ages + 1, ages + 1)
    for t in range(steps):
        changes[t, 0] = outputs[t]
        for k in range(min(ages, t) + 1):
            changes[t, k] += (outputs[t - k] - outputs[t]) * (k > 0)
            for m in range(min(ages, t) + 1):
                products[t, :, k, m] = (outputs[t - k] * outputs[t - m]).sum(-1)
    levels = tuple((1 - at).tolist())
    gains = (1 / steps,) * steps
    target = replace(base.target, levels=levels)
    return replace(
        base, target=target, changes=changes, products=products, sampler_gains=gains, model_feedback=(1.0,) * steps, final=1.0
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("watched", "steps"), [(24, 12), (24, 8), (12, 24), (20, 28)])
def test_a_profile_at_other_steps(watched, steps, seed):
    """What is interpolated is near to what a profile of these steps would be, and so are the schedules."""
    native, made = on_a_line(steps, seed), on_a_line(watched, seed).resample(steps=steps)
    by_levels = on_a_line(watched, seed).resample(levels=native.target.levels)
    assert torch.allclose(by_levels.changes, made.changes, atol=1e-5)
    ages = min(native.ages, made.ages)
    last = steps if watched >= steps else steps - steps // watched  # the end lies beyond the last step that was watched
    part = slice(last), slice(ages + 1)
    assert torch.allclose(made.changes[part], native.changes[part], atol=0.02)
    for age, other in itertools.product(range(ages + 1), repeat=2):
        rows = slice(max(age, other), last)
        assert torch.allclose(made.products[rows, :, age, other], native.products[rows, :, age, other], rtol=0.01, atol=0.05)
    assert made.sampler_gains == pytest.approx(native.sampler_gains)
    found, wanted = (
        schedules(replace(each, changes=each.changes[:, : ages + 1], products=each.products[:, :, : ages + 1, : ages + 1]))
        for each in (made, native)
    )
    for count in {*found} & {*wanted}:
        assert found[count].error == pytest.approx(wanted[count].error, rel=0.5, abs=1e-4)


def part_of(profile, begin, end):
    """What was watched of one transformer, as a profile of its own."""
    levels = profile.target.levels[begin:end]
    gains, feedback = profile.sampler_gains[begin:end], profile.model_feedback[begin:end]
    return replace(
        profile, target=replace(profile.target, levels=levels), changes=profile.changes[begin:end],
        products=profile.products[begin:end], sampler_gains=gains, model_feedback=feedback, switch=None,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_each_of_two_transformers_is_resampled_by_itself(seed):
    whole = replace(on_a_line(12, seed), switch=5)
    made = whole.resample(steps=18)
    assert (made.switch, made.steps) == (8, 18)  # 5 / 12 of 18 is 7.5
    first, second = part_of(whole, 0, 5).resample(steps=8), part_of(whole, 5, 12).resample(steps=10)
    for begin, end, alone in ((0, 8, first), (8, 18, second)):
        ages = min(made.ages, alone.ages) + 1
        assert torch.allclose(made.changes[begin:end, :ages], alone.changes[:, :ages])
        assert torch.allclose(made.products[begin:end, :, :ages, :ages], alone.products[:, :, :ages, :ages])
        assert made.model_feedback[begin + 1 : end - 1] == pytest.approx(alone.model_feedback[1:-1])
    assert whole.resample(levels=whole.target.levels).switch == 5
    with pytest.raises(InputsInvalid, match="wanted steps of both transformers"):
        whole.resample(levels=whole.target.levels[5:])
    with pytest.raises(InputsInvalid, match="wanted steps of both transformers"):
        whole.resample(steps=1)


def test_many_levels_at_the_switch_cost_as_much_as_elsewhere():
    whole = replace(on_a_line(10, 0), switch=5)
    made = whole.resample(levels=[1 - i / 30 for i in range(30)])
    assert made.switch == 14  # the first level that is nearer to 0.5 than to 0.6
    assert made.sampler_gains == pytest.approx([1 / 30] * 30)


@pytest.mark.parametrize("steps", range(2, 30))
def test_profiles_and_plans_switch_in_the_same_step(steps):
    for switch in range(1, 10):
        first, _ = parts_of(steps, None, None, 10, switch)
        assert len(first) == scaled_switch(Conditions(10, Tokens(1, 0, False), switch), steps)


def test_the_last_watched_level_may_be_0():
    levels = [0.75, 0.5, 0.25, 0.0]
    assert positions_of(levels, levels) == [0, 1, 2, 3]
    assert positions_of([0.125], levels) == [2.5]


def test_a_profile_at_its_own_steps_is_itself():
    profile = on_a_line(10, 3)
    for same in (profile.resample(steps=10), profile.resample(levels=profile.target.levels)):
        assert torch.allclose(same.changes, profile.changes[:, : same.ages + 1], atol=1e-6)
        assert same.sampler_gains == pytest.approx(profile.sampler_gains)


@pytest.mark.parametrize(
    "wrong", [{}, {"steps": 0}, {"steps": 2.0}, {"levels": []}, {"levels": [0.5, 0.7]}, {"steps": 3, "levels": [0.5]}], ids=str
)
def test_steps_that_a_profile_cannot_have(wrong):
    with pytest.raises(InputsInvalid, match="wanted"):
        on_a_line(6, 0).resample(**wrong)


def test_a_plan_for_other_steps_runs():
    bench = BENCHES["dit"]()
    profile = profile_of(bench)
    plan = ah.solve(profile.resample(steps=5), ah.Budget(transformer_flops=0.7))
    column = [cell for (cell,) in plan.cells]
    with ah.applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(steps=5))
        assert run.summary().notes == ()
    with replayed(bench, column, guided=True):
        assert distance(given, trace(bench, bench.inputs(steps=5))) < 1e-9
