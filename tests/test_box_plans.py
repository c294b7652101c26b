"""Boxes in plans: which grid a model's tokens have, replays on images and video, searches, and files."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from budget import final_latents
from families import MORE, FamilyBench
from family_replay import replaying
from own import replaying as replaying_own
from pipelines import dit, pixart_sigma, sd3
from replay import distance, trace
from seeds import seeds
from test_families import STEPS, plan_of
from test_own import fused, sites_of
from test_own import plan_of as own_plan
from test_plan import PLAN, TARGET
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.run import CalibrationRun
from arrowhead.errors import BandCoversAll, InputsInvalid, PlanInvalid, PlanMismatch
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Arrow, Attend, Box, Cached, Full
from arrowhead.plans.layout import Grid, Tokens

VIDEO, IMAGE = Grid(2, 4, 3), Grid(1, 4, 5)
GRIDS = {
    "wan": VIDEO,
    "hunyuan_video": VIDEO,
    "ltx": VIDEO,
    "cogvideox": VIDEO,
    "mochi": VIDEO,
    "allegro": VIDEO,
    "latte": Grid(3, 4, 3),
    "qwen": IMAGE,
    "chroma": IMAGE,
    "lumina2": IMAGE,
    "flux2": IMAGE,
}
MANY = Box(0, None, 1), Box(None, 1, 2), Box(1, 2, 1)


def bench_of(name):
    """A bench with its expected grid."""
    if name in GRIDS:
        bench = MORE[name]()
        bench.grid = GRIDS[name]
        return bench
    bench = {"dit": dit, "sd3": sd3}[name]()
    return FamilyBench(bench.pipe, bench.conditional_first, bench.visual, bench.inputs, bench.text, grid=Grid(1, 4, 4))


def in_boxes(seed, sites):
    """Random cells, steps × sites: boxes with and without residuals, among all other methods."""
    draw = torch.Generator().manual_seed(seed)

    def some(kinds):
        return kinds[int(torch.randint(len(kinds), (1,), generator=draw))]

    arrows = [Arrow(box, residual) for box in MANY for residual in (False, True)]
    heads = [*arrows, Full(), Cached(), Arrow(2), Arrow(Box(0, 1, 1), precision="native")]
    rows = [[FULL] * len(sites)]
    for _ in range(STEPS - 1):
        one = [Attend(some(arrows), some([False, True])) for _ in sites]
        each = [Attend(tuple(some(heads) for _ in range(site.heads)), some([False, True])) for site in sites]
        rows.append([some([a, b, b, AST]) for a, b in zip(one, each, strict=True)])
    return rows


def bound(bench, model, cells, guided=True):
    plan = plan_of(bench, model, [[FULL] * len(model.sites)] * STEPS, guided)
    return replace(plan, cells=tuple(map(tuple, cells)), tokens=replace(plan.tokens, grid=bench.grid))


def tokens_of(bench, **inputs):
    calibration = CalibrationRun(driver_of(bench.pipe, bench.inputs(**inputs)), find(bench.pipe))
    calibration.run(lambda _: None, first_only=True)
    return calibration.tokens


@pytest.mark.parametrize("name", [*GRIDS, "dit", "sd3"])
def test_the_grid_of_every_model(name):
    bench = bench_of(name)
    assert tokens_of(bench).grid == bench.grid


def test_oblong_grids():
    assert tokens_of(pixart_sigma(), height=16, width=40).grid == Grid(1, 4, 10)
    assert tokens_of(MORE["wan"](), height=80, width=48, num_frames=9).grid == Grid(3, 5, 3)
    assert tokens_of(MORE["cogvideox"](), height=48, width=80, num_frames=9).grid == Grid(3, 3, 5)
    assert tokens_of(MORE["ltx"](), height=160, width=96, num_frames=17).grid == Grid(3, 5, 3)
    assert tokens_of(MORE["qwen"](), height=48, width=112).grid == Grid(1, 3, 7)
    assert tokens_of(MORE["flux2"](), height=48, width=112).grid == Grid(1, 3, 7)
    assert tokens_of(MORE["aura_flow"](), height=48, width=112).grid == Grid(1, 3, 7)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "aura_flow", "dit", "sd3"])
def test_tokens_stand_frame_by_frame_and_row_by_row(name):
    """A changed latent changes only the token of its frame, row and column at the input of the first site."""
    bench = MORE[name]() if name in MORE else bench_of(name)
    model, grid, calls, inputs = find(bench.pipe), tokens_of(bench).grid, [], []
    hook = model.transformer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    bench.pipe(**bench.inputs(steps=1))
    hook.remove()
    arguments = {name: value for name, value in model.transformer_arguments(*calls[-1]).items() if name != "self"}
    latents = arguments["hidden_states"]  # (B, C, H, W), (B, C, F, H, W) or, of CogVideoX, (B, F, C, H, W)
    patch = latents.shape[-1] // grid.columns

    def at_site(_module, args, kwargs):
        inputs.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    hook = next(iter(model.modules.values())).register_forward_pre_hook(at_site, with_kwargs=True)
    for place in torch.arange(grid.size)[::3].tolist():
        frame, row, column = place // (grid.rows * grid.columns), place // grid.columns % grid.rows, place % grid.columns
        changed = latents.clone()
        part = changed.select(1 if name == "cogvideox" else 2, frame) if changed.ndim == 5 else changed
        part[..., row * patch, column * patch] += 1
        with torch.no_grad():
            for given in (latents, changed):
                model.transformer(**arguments | {"hidden_states": given})
        moved = (inputs[-1] != inputs[-2]).any(-1).any(0)  # (V,)
        assert moved.nonzero().flatten().tolist() == [place]
    hook.remove()


@pytest.mark.parametrize("name", ["dit", "sd3", "qwen", "wan", "cogvideox", "latte", "mochi", "lumina2", "flux2"])
@pytest.mark.parametrize("seed", seeds(2))
def test_plans_are_what_a_replay_gives(name, seed):
    bench, inputs = bench_of(name), {"seed": seed, "images": 2}
    model = find(bench.pipe)
    cells = in_boxes(seed, model.sites)
    plan = bound(bench, model, cells)
    with ah.applied(bench.pipe, plan) as run:
        given = trace(bench, bench.inputs(**inputs))
        summary = run.summary()
    with replaying(bench, model.modules, cells, True) as sites:
        wanted = trace(bench, bench.inputs(**inputs))
    assert distance(given, wanted) < 1e-5
    assert distance(given, trace(bench, bench.inputs(**inputs))) > 1e-2
    assert {site.passed for site in sites} == {STEPS * plan.calls}
    assert {name for name in summary.heads if "box" in name} == {"box", "box-RS"}
    assert summary.flops.attention == pytest.approx(plan.flops().attention)
    assert summary.peak_cache_bytes == max(plan.cache_bytes(2, 8))


@pytest.mark.parametrize("seed", seeds(2))
def test_boxes_where_frames_and_places_are_sequences(seed):
    """Within a frame a box has its rows and columns, along time its frames."""
    own = fused(temporal=True)
    sites = sites_of(own)
    tokens = replace(own.tokens, grid=own.grid)
    plan = replace(own_plan(own, [[FULL] * len(sites)] * STEPS), cells=tuple(map(tuple, in_boxes(seed, sites))), tokens=tokens)
    with pytest.warns(BandCoversAll):
        run = ah.apply(own.model, plan, own.adapter)
    given, summary = own.sample(), run.summary()
    ah.remove(own.model)
    with replaying_own(own, sites, plan.columns, boxes=True):
        wanted = own.sample()
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    assert (given - own.sample()).norm() > 1e-2 * given.norm()
    assert summary.flops.attention == pytest.approx(plan.flops().attention)
    assert summary.peak_cache_bytes == max(plan.cache_bytes(own.images, 8))


STRATEGIES = {  # settings and threshold
    "greedy": (ah.Greedy(radii=MANY), 0.2),
    "headwise": (ah.Headwise(radii=MANY, residual=True), 0.9),
}


@pytest.mark.parametrize("name", ["dit", "cogvideox"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_searches_choose_boxes_and_their_plans_run(name, strategy, tmp_path):
    bench = bench_of(name)
    (settings, threshold), inputs = STRATEGIES[strategy], bench.inputs(images=2)
    with left_as_it_was(bench, images=2):
        plan = ah.search(bench.pipe, inputs, strategy=settings, threshold=threshold, progress=False)
    assert any("box" in kind for kind in plan.count_heads())
    assert plan.tokens.grid == bench.grid
    assert plan.about["search"]["radii"] == [*map(str, MANY)]
    plan.save(tmp_path / "plan.json")
    assert ah.Plan.load(tmp_path / "plan.json") == plan
    with ah.applied(bench.pipe, plan) as run:
        bench.pipe(**bench.inputs(images=2))
        assert run.summary().flops.attention == pytest.approx(plan.flops().attention)
        assert run.summary().notes == ()


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_a_budget_is_met_with_boxes(name, tmp_path):
    """From a saved table; the plan's error is the one that its search measured."""
    bench = bench_of(name)
    extent = ah.Extent(radii=MANY, kinds=("self_attention",))
    table = ah.calibrate(bench.pipe, bench.inputs(images=2), extent=extent, progress=False)
    table.save(tmp_path / "table.safetensors")
    table = ah.Table.load(tmp_path / "table.safetensors")
    budget = ah.Budget(attention_flops=0.8, reuse=False, share_cfg=False, granularity="head", corrections=0)
    plan = ah.search(bench.pipe, bench.inputs(images=2), budget=budget, table=table, progress=False)
    assert plan.flops().attention <= 0.8
    assert set(plan.count_heads()) & {"box", "box-RS"}
    assert plan.tokens.grid == bench.grid
    raw = final_latents(bench, bench.inputs(images=2))
    with ah.applied(bench.pipe, plan):
        left = final_latents(bench, bench.inputs(images=2))
    error = ((left - raw).norm() / raw.norm()).item()
    assert plan.about["search"]["measured_error"] == pytest.approx(error, rel=1e-2)
    assert error > 0


def test_boxes_are_spelt(tmp_path):
    row = Attend(Arrow(Box(1, 4, None))), Attend((Arrow(Box(columns=2), True), Full(), Full(), Arrow(Box(0, 0, 0))))
    last = Attend(Arrow(Box(rows=2), True), share_cfg=True), Attend(Arrow(Box(1), precision="int8"))
    plan = ah.Plan(((FULL, FULL), row, last), TARGET, Tokens.of_grid(4, 4, 4), guided=True)
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["format"] == 6
    assert content["tokens"]["grid"] == {"frames": 4, "rows": 4, "columns": 4}
    assert content["cells"] == ["F F", "x H", "Y m"]
    assert {symbol: cell["heads"] for symbol, cell in content["legend"].items()} == {
        "F": "full",
        "x": "arrow:1x4xall",
        "H": "arrow:allxallx2+residual full full arrow:0x0x0",
        "Y": "arrow:allx2xall+residual",
        "m": "arrow:1xallxall+int8",
    }
    assert ah.Plan.load(tmp_path / "plan.json") == plan
    assert plan.count() == {"full": 2, "box": 1, "head-wise": 1, "box-RS+ASC": 1, "box-int8": 1}
    for word in ("arrow:1x4", "arrow:1x4x4x4", "arrow:1x-4x4", "arrow:x4x4", "arrow:1x4xmany", "arrow:1x4x4.5"):
        content["legend"]["x"]["heads"] = word
        (tmp_path / "plan.json").write_text(json.dumps(content))
        with pytest.raises(PlanInvalid, match=word):
            ah.Plan.load(tmp_path / "plan.json")


def test_a_plan_with_boxes_is_bound_to_its_grid_and_one_without_is_not():
    tokens = Tokens.of_grid(1, 8, 8)
    plan = replace(PLAN, tokens=tokens)
    assert plan == PLAN  # which has 64 tokens of no grid
    plan.require_call(plan.steps, Tokens.of_grid(1, 4, 16))
    boxed = replace(PLAN, tokens=tokens, cells=((FULL, FULL), (Attend(Arrow(Box(rows=1))), FULL)))
    boxed.require_call(2, tokens)
    for other in (Tokens.of_grid(1, 4, 16), Tokens(64)):
        with pytest.raises(PlanMismatch, match="search again at this resolution"):
            boxed.require_call(2, other)
    with pytest.raises(PlanInvalid, match=r"got boxes for .*whose grid is not known; wanted .*; take radii in tokens"):
        replace(boxed, tokens=Tokens(64))


def test_searches_refuse_boxes_where_the_grid_is_not_known(monkeypatch):
    bench = bench_of("dit")
    family = find(bench.pipe).family
    flat = replace(family, tokens=lambda *args: family.tokens(*args).flat)
    monkeypatch.setattr(sys.modules["arrowhead.models.find"], "FAMILIES", (flat,))
    for asked in ({"strategy": ah.Greedy(radii=MANY), "threshold": 0.1}, {"extent": ah.Extent(radii=MANY)}):
        with pytest.raises(InputsInvalid, match="calls do not tell its grid of tokens; wanted radii in tokens"):
            ah.search(bench.pipe, bench.inputs(), progress=False, **asked)


def test_settings_of_radii_are_checked():
    for make in (ah.Greedy, ah.Headwise, ah.Extent):
        for wrong in ((-1,), (1.5,), (True,), 3, "4"):
            with pytest.raises(InputsInvalid, match="radii"):
                make(radii=wrong)
    with pytest.raises(InputsInvalid, match="savings='paper'"):
        ah.Headwise(radii=MANY, savings="paper")


def test_a_box_over_everything_is_warned_of_and_is_full_attention():
    bench = bench_of("dit")
    model = find(bench.pipe)
    plan = bound(bench, model, [[Attend(Arrow(Box(rows=2)))] * len(model.sites)] * STEPS)  # two blocks of two
    untouched = trace(bench, bench.inputs())
    with pytest.warns(BandCoversAll, match="radius allx2xall over 16 visual tokens"):
        run = ah.apply(bench.pipe, plan)
    try:
        assert distance(trace(bench, bench.inputs()), untouched) < 1e-10
    finally:
        run.close()
    assert target_of(model) == plan.target
