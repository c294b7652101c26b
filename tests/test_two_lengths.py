"""Searches whose prompt and negative prompt have two lengths, in two calls a step: judged as if each call ran alone."""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from budget import final_latents
from families import MORE
from family_replay import RADII, Replayed, random_cells, replaying
from independent import dense_mask
from replay import trace
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.calibration.run import CalibrationRun
from arrowhead.engine.execute_site import execute_site
from arrowhead.errors import ArrowheadWarning, UnsupportedPipeline
from arrowhead.metrics.error import relative_error, relative_squared_error
from arrowhead.models.find import find
from arrowhead.plans.cells import ASC, FULL, Arrow, Attend, Cached, Full
from arrowhead.plans.layout import ALL_KINDS
from arrowhead.plans.lifetimes import lifetimes
from arrowhead.searches.greedy import greedy_search
from arrowhead.searches.headwise import Headwise, headwise_search

STEPS = 5
INNER = ALL_KINDS - {"block"}
FAMILIES = ("qwen", "lumina2", "chroma", "hunyuan_video", "flux2", "ovis_image", "cogview4", "wan", "wan22")
LENGTHS = (3, 6)


def of_lengths(inputs, prompt, negative):
    """The arguments with prompts of so many tokens, of 7; Lumina 2's mask shows as many."""
    for prefix, length in (("", prompt), ("negative_", negative)):
        for name in (f"{prefix}prompt_embeds", f"{prefix}prompt_embeds_mask", f"{prefix}prompt_attention_mask"):
            if name in inputs and inputs[name].shape[1] == 7:
                inputs[name] = inputs[name][:, :length]
            elif name in inputs and "mask" in name:
                inputs[name] = torch.arange(inputs[name].shape[1]).lt(length).expand(len(inputs[name]), -1)
    return inputs


def text_in(site):
    return site.joint or any(map(text_in, site.within))


def apart(cells, sites):
    """The cells in which branches share nothing that has text in it."""
    return [
        [replace(cell, share_cfg=False) if text_in(site) and isinstance(cell, Attend) else cell
         for site, cell in zip(sites, row, strict=True)] for row in cells
    ]  # fmt: skip


@pytest.mark.parametrize("kinds", [INNER, {"block"}], ids=["modules", "blocks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_search_runs_is_what_the_calls_give_alone(name, kinds):
    """Random cells, run by the search's machinery for both calls at once."""
    bench, seed = MORE[name](), FAMILIES.index(name)
    lengths = LENGTHS if seed % 2 else (7, 4)
    try:
        model = find(bench.pipe, kinds)
    except UnsupportedPipeline:
        pytest.skip("has no blocks that are sites")
    cells = apart(random_cells(seed, model.sites, STEPS, True, bench.switch), model.sites)
    columns = dict(zip(model.sites, zip(*cells, strict=True), strict=True))
    kept = {site: lifetimes(column) for site, column in columns.items()}

    def inputs():
        return of_lengths(bench.inputs(seed=seed, images=2), *lengths)

    def at_site(call, state):
        cell, writes = columns[call.site][state.step], kept[call.site][state.step]
        return execute_site(call, state.prepared(call.site, cell, writes), state)

    given = CalibrationRun(driver_of(bench.pipe, inputs()), model).run(lambda step: step.finish_by(at_site))[0]
    with replaying(bench, model.modules, cells, True):
        wanted = bench.pipe(**inputs())[0]
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)
    assert (given - bench.pipe(**inputs())[0]).norm() > 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", ["qwen", "flux2"])
def test_the_greedy_search_judges_what_both_calls_give(name):
    bench, trials = MORE[name](), []
    model = find(bench.pipe)

    def inputs():
        return of_lengths(bench.inputs(images=2), *LENGTHS)

    with left_as_it_was(bench, images=2):
        found = greedy_search(driver_of(bench.pipe, inputs()), threshold=0.5, on_trial=trials.append)
    assert not any(getattr(cell, "share_cfg", False) for row in found.cells for cell in row)
    assert any(trial.accepted for trial in trials)

    def outputs(rows, step):
        with replaying(bench, model.modules, [*rows, *[[FULL] * len(model.sites)] * (STEPS - len(rows))], True):
            return torch.cat(trace(bench, inputs()).outputs[2 * step : 2 * step + 2])

    paths = [site.path for site in model.sites]
    for trial in (trials[0], trials[len(trials) // 2], trials[-1]):
        before, layer = found.cells[: trial.step], paths.index(trial.site)
        row = [*found.cells[trial.step][:layer], trial.cell, *[FULL] * (len(paths) - layer - 1)]
        wanted = relative_error(outputs(before, trial.step), outputs([*before, row], trial.step))
        assert trial.error == pytest.approx(wanted, rel=1e-4)


@contextmanager
def attention_seen():
    """What each call of attention is of a replay within the block: site, step, call, and q, k, v with the model's mask."""
    own, seen = Replayed.attention, []

    def attention(self, q, k, v, mask, scale):
        out = own(self, q, k, v, mask, scale)
        step = (self.passed - 1) // self.calls
        seen.append((self.site.path, step, self.call, q, k, v, mask, out))
        return out

    Replayed.attention = attention
    try:
        yield seen
    finally:
        Replayed.attention = own


def test_the_headwise_search_judges_every_head_by_both_calls():
    bench, choices = MORE["qwen"](), []
    model, settings = find(bench.pipe), Headwise(radii=RADII, share_cfg=True)

    def inputs():
        return of_lengths(bench.inputs(images=2), *LENGTHS)

    driver = driver_of(bench.pipe, inputs())
    found = headwise_search(driver, threshold=0.8, settings=settings, on_choice=choices.append)
    assert not any(cell.share_cfg for row in found.cells for cell in row)
    with replaying(bench, model.modules, found.cells, True), attention_seen() as seen:
        bench.pipe(**inputs())
    calls = {(path, step, call): rest for path, step, call, *rest in seen}

    def of_both(path, step, head, method):
        """The head's output under a method, of both calls, as one row of numbers."""
        parts = []
        for call, text in enumerate(LENGTHS):
            q, k, v, mask, _ = calls[path, step, call]
            if isinstance(method, Cached):
                parts.append(calls[path, step - 1, call][4][:, head])
                continue
            tokens = replace(bench.tokens, text=text)
            near = dense_mask(tokens, method.radius if isinstance(method, Arrow) else tokens.total)
            scores = (q[:, head] @ k[:, head].mT * q.shape[-1] ** -0.5).masked_fill(~near, -torch.inf)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, 0], -torch.inf)
            parts.append(scores.softmax(-1) @ v[:, head])
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])[None, None]  # (1, 1, M, D)

    compressed = [choice for choice in choices if choice.cell != FULL]
    assert compressed
    for choice in compressed:
        wanted = 0.0
        for head, method in enumerate(choice.cell.methods(2)):
            if method != Full():
                whole = of_both(choice.site, choice.step, head, Full())
                wanted += float(relative_squared_error(whole, of_both(choice.site, choice.step, head, method)))
        assert choice.error == pytest.approx(wanted, rel=1e-4)


def test_a_budget_is_met_and_measured_on_both_lengths(tmp_path):
    bench = MORE["qwen"]()

    def inputs():
        return of_lengths(bench.inputs(images=2), *LENGTHS)

    asked = ah.Budget(module_flops=0.6, extrapolate=False, corrections=0, granularity="site")
    with left_as_it_was(bench, images=2):
        table = ah.calibrate(bench.pipe, inputs(), progress=False)
        plan = ah.search(bench.pipe, inputs(), budget=asked, table=table, progress=False)
    table.save(tmp_path / "table.safetensors")
    assert ah.Table.load(tmp_path / "table.safetensors").other_texts
    sites = plan.target.sites
    assert plan.flops().module <= 0.6
    assert apart(plan.cells, sites) == [[*row] for row in plan.cells]
    alone = [[ASC if text_in(site) else FULL] * STEPS for site in table.target.sites]
    assert table.predicted_error(alone).max() == torch.inf
    assert replace(table, other_texts=False).predicted_error(alone).max() < torch.inf
    untouched = final_latents(bench, inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArrowheadWarning)
        with ah.applied(bench.pipe, plan, changes="refuse") as run:  # it shares no text, so it fits as it is
            given = final_latents(bench, inputs())
            assert run.summary().notes == ()
    with replaying(bench, {site: bench.pipe.transformer.get_submodule(site.path) for site in sites}, plan.cells, True):
        wanted = final_latents(bench, inputs())
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)
    error = float((wanted - untouched).norm() / untouched.norm())
    assert plan.about["search"]["measured_error"] == pytest.approx(error, rel=1e-2)


def test_a_table_is_that_of_texts_padded_and_masked():
    """Qwen-Image takes a mask, so that both texts can have one length; padding then does nothing to what is measured."""
    bench, tables = MORE["qwen"](), []
    for padded in (False, True):
        inputs = bench.inputs(images=2, steps=3)
        if padded:
            for prefix, length in zip(("", "negative_"), LENGTHS, strict=True):
                inputs[f"{prefix}prompt_embeds_mask"] = torch.arange(7).lt(length).expand(2, -1)
        else:
            of_lengths(inputs, *LENGTHS)
        extent = ah.Extent(radii=RADII, ages=2, regions=1)
        tables.append(ah.calibrate(bench.pipe, inputs, extent=extent, progress=False))
    apart, together = tables
    assert (apart.other_texts, together.other_texts) == (True, False)
    assert apart.sampler_gains == pytest.approx(together.sampler_gains, rel=1e-4)
    for name in ("outputs", "residuals"):
        given, wanted = (getattr(table, name)[..., :2, :] for table in tables)  # each branch's own
        assert (given - wanted).norm() < 1e-4 * wanted.norm()
