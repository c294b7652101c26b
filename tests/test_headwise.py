"""Plans whose heads differ, and text beside the image: against the formulas replayed by hand, and counted as they were."""

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from headwise import (
    FAULTS,
    REUSED,
    TEXT_FAULTS,
    can_follow,
    counted,
    methods,
    plan,
    random_grid,
    replay,
    uniform,
    unshared,
)
from pipelines import JOINT, dit, pixart_sigma, sd3, sd35, tiny_mmdit
from replay import GRIDS, assert_identical, assert_same, compressed, distance, rows_held, trace
from seeds import seeds
from torch import nn
from untouched import left_as_it_was, tensors_like

import arrowhead as ah
from arrowhead.errors import BandCoversAll
from arrowhead.kernels.cpu import chunked
from arrowhead.plans.cells import Attend, Full

MAKES = {"dit": dit, "pixart_sigma": pixart_sigma, **JOINT}
MIXED = ["FFF FwF Fxw", "WKF KwX+ FKF", "R KKF KwX+", "K R XKF", "WXK+ FwK R"]
CACHING = ["FFF F+ F", "FKF KKF+ K", "R KFK KFF+", "K R KKF", "KFF+ K+ R"]  # whose work is easily counted: no bands


@pytest.fixture(params=MAKES)
def bench(request):
    return MAKES[request.param]()


@pytest.fixture(params=JOINT)
def joint(request):
    return JOINT[request.param]()


def test_the_replay_without_compression_is_the_pipeline(bench):
    assert_same(replay(bench, ["F F F"] * 5, bench.inputs(images=2)), trace(bench, bench.inputs(images=2)))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("seed", seeds(3))
def test_random_grid(bench, seed, images):
    grid = random_grid(seed + 10 * images, 7, bench, lines=True)
    inputs = {"seed": seed, "images": images, "steps": 7}
    got = compressed(bench, plan(bench, grid), bench.inputs(**inputs))
    assert_same(got, replay(bench, grid, bench.inputs(**inputs)))
    assert distance(got, trace(bench, bench.inputs(**inputs))) > 0.05


@pytest.mark.parametrize("seed", seeds(2))
def test_without_guidance(bench, seed):
    """One branch in the batch: all of it is conditional."""
    grid = unshared(random_grid(seed, 5, bench, lines=True))
    inputs = {"seed": seed, "images": 3, "guidance": 1.0}
    got = compressed(bench, plan(bench, grid, guided=False), bench.inputs(**inputs))
    assert len(got.outputs[0]) == 3
    assert_same(got, replay(bench, grid, bench.inputs(**inputs), guided=False))


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in MAKES for fault in (FAULTS | TEXT_FAULTS if name in JOINT else FAULTS)]
)
def test_faults(name, fault):
    """What may go wrong would be seen, and did not: the right head is read, the text stays dense, and so on."""
    bench, grid = MAKES[name](), (FAULTS | TEXT_FAULTS)[fault]
    inputs = {"seed": 5, "images": 2, "steps": len(grid)}
    right = replay(bench, grid, bench.inputs(**inputs))
    wrong = replay(bench, grid, bench.inputs(**inputs), fault=fault)
    got = compressed(bench, plan(bench, grid), bench.inputs(**inputs))
    assert distance(wrong, right) > 0.02
    assert distance(wrong, got) > 0.02
    assert_same(got, right)


@pytest.mark.parametrize("make", [sd3, sd35])
def test_any_wrong_head_would_show(make):
    """Swap one head's letter of a random grid for another in the replay: it is no longer what arrowhead gives."""
    bench = make()
    grid = random_grid(6, 3, bench)
    got = compressed(bench, plan(bench, grid), bench.inputs(steps=3))
    words, tried = [row.split() for row in grid], 0
    for step, row in enumerate(words):
        for place, word in enumerate(row):
            for head in range(3 * (word != "R")):
                letters, before = methods(word, 3), [earlier[place] for earlier in words[:step]]
                for letter in {"F", "w", "K"} - {letters[head]}:
                    wrong = [list(line) for line in words]
                    wrong[step][place] = letters[:head] + letter + letters[head + 1 :] + "+" * word.endswith("+")
                    later = zip(wrong[step + 1 :], range(step + 1, 3), strict=True)
                    if can_follow(letter, before, head) and all(
                        line[place] == "R" or can_follow(methods(line[place], 3)[head], [w[place] for w in wrong[:at]], head)
                        for line, at in later
                    ):
                        tried += 1
                        lines = [" ".join(line) for line in wrong]
                        assert distance(replay(bench, lines, bench.inputs(steps=3)), got) > 1e-3, (grid, lines)
    assert tried > 20


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_uniform_grids_beside_text(grid):
    """The techniques of DiTFastAttn, each over whole sites."""
    bench, words = sd3(), uniform(grid)
    inputs = {"seed": 3, "images": 2}
    assert_same(compressed(bench, plan(bench, words), bench.inputs(**inputs)), replay(bench, words, bench.inputs(**inputs)))


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize(("near", "far"), [(0, 1), (18, 70), (100, 142)])
def test_radii_and_kernels_over_many_tokens(kernel, near, far):
    """144 tokens beside 7 of text: more than one chunk of queries, bands from a token to all but one."""
    bench = replace(sd3(torch.float32, pos_embed_max_size=12), visual=144)
    inputs, radii = {"height": 48, "width": 48}, {"w": near, "W": near, "x": far, "X": far}
    got = compressed(bench, plan(bench, MIXED, radii=radii), bench.inputs(**inputs), kernel=kernel)
    assert_same(got, replay(bench, MIXED, bench.inputs(**inputs), radii=radii), rtol=1e-3, atol=1e-4)


def test_a_negative_prompt_keeps_its_effect():
    bench = sd3()
    got = [compressed(bench, plan(bench, MIXED), bench.inputs(negative=negative)) for negative in range(2)]
    for negative in range(2):
        assert_same(got[negative], replay(bench, MIXED, bench.inputs(negative=negative)))
    assert distance(got[0], got[1]) > 0.01


def test_heads_that_agree_are_the_uniform_plan(bench):
    """Spelt head by head, a full plan is the same plan, and still the pipeline bit for bit."""
    heads = bench.attentions[0].heads
    whole = plan(bench, ["F F F"] * 5)
    spelt = replace(whole, cells=((Attend((Full(),) * heads),) * 3,) * 5)
    assert spelt == whole
    assert_identical(compressed(bench, spelt, bench.inputs()), trace(bench, bench.inputs()))


@pytest.mark.parametrize("beyond", [0, 100])
def test_a_band_that_covers_everything_is_full_attention(bench, beyond):
    radius = bench.visual - 1 + beyond
    wide = plan(bench, ["F F F", "wFw w FFw", "FWF W Kww", "WKw K+ W+", "Fw R KWF"], radii={"w": radius, "W": radius})
    with pytest.warns(BandCoversAll, match=str(radius)):
        got = compressed(bench, wide, bench.inputs())
    full = ["F F F", "F F F", "F F KFF", "FKF K+ F+", "F R KFF"]
    assert_same(got, replay(bench, full, bench.inputs()))


def test_a_plan_of_heads_leaves_nothing(joint):
    trace(joint, joint.inputs())  # diffusers writes down on a pipeline what it was called with
    with left_as_it_was(joint), ah.applied(joint.pipe, plan(joint, MIXED)) as run:
        first = trace(joint, joint.inputs(images=2))
        assert run.cache_bytes == 0
        trace(joint, joint.inputs(seed=4))
        assert_identical(trace(joint, joint.inputs(images=2)), first)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("seed", seeds(2))
def test_the_summary_counts_what_was_done(bench, seed, images):
    grid = random_grid(seed + 30, 6, bench, lines=True)
    the_plan = plan(bench, grid)
    with ah.applied(bench.pipe, the_plan) as run:
        bench.pipe(**bench.inputs(images=images, steps=6))
        assert run.cache_bytes == 0
    summary = run.summary()
    assert summary.heads == counted(bench, grid) == the_plan.count_heads()
    assert summary.cells == the_plan.count()
    assert summary.flops.attention == pytest.approx(the_plan.flops().attention, rel=1e-9)
    assert summary.flops.module == pytest.approx(the_plan.flops().module, rel=1e-9)
    assert summary.peak_cache_bytes == max(the_plan.cache_bytes(images, itemsize=8)) > 0
    assert all(name in str(summary) for name in summary.heads)


@pytest.fixture
def work(monkeypatch):
    """Counts multiply–adds inside the sites of a pipeline: `work(bench, the_plan)`."""
    spent, inside = Counter(), []
    linear, attend = F.linear, F.scaled_dot_product_attention

    def counted_linear(x, weight, *args):
        spent["linear"] += weight.numel() * x[..., 0].numel() * len(inside)
        return linear(x, weight, *args)

    def counted_attention(q, k, v, **kwargs):
        spent["attention"] += 2 * q.numel() * k.shape[2] * len(inside)
        return attend(q, k, v, **kwargs)

    def count(bench, the_plan=None, **inputs):
        spent.clear()
        hooks = [attn.register_forward_pre_hook(lambda *_: inside.append(True)) for attn in bench.attentions]
        hooks += [attn.register_forward_hook(lambda *_: inside.clear()) for attn in bench.attentions]
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", counted_linear)
            patch.setattr(F, "scaled_dot_product_attention", counted_attention)
            patch.setattr(chunked, "TORCH_ATTENTION", counted_attention)
            trace(bench, bench.inputs(**inputs)) if the_plan is None else compressed(bench, the_plan, bench.inputs(**inputs))
        for hook in hooks:
            hook.remove()
        return dict(spent)

    return count


def wanted_work(bench, grid, images=1, apart=lambda attn: True):
    """Multiply–adds by hand of a grid of full and cached heads."""
    linear = attention = 0
    for row in grid:
        for word, attn in zip(row.split(), bench.attentions, strict=True):
            if word in REUSED:
                continue
            samples, (width, channels) = images * (1 if "+" in word else 2), attn.to_q.weight.shape
            joint = attn.add_q_proj is not None
            n, heads = bench.visual + bench.text * joint, attn.heads
            full = methods(word, heads).count("F")
            projected = (full or 1) if apart(attn) else heads  # of no head at all, a processor would not get to its output
            out = bench.visual if joint and attn.context_pre_only else n
            linear += samples * channels * width * (3 * n * projected // heads + out)
            attention += samples * full * 2 * n * n * width // heads
    return {"linear": linear, "attention": attention}


@pytest.mark.parametrize("images", [1, 2])
def test_cached_heads_are_not_computed(bench, work, images):
    """Weights multiplied and pairs attended to, counted where torch does it, are those of the closed form."""
    whole, got = work(bench, images=images), work(bench, plan(bench, CACHING), images=images)
    assert whole == wanted_work(bench, ["F F F"] * 5, images)
    assert got == wanted_work(bench, CACHING, images)
    flops = plan(bench, CACHING).flops()
    assert got["attention"] / whole["attention"] == pytest.approx(flops.attention, rel=1e-9)
    assert sum(got.values()) / sum(whole.values()) == pytest.approx(flops.module, rel=1e-9)


class Adapted(nn.Linear):
    """A linear layer that does more than its weight says, as one with a LoRA does."""

    def forward(self, x):
        return super().forward(x) + 0.3 * x.roll(1, -1)[..., : self.out_features]


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v"])
@pytest.mark.parametrize("make", [dit, sd3, sd35])
def test_heads_that_cannot_be_told_apart_are_all_computed(make, name, work):
    bench = make()
    odd = bench.attentions[1]
    clean = trace(bench, bench.inputs())
    getattr(odd, name).__class__ = Adapted
    assert distance(trace(bench, bench.inputs()), clean) > 0.01
    the_plan = plan(bench, CACHING)
    assert_same(compressed(bench, the_plan, bench.inputs()), replay(bench, CACHING, bench.inputs()))
    whole, got = work(bench), work(bench, the_plan)
    assert got == wanted_work(bench, CACHING, apart=lambda attn: attn is not odd)
    assert sum(got.values()) / sum(whole.values()) == pytest.approx(the_plan.flops().module, rel=1e-9)


@pytest.mark.parametrize("make", [dit, sd3, sd35])
def test_an_adapter_that_comes_while_a_plan_is_applied(make):
    bench = make()
    with ah.applied(bench.pipe, plan(bench, MIXED)):
        for attn in bench.attentions:
            attn.to_k.__class__ = Adapted
        got = trace(bench, bench.inputs())
    assert_same(got, replay(bench, MIXED, bench.inputs()))


@pytest.mark.parametrize("make", [dit, sd3])
def test_a_hook_on_a_projection_keeps_its_effect(make):
    bench = make()
    for attn in bench.attentions:
        attn.to_v.register_forward_hook(lambda _m, _x, out: 1.5 * out)
    assert_same(compressed(bench, plan(bench, MIXED), bench.inputs()), replay(bench, MIXED, bench.inputs()))


def test_offloaded_weights_change_nothing():
    """accelerate hooks every module, and brings weights only when a module is really called."""
    bench = dit()
    wanted = replay(bench, MIXED, bench.inputs())
    cpu_offload(bench.pipe.transformer, execution_device=torch.device("cpu"))
    assert_same(compressed(bench, plan(bench, MIXED), bench.inputs()), wanted)


@pytest.mark.parametrize("make", [sd3, tiny_mmdit])
def test_fused_projections(make):
    bench = make()
    wanted = replay(bench, MIXED, bench.inputs())
    bench.pipe.transformer.fuse_qkv_projections()
    assert_same(compressed(bench, plan(bench, MIXED), bench.inputs()), wanted)


def held_after(bench, grid, images, itemsize=8):
    """Bytes that have to be remembered after each step: of each site and head, what some later step reads."""
    columns, held = list(zip(*[row.split() for row in grid], strict=True)), []
    for step in range(len(grid)):
        elements = 0
        for column, attn in zip(columns, bench.attentions, strict=True):
            n, width = bench.visual + bench.text * (attn.add_q_proj is not None), attn.to_q.out_features
            elements += n * width * rows_held(column, step, [word for word in column if "+" in word])
            for head in range(attn.heads):
                letters = [word if word in REUSED else methods(word, attn.heads)[head] for word in column]
                kinds = [("K", "FwWxX", n), ("W", "F", bench.visual), ("X", "F", bench.visual)]
                for reads, makes, length in kinds:
                    made = [i for i, letter in enumerate(letters) if letter in makes] + [len(grid)]
                    if made[0] > step:
                        continue
                    last, until = max(i for i in made if i <= step), min(i for i in made if i > step)
                    readers = [i for i in range(last + 1, until) if letters[i] == reads]
                    if readers and readers[-1] > step:
                        half = "+" in column[last] or all("+" in column[i] for i in readers)
                        elements += length * width // attn.heads * (1 if half else 2)
        held.append(elements * images * itemsize)
    return held


@pytest.mark.parametrize("make", [dit, sd3, sd35])
@pytest.mark.parametrize("seed", seeds(2))
def test_only_what_is_read_later_is_remembered(make, seed):
    bench = make()
    grid, said = random_grid(seed + 20, 7, bench, lines=True), []
    with ah.applied(bench.pipe, plan(bench, grid)) as run:
        hook = bench.pipe.transformer.register_forward_hook(lambda *_: said.append(run.cache_bytes))
        bench.pipe(**bench.inputs(images=2, steps=7))
        hook.remove()
    assert said == held_after(bench, grid, 2)
    assert max(said) > 0


LASTING = {
    "heads of several kinds": ["F FFw F", "K+ xWF FXK+", "KFK KXK R", "K WKK+ F", "WFK+ R R"],
    "heads that one branch repeats": ["F F F", "K+ K+ K+"],
    "residuals of one branch": ["F F F", "W+ X+ W+"],
    "reuse": ["F w+ F", "R R R"],
    "lines": ["F w+ F", "KFF F F+", "E E R", "F R E", "F F E", "R E E"],
}


@pytest.mark.parametrize("make", [dit, sd3])
@pytest.mark.parametrize("grid", LASTING.values(), ids=LASTING.keys())
def test_nothing_else_stays_alive(make, grid):
    """Live tensors are counted by the garbage collector after every step, and their whole storage."""
    bench = make()
    attn = bench.attentions[0]
    lengths, width = (bench.visual, bench.text, bench.visual + bench.text), attn.to_q.out_features
    shapes = [(n, width) for n in lengths] + [(h, n, width // attn.heads) for h in range(1, attn.heads + 1) for n in lengths]
    before, alive = tensors_like(*shapes), []

    def look(*_):
        storages = {p: t for p, t in tensors_like(*shapes).items() if p not in before}
        alive.append(sum(t.untyped_storage().nbytes() for t in storages.values()))

    gc.disable()  # a cycle would keep tensors for longer than needed
    try:
        hook = bench.pipe.transformer.register_forward_hook(look)
        with ah.applied(bench.pipe, plan(bench, grid)):
            bench.pipe(**bench.inputs(steps=len(grid)))
        hook.remove()
    finally:
        gc.enable()
    assert alive == held_after(bench, grid, 1)
