"""The table against derivatives: a cell's effect on a step's guided output, by finite differences, seen from outside."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import FAMILIES
from headwise import plan as grid_plan
from headwise import random_grid
from independent import by_head
from outside import Seen, at_heads, is_attention, site_modules
from pipelines import CAPTION
from replay import cell
from torch.utils.flop_counter import FlopCounterMode

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.plans.cells import AST, FULL, Arrow, Attend, Cached, Full, Reuse
from arrowhead.searches.budget.sensitivity.cfg import Guidance

STEPS, FAR, NEAR = 4, 5, 2
GAINS = (0.5, 1.5, 3.0, 0.25)  # in place of the sampler's, which have tests of their own
EVERYTHING = {"radii": (NEAR, FAR), "ages": STEPS, "regions": 1}
every_family = pytest.mark.parametrize("family", FAMILIES)
with_and_without = pytest.mark.parametrize("guidance", [3.0, 1.0], ids=["guided", "alone"])


@pytest.fixture
def vectors(monkeypatch):
    """The random vectors that gradients were taken of, in the order of their steps."""
    seen, own = [], Guidance.cotangents

    def cotangents(self, outputs, vector):
        seen.append(vector.double().clone())
        return own(self, outputs, vector)

    monkeypatch.setattr(Guidance, "cotangents", cotangents)
    return seen


def calibrated(bench, guidance, seed=0, images=1, **extent):
    inputs = bench.inputs(seed, images, guidance, STEPS)
    table = ah.calibrate(bench.pipe, inputs, extent=ah.Extent(**EVERYTHING | extent), progress=False)
    return replace(table, sampler_gains=GAINS)


def seen_run(bench, guidance, seed=0, images=1):
    return Seen.run(bench, (NEAR, FAR), guidance, seed=seed, steps=STEPS, images=images)


def squared(seen):
    """Of the final latents."""
    return (seen.final**2).sum(tuple(range(1, seen.final.ndim))).mean().item()


def pushes(seen, vectors, step, change):
    """Gain · r·JΔO of a step's vectors and the images."""
    response = seen.response(step, change).flatten(1)
    per_step = len(vectors) // seen.steps
    mine = [vector.flatten(1) for vector in vectors[step * per_step : (step + 1) * per_step]]
    return GAINS[step] * torch.stack([(vector * response).sum(1) for vector in mine])


def runs(seen, path, column, heads):
    """Of each step what these heads change in the steps of its run up to it, had they done throughout what they do in it."""
    full, errors = [of[path] for of in seen.full], seen.errors(path, column)
    given = [error + own for error, own in zip(errors, full, strict=True)]
    begun = 0
    for step, does in enumerate(column):
        if isinstance(does, Attend) and by_head(does, full[0].shape[1])[heads[0]] != Cached():
            begun = step
        values = [given[step]] * (step + 1 - begun)
        if isinstance(does, Reuse) and does.extrapolate:
            line = given[step] - given[begun]  # by as much of its slope as is taken
            values = [given[begun] + line * (i / (step - begun)) for i in range(step + 1 - begun)]
        changes = [value - own for value, own in zip(values, full[begun : step + 1], strict=True)]
        yield {begun + i: at_heads(change, heads) for i, change in enumerate(changes) if change.any()}


def wanted(seen, vectors, columns):
    """Each step's sum over sites, and over the groups of heads that always do the same: what it adds to a run's square."""
    found = np.zeros(STEPS)
    for path, column in columns.items():
        for heads in seen.groups(path, column):
            for step, run in enumerate(runs(seen, path, column, heads)):
                pushed = {at: pushes(seen, vectors, at, {path: change}) for at, change in run.items() if change.any()}
                so_far = [sum(push for at, push in pushed.items() if at <= last) for last in (step, step - 1)]
                squares = [(push**2).mean().item() if torch.is_tensor(push) else 0.0 for push in so_far]
                found[step] += max(squares[0] - squares[1], 0.0) / squared(seen)
    return found


def predicted(table, columns):
    """The table's, of some sites' columns, the others full."""
    return table.predicted_error([columns.get(site.path, [FULL] * STEPS) for site in table.target.sites])


def assert_same(given, reference):
    """Tables are float32, and what a run adds is a difference of squares."""
    assert given == pytest.approx(reference, rel=1e-2, abs=1e-5 * reference.max())


EIGHT = Attend(Full("int8"))
CELLS = {
    "reused": "FRRR",
    "from ASC": "CRRF",
    "ASC": "FCFC",
    "band": "FwxF",
    "band + ASC": "FvyF",
    "residual": "FWWW",
    "farther": "FXXX",
    "residual + ASC": "FVYV",
    "residual of ASC": "CWVX",
    "band reused": "FwRR",
    "residual reused": "FWRR",
    "shared, then reused": "FVRR",
    "residual reused, then read again": "FWRW",
    "a line": "FFEE",
    "a line after a while": "FRFE",
    "a line of ASC": "CCEE",
    "part of a slope": "FFDE",
    "part of a slope, of ASC": "FCDD",
    "a line from both to ASC": "FCEE",
    "a line from ASC to both": "CFEE",
    "a line over arrows": "FWEE",
    "a line over shared arrows": "FyvE",
    "a line, then repeated": "FFER",
    "repeated, then a line": "FFRE",
}


@every_family
@with_and_without
def test_each_kind_of_cell_does_what_the_derivatives_say(family, guidance, vectors):
    bench, draw = FAMILIES[family](), random.Random(family)
    seen, table = seen_run(bench, guidance), calibrated(bench, guidance, vectors=3)
    assert [len(vectors), *vectors[0].shape] == [3 * STEPS, *seen.guided(0, {}).shape]
    attention = [path for path in site_modules(bench) if is_attention(bench, path)][1:]
    for letters in CELLS.values():
        column = [cell(letter, NEAR, FAR) for letter in letters]
        columns = {draw.choice(attention): column}
        reference = wanted(seen, vectors, columns)
        assert_same(predicted(table, columns), reference)
        assert reference.max() > 1e-5 or (guidance == 1 and set(letters) == {"F", "C"}), letters


IN_INT8 = {
    "full": [EIGHT, FULL, EIGHT, FULL],
    "full, then reused": [FULL, EIGHT, AST, AST],
    "full in ASC, then reused": [FULL, Attend(Full("int8"), share_cfg=True), AST, FULL],
    "a band": [FULL, Attend(Arrow(NEAR, precision="int8")), FULL, Attend(Arrow(FAR, precision="int8"), share_cfg=True)],
    "the residual is that of native attention": [FULL, EIGHT, Attend(Arrow(NEAR, True, "int8")), Attend(Arrow(FAR, True))],
}


@every_family
@with_and_without
@pytest.mark.parametrize("gradients", [True, False])
def test_scores_in_int8_do_what_the_derivatives_say(family, guidance, gradients, vectors):
    """And without gradients something: which number is a matter of the weights."""
    bench, draw = FAMILIES[family](), random.Random(family)
    table = calibrated(bench, guidance, vectors=3 if gradients else 1, precisions=("int8",), gradients=gradients)
    first = -1 if family == "flux" else 1  # it turns queries in float32: too coarse for differences as small as these
    attention = [path for path in site_modules(bench) if is_attention(bench, path)][first:]
    seen = seen_run(bench, guidance)
    for column in IN_INT8.values():
        columns = {draw.choice(attention): column}
        given = predicted(table, columns)
        assert given.any()
        if gradients:
            assert_same(given, wanted(seen, vectors, columns))


def test_heads_in_int8_beside_others(vectors):
    bench = FAMILIES["sd3"]()
    seen, table = seen_run(bench, 3.0), calibrated(bench, 3.0, vectors=3, precisions=("int8",))
    mixed = Attend((Full("int8"), Arrow(NEAR, True, "int8"), Full()))
    columns = {"transformer_blocks.1.attn": [FULL, mixed, Attend((Cached(), Full("int8"), Cached())), AST]}
    assert_same(predicted(table, columns), wanted(seen, vectors, columns))


def test_what_precisions_do_is_recorded_where_it_is_asked_for():
    bench = FAMILIES["dit"]()
    without, table = (calibrated(bench, 3.0, precisions=precisions) for precisions in ((), ("int8",)))
    assert (without.precisions, without.quantisation_errors) == ((), None)
    assert torch.equal(table.outputs, without.outputs)
    assert torch.equal(table.residuals, without.residuals)
    assert table.other_flops == without.other_flops
    places = range(len(table.target.sites))
    kinds = [table.target.sites[place].kind == "self_attention" for place in places for _ in table.heads(place)]
    assert table.quantisation_errors[..., 0, :, :].ne(0).flatten(2).any(2)[0].tolist() == kinds
    with pytest.raises(InputsInvalid, match=r"precisions \['int8'\], wanted.*calibrate with a larger extent"):
        predicted(without, {"transformer_blocks.1.attn1": [EIGHT] * STEPS})


@every_family
@with_and_without
def test_feed_forwards_cross_attention_and_blocks_too(family, guidance, vectors):
    bench = FAMILIES[family]()
    seen, table = seen_run(bench, guidance), calibrated(bench, guidance, vectors=3)
    for path in (path for path in site_modules(bench) if not is_attention(bench, path)):
        columns = {
            path: [cell(letter, NEAR, FAR) for letter in random.Random(path).choice(["FRRR", "CRCR", "FCEE", "CCEE", "FFEE"])]
        }
        reference = wanted(seen, vectors, columns)
        assert_same(predicted(table, columns), reference)
        assert reference.max() > 1e-4


@every_family
@pytest.mark.parametrize("seed", range(2))
def test_heads_on_their_own(family, seed, vectors):
    """Each of a site's heads does what it likes."""
    bench = FAMILIES[family](seed=seed)
    seen, table = seen_run(bench, 3.0, seed), calibrated(bench, 3.0, seed)
    kinds = [Full(), Cached(), Arrow(NEAR), Arrow(FAR, residual=True)]
    heads, draw = bench.attentions[0].heads, random.Random(seed)
    column = [FULL, *(Attend(tuple(draw.choice(kinds) for _ in range(heads))) for _ in range(STEPS - 1))]
    columns = {draw.choice([path for path in site_modules(bench) if is_attention(bench, path)]): column}
    assert_same(predicted(table, columns), wanted(seen, vectors, columns))


def random_columns(bench, seed, kinds):
    """Of all sites."""
    draw, attention = random.Random(seed), iter(grid_plan(bench, random_grid(seed, STEPS, bench, kinds)).columns)
    columns = {}
    for path in site_modules(bench):
        letters = [draw.choice("FC"), *(draw.choice("FCRR") for _ in range(STEPS - 1))]
        columns[path] = [cell(letter, NEAR, FAR) for letter in letters] if not is_attention(bench, path) else next(attention)
    return columns


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_s_error_is_the_sum_over_its_cells(seed, vectors):
    """Random plans, all sites at once, without heads that are cached in shared cells: see below."""
    bench = FAMILIES[("dit", "pixart_sigma", "sd3")[seed % 3]](seed=seed)
    seen, table = seen_run(bench, 3.0, seed), calibrated(bench, 3.0, seed)
    columns = random_columns(bench, seed, "FwxWX")
    assert_same(predicted(table, columns), wanted(seen, vectors, columns))


CACHED_IN_SHARED = {
    "after full attention": [FULL, Attend((Cached(), Arrow(NEAR), Full()), share_cfg=True), FULL, FULL],
    "again, for both": [FULL, *(Attend((Cached(), Arrow(NEAR), Full()), share_cfg=share) for share in (True, False)), FULL],
    "and the whole reused": [FULL, Attend((Cached(), Arrow(NEAR), Full()), share_cfg=True), AST, AST],
}


@pytest.mark.parametrize("column", CACHED_IN_SHARED.values(), ids=CACHED_IN_SHARED)
def test_a_head_cached_in_a_shared_cell_gives_both_branches_the_conditional_one_s(column, vectors):
    """As the engine has it: the cell is computed for the conditional branch, and what its heads give serves both."""
    bench = FAMILIES["dit"]()
    seen, table = seen_run(bench, 3.0), calibrated(bench, 3.0, vectors=3)
    columns = {"transformer_blocks.1.attn1": column}
    assert_same(predicted(table, columns), wanted(seen, vectors, columns))


@pytest.mark.parametrize("seed", range(3))
def test_the_sum_over_cells_where_shared_cells_cache_heads(seed, vectors):
    bench = FAMILIES["sd3"](seed=seed)
    seen, table = seen_run(bench, 3.0, seed), calibrated(bench, 3.0, seed)
    columns = random_columns(bench, seed, "FKwxWX")
    assert_same(predicted(table, columns), wanted(seen, vectors, columns))


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_many_vectors_come_to_the_squared_norm(family):
    """Without a look at the vectors: E (r·JΔO)² = |JΔO|², of 4 images and 60 vectors to 9 % or so."""
    bench = FAMILIES[family]()
    seen = seen_run(bench, 3.0, images=4)
    table = calibrated(bench, 3.0, images=4, vectors=60)
    path = next(path for path in site_modules(bench) if "blocks.1.attn" in path)  # of FLUX a block's
    for letters in ("FRRR", "FwFw", "FVVV", "FFEE"):
        column = [cell(letter, NEAR, FAR) for letter in letters]
        given = predicted(table, {path: column})
        heads = range(bench.attentions[0].heads)
        for step, run in enumerate(runs(seen, path, column, heads)):
            responses = {at: GAINS[at] * seen.response(at, {path: change}).flatten(1) for at, change in run.items()}
            so_far = [sum(response for at, response in responses.items() if at <= last) for last in (step, step - 1)]
            squares = [(of**2).sum(1).mean().item() if torch.is_tensor(of) else 0.0 for of in so_far]
            assert given[step] * squared(seen) == pytest.approx(squares[0] - squares[1], rel=0.3, abs=0.3 * squares[0])


def test_vectors_are_normal_and_independent(vectors):
    """E r rᵀ is the unit matrix, between images too; every step has the same ones, so that what steps do adds up."""
    bench = FAMILIES["dit"](num_layers=1)
    calibrated(bench, 3.0, images=2, vectors=10)
    for first, *later in zip(*(vectors[step * 10 : (step + 1) * 10] for step in range(STEPS)), strict=True):
        assert all(torch.equal(first, vector) for vector in later)
    r = torch.cat(vectors[:10]).flatten(1)  # (vectors · images, elements)
    deviation = r.numel() ** -0.5
    assert abs(r.mean().item()) < 5 * deviation
    assert abs((r**2).mean().item() - 1) < 5 * 2**0.5 * deviation
    assert abs((r**4).mean().item() - 3) < 5 * 96**0.5 * deviation
    products = (r @ r.T)[~torch.eye(len(r), dtype=torch.bool)] / r.shape[1] ** 0.5
    assert products.abs().max() < 6


def test_what_is_older_than_the_run_is_nothing():
    bench = FAMILIES["dit"]()
    table = calibrated(bench, 3.0, ages=6)
    attention = [head for i, site in enumerate(table.target.sites) if site.kind == "self_attention" for head in table.heads(i)]
    for step in range(STEPS):
        assert not table.outputs[step, :, step + 1 :].any()
        assert not table.residuals[step, :, :, step + 1 :].any()
        assert table.outputs[step, :, 1 : step + 1].all()
        assert table.residuals[step, attention, :, : step + 1].all()
    assert not table.outputs[:, :, 0, :2].any()
    assert table.outputs[:, :, 0, 2].all()


def test_another_seed_gives_other_vectors_and_more_images_and_vectors_more_samples():
    bench = FAMILIES["dit"]()
    first, again, second = (
        ah.calibrate(bench.pipe, bench.inputs(steps=2), extent=ah.Extent(seed=seed), progress=False) for seed in (1, 1, 2)
    )
    assert torch.equal(first.outputs, again.outputs)
    assert not torch.equal(first.outputs, second.outputs)
    assert calibrated(bench, 3.0, images=3, vectors=2).outputs.shape[-1] == 6


@every_family
def test_what_the_table_says_of_its_run(family):
    bench = FAMILIES[family]()
    seen, table = seen_run(bench, 3.0, images=2), calibrated(bench, 3.0, images=2)
    assert table.final == pytest.approx((seen.final**2).mean().item())
    assert table.elements == seen.final[0].numel()
    assert (table.steps, table.radii, table.ages) == (STEPS, (FAR, NEAR), STEPS)
    assert [site.path for site in table.target.sites] == list(site_modules(bench))
    heads = [module.heads if is_attention(bench, path) else 1 for path, module in site_modules(bench).items()]
    assert [len(table.heads(site)) for site in range(len(heads))] == heads
    assert [head for site in range(len(heads)) for head in table.heads(site)] == list(range(sum(heads)))
    assert predicted(table, {}).tolist() == [0] * STEPS
    assert predicted(table, {path: [FULL, AST, FULL, FULL] for path in site_modules(bench)})[[0, 2, 3]].tolist() == [0] * 3


@every_family
@with_and_without
def test_what_lies_outside_of_the_sites_is_counted(family, guidance, monkeypatch):
    """All that torch multiplies in a step of the untouched pipeline, less what is known of the sites."""
    bench, images = FAMILIES[family](), 2
    table = calibrated(bench, guidance, images=images)
    forward, own, multiplied = bench.pipe.transformer.forward, torch.nn.functional.scaled_dot_product_attention, 0

    def attention(query, key, value, *args, **kwargs):
        nonlocal multiplied
        multiplied += 4 * query.numel() * key.shape[2]
        return own(query, key, value, *args, **kwargs)

    def counted(*args, **kwargs):
        nonlocal multiplied
        with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
            out = forward(*args, **kwargs)
        multiplied += sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
        return out

    monkeypatch.setattr(bench.pipe.transformer, "forward", counted)
    bench.pipe(**bench.inputs(steps=STEPS, images=images, guidance=guidance))
    branches = 2 if guidance > 1 else 1
    tokens, text = bench.visual + bench.text, CAPTION[0]
    sites = 0
    for path, module in site_modules(bench).items():
        if "single" in path and path.endswith(".attn"):
            continue  # within its block
        crossed = path.endswith("attn2") and not bench.text
        linears = {name: m.weight.numel() for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
        on_text = sum(n for name, n in linears.items() if "add" in name or (crossed and name in ("to_k", "to_v")))
        once = sum(n for name, n in linears.items() if name.startswith("norm"))  # for a whole sample: outside
        rows = tokens if "single" in path else bench.visual
        sites += 2 * (rows * (sum(linears.values()) - on_text - once) + text * on_text)
        if not path.endswith(".ff"):
            width = getattr(module, "attn", module).to_q.out_features
            sites += 4 * (bench.visual * text if crossed else tokens**2) * width
    assert table.other_flops == pytest.approx(multiplied / (STEPS * images) - branches * sites)
