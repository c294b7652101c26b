"""A plan on a pipeline, from apply to remove: exact where that is promised, nothing stale, nothing left, counted as it was."""

import contextlib
import gc
import inspect
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, HeunDiscreteScheduler
from pipelines import BENCHES, JOINT, dit, pixart_alpha, pixart_sigma, tiny, tiny_mmdit
from replay import (
    FULLS,
    HALVES,
    NAMES,
    assert_identical,
    assert_same,
    compressed,
    distance,
    plan,
    random_grid,
    replay,
    rows_held,
    trace,
)
from seeds import seeds
from untouched import left_as_it_was, parts, tensors_like

import arrowhead as ah
from arrowhead.errors import ArrowheadError, BandCoversAll, ShareCfgIgnored

MIXED = ["FFF", "WXV", "REW", "CwR", "VYE"]
ALL = BENCHES | JOINT


@pytest.fixture(params=ALL)
def any32(request):
    """Each pipeline, with and without text beside the image, in float32, called before: diffusers writes calls down on some."""
    any_bench = ALL[request.param](torch.float32)
    trace(any_bench, any_bench.inputs())
    return any_bench


@pytest.fixture(params=ALL)
def any64(request):
    """Each pipeline, with and without text beside the image, in float64."""
    return ALL[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_full_plan_changes_no_bit(name, dtype):
    bench = ALL[name](dtype)
    wanted = trace(bench, bench.inputs(images=2))
    assert_identical(compressed(bench, plan(bench, ["FFF"] * 5), bench.inputs(images=2)), wanted)


def test_apply_then_remove_leaves_no_trace(any32):
    with left_as_it_was(any32):
        ah.apply(any32.pipe, plan(any32, MIXED))
        ah.remove(any32.pipe)
    with left_as_it_was(any32):
        ah.apply(any32.pipe, plan(any32, MIXED))
        trace(any32, any32.inputs())
        ah.remove(any32.pipe)
    with left_as_it_was(any32), ah.applied(any32.pipe, plan(any32, MIXED)):
        trace(any32, any32.inputs())


@pytest.mark.parametrize("beyond", [0, 1, 100])
def test_a_band_that_covers_everything_is_full_attention(bench, beyond):
    radius = bench.visual - 1 + beyond
    wide = plan(bench, ["FFF", "www", "FwW", "WFV", "vRw"], near=radius)
    with pytest.warns(BandCoversAll, match=str(radius)):
        got = compressed(bench, wide, bench.inputs())
    assert_same(got, replay(bench, ["FFF", "FFF", "FFF", "FFC", "CRF"], bench.inputs()))


def test_a_band_of_all_but_one_token_is_not(any64):
    almost = plan(any64, ["FFF", "www", "www", "www", "www"], near=any64.visual - 2)
    assert distance(compressed(any64, almost, any64.inputs()), trace(any64, any64.inputs())) > 1e-5  # and does not warn


def test_generations_follow_one_another_without_memory(any64):
    mixed = plan(any64, MIXED)
    fresh = [compressed(any64, mixed, any64.inputs(seed, images)) for seed, images in [(1, 2), (2, 1), (3, 3)]]
    with ah.applied(any64.pipe, mixed):
        for seed, images in [(1, 2), (1, 2), (2, 1), (3, 3), (2, 1)]:
            assert_identical(trace(any64, any64.inputs(seed, images)), fresh[seed - 1])


def test_another_batch_size_is_right_too(bench):
    wanted = {images: replay(bench, MIXED, bench.inputs(images=images)) for images in (1, 2, 3)}
    with ah.applied(bench.pipe, plan(bench, MIXED)):
        for images in (2, 1, 3):
            assert_same(trace(bench, bench.inputs(images=images)), wanted[images])


class Stop(Exception):
    """What interrupts a generation."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["transformer_blocks.1.attn1.to_q", "transformer_blocks.2.ff", ""])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_an_interrupted_generation_leaves_nothing(either, error, place, step):
    mixed = plan(either, ["FFF", "WXV", "WCW", "CwR", "VYR"])
    fresh = compressed(either, mixed, either.inputs())
    calls, held = [], []

    def interrupt(*_):
        calls.append(place)
        if len(calls) == step + 1:
            held.append(run.cache_bytes)
            raise error

    with left_as_it_was(either), ah.applied(either.pipe, mixed) as run:
        hook = either.pipe.transformer.get_submodule(place).register_forward_hook(interrupt)
        with pytest.raises(error):
            either.pipe(**either.inputs(seed=9))
        hook.remove()
        assert step == 4 or held[0] > 0
        assert run.cache_bytes == 0
        assert_identical(trace(either, either.inputs()), fresh)


def test_an_interruption_before_the_first_step_leaves_nothing(either):
    wanted = replay(either, MIXED, either.inputs())
    with left_as_it_was(either), ah.applied(either.pipe, plan(either, MIXED)) as run:
        with pytest.raises((TypeError, ValueError)):
            either.pipe(**either.inputs(num_inference_steps="five"))
        assert run.cache_bytes == 0
        assert_same(trace(either, either.inputs()), wanted)


def held_after(grid, bench, images, itemsize=8):
    """Bytes that have to be remembered after each step: of each layer, what some later step reads."""
    tokens, attn = bench.visual, bench.attentions[0]
    width = attn.to_q.out_features  # heads × head dimension, and channels as well
    counted = []
    for step in range(len(grid)):
        rows = 0
        for column in zip(*grid, strict=True):
            rows += rows_held(column, step, HALVES)
            fulls = [i for i in range(len(grid)) if column[i] in FULLS] + [len(grid)]
            made = max((i for i in fulls if i <= step), default=None)
            if made is None:
                continue
            until = min(i for i in fulls if i > step)
            for letters in ("WV", "XY"):
                readers = [i for i in range(made + 1, until) if column[i] in letters]
                if readers and readers[-1] > step:
                    half = column[made] == "C" or all(column[i] in HALVES for i in readers)
                    rows += 1 if half else 2
        counted.append(rows * images * tokens * width * itemsize)
    return counted


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("seed", seeds(3))
def test_only_what_is_read_later_stays_alive(either, seed, images):
    """Live tensors are counted by the garbage collector after every step, and their whole storage."""
    grid = random_grid(seed + 20, 7, 3)
    attn = either.attentions[0]
    width = attn.to_q.out_features
    shapes = (either.visual, width), (attn.heads, either.visual, width // attn.heads)
    before = tensors_like(*shapes)
    alive, said = [], []

    def look(*_):
        storages = {p: t for p, t in tensors_like(*shapes).items() if p not in before}
        alive.append(sum(t.untyped_storage().nbytes() for t in storages.values()))
        said.append(run.cache_bytes)

    wanted = held_after(grid, either, images)
    gc.disable()  # a cycle would keep tensors for longer than needed
    try:
        with ah.applied(either.pipe, plan(either, grid)) as run:
            hook = either.pipe.transformer.register_forward_hook(look)
            either.pipe(**either.inputs(images=images, steps=7))
            hook.remove()
            assert alive == wanted
            assert said == wanted
            assert run.cache_bytes == 0
            assert tensors_like(*shapes).keys() == before.keys()
            peak = run.summary().peak_cache_bytes
    finally:
        gc.enable()
    assert max(wanted) > 0
    assert peak == max(plan(either, grid).cache_bytes(images, itemsize=8))
    assert peak >= max(wanted)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("seed", seeds(3))
def test_the_summary_counts_what_the_plan_promised(any64, seed, images):
    grid = random_grid(seed + 30, 6, 3)
    the_plan = plan(any64, grid)
    with ah.applied(any64.pipe, the_plan) as run:
        any64.pipe(**any64.inputs(images=images, steps=6))
    summary = run.summary()
    assert (summary.steps, summary.planned_steps, summary.notes) == (6, 6, ())
    assert summary.cells == Counter(NAMES[letter] for row in grid for letter in row) == the_plan.count()
    assert summary.flops.attention == pytest.approx(the_plan.flops().attention, rel=1e-12)
    assert summary.flops.module == pytest.approx(the_plan.flops().module, rel=1e-12)
    assert summary.residuals == sum(residual_passes(column) for column in zip(*grid, strict=True))
    assert summary.kernels["native"] == sum(letter in FULLS for row in grid for letter in row)
    bands = sum(letter in "wvWVxyXY" for row in grid for letter in row)
    assert summary.kernels["chunked"] == bands + summary.residuals
    assert all(name in str(summary) for name in summary.cells)


def residual_passes(column):
    """Residuals that are read before the next full step."""
    made = 0
    for step, letter in enumerate(column):
        later = [*column[step + 1 :], "F"]
        window = later[: next(i for i, following in enumerate(later) if following in FULLS)]
        made += (letter in FULLS) * sum(any(reader in letters for reader in window) for letters in ("WV", "XY"))
    return made


def test_the_summary_of_an_interrupted_generation_counts_what_ran():
    def stop(*_):
        raise Stop

    bench = dit()
    with ah.applied(bench.pipe, plan(bench, MIXED)) as run:
        with pytest.raises(ArrowheadError, match="call the pipeline"):
            run.summary()
        hook = bench.pipe.transformer.transformer_blocks[1].ff.register_forward_hook(stop)
        with pytest.raises(Stop):
            bench.pipe(**bench.inputs())
        hook.remove()
        assert run.summary().steps == 1
        assert run.summary().cells == {"full": 2}


def test_the_transformer_alone_is_not_compressed(any32):
    pipe, calls = any32.pipe, []
    hook = pipe.transformer.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe(**any32.inputs())
    hook.remove()
    args, kwargs = calls[2]
    with torch.no_grad():
        wanted = pipe.transformer(*args, **kwargs)[0]
        with ah.applied(pipe, plan(any32, ["www", "RRR", "RRR", "RRR", "RRR"])) as run:
            assert torch.equal(pipe.transformer(*args, **kwargs)[0], wanted)
            pipe(**any32.inputs())
            assert torch.equal(pipe.transformer(*args, **kwargs)[0], wanted)
            assert run.summary().steps == 5


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("makes", [(dit, pixart_sigma), (dit, dit), (pixart_alpha, tiny)])
def test_two_pipelines_with_plans_do_not_disturb_each_other(makes, first):
    grids = ["FFF", "WXV", "RRW", "CwR", "VYR"], ["FCF", "RWR", "WRX", "wVF", "RRR"]
    benches = [make(seed=10 * i) for i, make in enumerate(makes)]
    wanted = [replay(bench, grid, bench.inputs()) for bench, grid in zip(benches, grids, strict=True)]
    clean = [trace(bench, bench.inputs()) for bench in benches]
    with left_as_it_was(benches[0]), left_as_it_was(benches[1]):
        for bench, grid in zip(benches, grids, strict=True):
            ah.apply(bench.pipe, plan(bench, grid))
        for i in (0, 1, 0):
            assert_same(trace(benches[i], benches[i].inputs()), wanted[i])
        ah.remove(benches[first].pipe)
        assert_identical(trace(benches[first], benches[first].inputs()), clean[first])
        assert_same(trace(benches[1 - first], benches[1 - first].inputs()), wanted[1 - first])
        ah.remove(benches[1 - first].pipe)


def test_one_generation_inside_another():
    """A pipeline that is called from the callback of another one's generation."""
    outer, inner = pixart_sigma(), dit(seed=4)
    wanted = replay(outer, MIXED, outer.inputs()), replay(inner, MIXED, inner.inputs())
    with ah.applied(outer.pipe, plan(outer, MIXED)), ah.applied(inner.pipe, plan(inner, MIXED)):
        seen = []
        got = trace(outer, outer.inputs(callback=lambda *_: seen.append(trace(inner, inner.inputs()))))
    assert_same(got, wanted[0])
    assert len(seen) == 5
    for one in seen:
        assert_same(one, wanted[1])


def test_kernels_agree(any32):
    chunked, reference = (compressed(any32, plan(any32, MIXED), any32.inputs(), kernel=k) for k in ("chunked", "reference"))
    assert_same(chunked, reference, rtol=1e-3, atol=1e-4)
    with ah.applied(any32.pipe, plan(any32, MIXED), kernel="reference") as run:
        any32.pipe(**any32.inputs())
    assert set(run.summary().kernels) == {"native", "reference"}


def test_a_solver_that_calls_the_transformer_twice_per_step():
    bench = dit()
    bench.pipe.scheduler = HeunDiscreteScheduler(prediction_type="v_prediction")
    grid = random_grid(3, 7, 3)  # 4 steps of second order: the first three twice
    assert_same(compressed(bench, plan(bench, grid), bench.inputs(steps=4)), replay(bench, grid, bench.inputs(steps=4)))


def test_a_sampler_that_draws_noise_draws_the_same():
    bench = pixart_sigma()
    bench.pipe.scheduler = DDPMScheduler(prediction_type="v_prediction")
    got = compressed(bench, plan(bench, MIXED), bench.inputs())
    assert_same(got, replay(bench, MIXED, bench.inputs()))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_arguments_by_position(guidance):
    """Whether guidance is on is read from the call, however it was made."""
    bench, grid, labels = dit(), ["FFF", "WXV", "VWR"], [3, 5]
    inputs = {"class_labels": labels, "guidance_scale": guidance, "num_inference_steps": 3, "output_type": "pt"}
    wanted = replay(bench, grid, inputs | {"generator": torch.Generator().manual_seed(1)}, guided=guidance > 1)
    warns = pytest.warns(ShareCfgIgnored) if guidance == 1 else contextlib.nullcontext()
    with ah.applied(bench.pipe, plan(bench, grid)), warns:
        got = bench.pipe(labels, guidance, torch.Generator().manual_seed(1), 3, "pt")
    torch.testing.assert_close(got[0], wanted.result, rtol=1e-6, atol=1e-6)


class OwnProcessor:
    """A processor of somebody's own, with its own scale: q is doubled, and the scale halved."""

    def __init__(self, mask=None):
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (f(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        out = F.scaled_dot_product_attention(2 * q, k, v, attn_mask=self.mask, scale=0.5 * q.shape[-1] ** -0.5)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_a_processor_of_ones_own(bench):
    """One that uses torch.nn.functional as F is intercepted where it lives, with its own scale."""
    wanted = replay(bench, MIXED, bench.inputs())
    own = [OwnProcessor() for _ in bench.attentions]
    for attn, processor in zip(bench.attentions, own, strict=True):
        attn.processor = processor
    assert_same(compressed(bench, plan(bench, MIXED), bench.inputs()), wanted)
    assert [attn.processor for attn in bench.attentions] == own
    assert F is torch.nn.functional


def test_signature_name_and_class_are_kept(any64):
    before = inspect.signature(any64.pipe.__call__), type(any64.pipe)
    processors = parts(any64.pipe)["processors"]
    with ah.applied(any64.pipe, plan(any64, MIXED)):
        assert inspect.signature(any64.pipe.__call__) == before[0]
        assert isinstance(any64.pipe, before[1])
        assert (type(any64.pipe).__name__, type(any64.pipe).__module__) == (before[1].__name__, before[1].__module__)
        for name, processor in parts(any64.pipe)["processors"].items():
            assert isinstance(processor, type(processors[name]))
            assert inspect.signature(processor.__call__) == inspect.signature(processors[name].__call__)


@pytest.mark.parametrize("make", [dit, tiny, pixart_sigma, tiny_mmdit])
def test_saving_an_applied_pipeline_saves_the_pipeline(make, tmp_path):
    bench = make(torch.float32)
    wanted = trace(bench, bench.inputs())
    with left_as_it_was(bench), ah.applied(bench.pipe, plan(bench, MIXED)):
        bench.pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == type(bench.pipe).__name__
    bench.pipe = type(bench.pipe).from_pretrained(tmp_path)
    bench.pipe.set_progress_bar_config(disable=True)
    assert_identical(trace(bench, bench.inputs()), wanted)
