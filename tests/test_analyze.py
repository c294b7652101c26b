"""The arrays of an analysis against what follows densely from a run's queries, keys and values, seen from outside."""

import random
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from budget import flux
from families import latte, qwen, wan
from independent import dense_mask
from pipelines import dit, pixart_sigma, sd3, sd35
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.analysis import measure
from arrowhead.analysis.arrays import REUSED
from arrowhead.errors import AlreadyApplied, InputsInvalid
from arrowhead.plans.cells import FULL
from arrowhead.plans.layout import Tokens

BENCHES = {"dit": dit, "pixart_sigma": pixart_sigma, "sd3": sd3, "sd35": sd35, "flux": flux, "wan": wan, "qwen": qwen}
TWICE, TEXT_FIRST = {"flux", "wan", "qwen"}, {"flux", "qwen"}
STEPS = 4


@dataclass
class Passed:
    """A site in one step, both branches: q, k, v (B, H, N, D), which keys may be seen, and what the module gave the image."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    open: torch.Tensor  # (B, 1, N or 1, N)
    image: torch.Tensor  # (B, V, C)
    tokens: Tokens

    def weights(self, radius=None):
        scores = (self.q @ self.k.mT / self.q.shape[-1] ** 0.5).masked_fill(~self.open, -torch.inf)
        if radius is not None:
            scores = scores.masked_fill(~dense_mask(self.tokens, radius), -torch.inf)
        return scores.softmax(-1)

    def heads(self, radius=None):
        """What the heads give the image, (B, H, V, D)."""
        return (self.weights(radius) @ self.v)[:, :, self.tokens.visual_slice]


def watched(name, bench, inputs):
    """Steps × sites of a run that arrowhead has no part in."""
    own, running, calls = torch.nn.functional.scaled_dot_product_attention, [], {}

    def attention(query, key, value, attn_mask=None, **more):
        if running:
            seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if attn_mask is None else attn_mask
            assert seen.dtype == torch.bool
            seen = seen.expand(len(query), 1, -1, key.shape[2])
            running[-1].append([query.clone(), key.clone(), value.clone(), seen])
        return own(query, key, value, attn_mask=attn_mask, **more)

    def leave(module, _, out):
        tokens = Tokens(bench.visual, bench.text, name in TEXT_FIRST)
        if running[-1][-1][0].shape[2] != tokens.total:
            tokens = Tokens(bench.visual)
        if not isinstance(out, tuple):  # of all tokens, or of the image's
            out = (out[:, tokens.visual_slice] if out.shape[1] == tokens.total else out,)
        running.pop()[-1] += [out[0].clone(), tokens]

    hooks = []
    for module in bench.attentions:
        kept = calls.setdefault(module, [])
        hooks.append(module.register_forward_pre_hook(lambda *_, kept=kept: running.append(kept)))
        hooks.append(module.register_forward_hook(leave))
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        bench.pipe(**inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = own
        for hook in hooks:
            hook.remove()
    twice = name in TWICE and len(calls[bench.attentions[0]]) == 2 * STEPS

    def joined(kept, step):
        if not twice:
            return Passed(*kept[step])
        *both, (tokens, _) = zip(kept[2 * step], kept[2 * step + 1], strict=True)
        longest = [max(t.shape[2] for t in pair) if pair[0].dtype == torch.bool else None for pair in both]
        pairs = [[t.expand(-1, -1, n, -1) if n else t for t in pair] for pair, n in zip(both, longest, strict=True)]
        return Passed(*map(torch.cat, pairs), tokens)

    return [[joined(calls[module], step) for module in bench.attentions] for step in range(STEPS)]


def squared_error(full, other):
    """(H,) of (B, H, V, D)."""
    spread = (full - full.mean((0, 2, 3), keepdim=True)).pow(2).mean((0, 2, 3))
    return (other - full).pow(2).mean((0, 2, 3)) / spread


def cosine(a, b):
    """Mean over the samples of (B, …)."""
    a, b = a.flatten(1), b.flatten(1)
    return float(((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean())


def same(array, wanted, what):
    torch.testing.assert_close(torch.from_numpy(array).double(), wanted.double(), rtol=1e-4, atol=1e-6, msg=lambda m: what + m)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", BENCHES)
def test_arrays_are_what_a_dense_computation_gives(name, guided, monkeypatch):
    seed = torch.seed() % 2**31
    bench, draw = BENCHES[name](seed=seed), random.Random(seed)
    layers = len(bench.attentions)
    site, step, radius = draw.randrange(layers), draw.randrange(STEPS), draw.randrange(1, bench.visual // 2)
    heads, sampled = draw.sample(range(bench.attentions[0].heads), 2), draw.randrange(2, bench.visual)
    largest, own = [], measure._weights
    monkeypatch.setattr(measure, "_weights", lambda *a: largest.append(own(*a)) or largest[-1])
    monkeypatch.setattr(measure, "WEIGHTS_AT_ONCE", limit := 700)

    def inputs():
        return bench.inputs(seed=seed, images=2, steps=STEPS, guidance=3.0 if guided else 1.0)

    seen = watched(name, bench, inputs())
    asked = {"site": site, "heads": heads, "step": step, "radius": radius, "sampled": sampled}
    found = ah.analyze(bench.pipe, inputs(), **asked, progress=False)

    rows = len(seen[0][0].q)
    assert rows == (4 if guided else 2)
    at, passed = found.attention_map, seen[step][site]
    row = 0 if bench.conditional_first or not guided else rows // 2
    assert (at.site, at.step, at.heads, at.tokens.flat) == (site, step, tuple(heads), passed.tokens)
    same(at.weights, passed.weights()[row, heads].nan_to_num(), "map ")
    assert all(w.numel() <= max(limit, w.shape[0] * w.shape[1] * w.shape[3]) for w in largest)  # one query at least

    first, count = 0, [i * bench.visual // sampled for i in range(sampled)]
    for place in range(layers):
        column = [line[place] for line in seen]
        own_heads = slice(first, first + column[0].q.shape[1])
        first = own_heads.stop
        full, band = [p.heads() for p in column], [p.heads(radius) for p in column]
        for t, p in enumerate(column):
            visual, text = p.tokens.visual_slice, p.tokens.text_slice
            w = p.weights()[:, :, visual]
            near = dense_mask(Tokens(p.tokens.visual), radius)
            same(found.band_mass[own_heads, t], (w[..., visual] * near).sum(-1).mean((0, 2)), f"band {place} {t} ")
            same(found.text_mass[own_heads, t], w[..., text].sum(-1).mean((0, 2)), f"text {place} {t} ")
            wanted = {"no residual": band[t]}
            if t:
                wanted["output"] = full[t - 1]
                wanted["window"] = band[t - 1] + full[t] - band[t]
                wanted["residual"] = band[t] + full[t - 1] - band[t - 1]
            for kind, errors in zip(REUSED, found.reuse_errors[:, own_heads, t], strict=True):
                nothing = torch.full((len(errors),), torch.nan)
                expected = squared_error(full[t], wanted[kind]) if kind in wanted else nothing
                torch.testing.assert_close(
                    torch.from_numpy(errors).double(), expected.double(), rtol=1e-3, atol=1e-9, equal_nan=True
                )
            for s, q in enumerate(column):
                assert found.step_similarity[place, t, s] == pytest.approx(
                    cosine(p.image[:, count], q.image[:, count]), abs=1e-5
                )
            if guided:
                assert found.branch_similarity[place, t] == pytest.approx(cosine(*p.image.chunk(2)), abs=1e-5)
    assert found.guided == guided
    assert guided or found.branch_similarity is None
    assert (sum(found.heads), found.steps, found.radius, found.tokens.visual) == (first, STEPS, radius, bench.visual)


def test_by_default_the_middle_is_mapped_and_a_window_is_an_eighth(either):
    found = ah.analyze(either.pipe, either.inputs(steps=5), progress=False)
    assert (found.attention_map.site, found.attention_map.step, found.attention_map.heads) == (1, 2, (0,))
    assert found.radius == 2
    path = found.sites[2]
    assert ah.analyze(either.pipe, either.inputs(), only=["map"], site=path, progress=False).attention_map.site == 2


def test_where_sites_see_one_frame_so_does_the_window():
    bench = latte()  # 3 frames of 4 × 3 tokens
    found = ah.analyze(bench.pipe, bench.inputs(), only=["locality"], progress=False)
    assert (found.radius, found.tokens) == (1, Tokens.of_grid(1, 4, 3))
    assert found.band_mass.max() < 1
    with pytest.raises(InputsInvalid, match="covers all of 12"):
        ah.analyze(bench.pipe, bench.inputs(), radius=11, progress=False)


@pytest.mark.parametrize("part", measure.PARTS)
def test_only_what_is_asked_for_is_there(part):
    arrays = {
        "map": {"attention_map"},
        "reuse": {"reuse_errors"},
        "steps": {"step_similarity"},
        "branches": {"branch_similarity"},
        "locality": {"band_mass", "text_mass"},
    }
    bench = dit()
    whole = ah.analyze(bench.pipe, bench.inputs(), progress=False).arrays
    found = ah.analyze(bench.pipe, bench.inputs(), only=[part], progress=False).arrays
    assert {*found} == arrays[part]
    assert all(np.array_equal(array, whole[name], equal_nan=True) for name, array in found.items())


@pytest.mark.parametrize("name", ["dit", "sd3", "flux"])
def test_nothing_else_changes(name):
    bench = BENCHES[name]()
    with left_as_it_was(bench):
        ah.analyze(bench.pipe, bench.inputs(), progress=False)
        with pytest.raises(InputsInvalid, match="step=9"):
            ah.analyze(bench.pipe, bench.inputs(), step=9, progress=False)


def test_half_precision_says_the_same():
    fine, coarse = dit(torch.float32), dit(torch.bfloat16)
    a, b = (ah.analyze(bench.pipe, bench.inputs(images=2), progress=False).arrays for bench in (fine, coarse))
    for name in ("step_similarity", "branch_similarity", "band_mass"):
        assert a[name].dtype == b[name].dtype == np.float32
        np.testing.assert_allclose(a[name], b[name], atol=0.1)
        assert not np.array_equal(a[name], b[name])


@contextmanager
def passes_of(bench):
    """How often the first site is passed within the block."""
    passes = []
    hook = bench.attentions[0].register_forward_hook(lambda *_: passes.append(1))
    yield passes
    hook.remove()


@pytest.mark.parametrize("name", ["dit", "flux"])
@pytest.mark.parametrize(
    ("asked", "said", "late"),
    [
        ({"site": 9}, "site=9, wanted a number from 0 to 2", False),
        ({"site": -1}, "site=-1", False),
        ({"site": True}, "site=True", False),
        ({"site": "transformer_blocks.7.attn1"}, "or a path such as", False),
        ({"heads": (0, 3)}, "from 0 to 2", False),
        ({"heads": ()}, "heads=", False),
        ({"heads": 1}, "heads=1, wanted some", False),
        ({"step": 5}, "step=5 in a run of 5", True),
        ({"step": -1}, "step=-1", False),
        ({"radius": 15}, "covers all of 16", True),
        ({"radius": -1}, "radius=-1", False),
        ({"radius": 1.5}, "radius=1.5", False),
        ({"sampled": 0}, "sampled=0", False),
        ({"only": ["maps"]}, "map, reuse, steps, branches, locality", False),
        ({"only": "map"}, "only='map'", False),
        ({"only": []}, "only=", False),
        ({"only": ["branches"], "guidance": 1.0}, "without guidance", False),
        ({"steps": 1}, "two or more to compare", True),
        ({"colour": "red"}, "colour", False),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(name, asked, said, late):
    """What is `late` needs to know how many tokens and steps there are."""
    bench = BENCHES[name]()
    ours = {"site", "heads", "step", "radius", "sampled", "only"}
    inputs = bench.inputs(**{key: value for key, value in asked.items() if key not in ours})
    given = {key: value for key, value in asked.items() if key in ours}
    with passes_of(bench) as passes, pytest.raises(InputsInvalid, match=said):
        ah.analyze(bench.pipe, inputs, **given, progress=False)
    assert len(passes) == (late and name == "flux")  # the first of two calls runs once, to stand in for what is not known yet


def test_one_step_can_be_mapped():
    bench = dit()
    found = ah.analyze(bench.pipe, bench.inputs(steps=1), only=["map", "branches"], progress=False)
    assert (found.steps, found.attention_map.step) == (1, 0)


def test_a_pipeline_with_a_plan_is_refused():
    bench = dit()
    plan = ah.search(bench.pipe, bench.inputs(), threshold=0, progress=False)
    assert {cell for row in plan.cells for cell in row} == {FULL}
    with ah.applied(bench.pipe, plan), pytest.raises(AlreadyApplied):
        ah.analyze(bench.pipe, bench.inputs(), progress=False)


@pytest.mark.parametrize("only", [None, ["branches"], ["map", "reuse"]], ids=str)
def test_what_is_saved_is_what_is_loaded(only, tmp_path):
    bench = sd3()
    found = ah.analyze(bench.pipe, bench.inputs(), only=only, progress=False)
    found.save(tmp_path / "a.other")
    loaded = ah.Analysis.load(tmp_path / "a.other")
    for f in fields(found):
        a, b = getattr(found, f.name), getattr(loaded, f.name)
        if f.name == "attention_map" and a is not None:
            assert replace(a, weights=0) == replace(b, weights=0)
            a, b = a.weights, b.weights
        np.testing.assert_equal(b, a)
    assert loaded.about["inputs"]["num_inference_steps"] == 5
    assert loaded.as_dict() == found.as_dict()


def test_other_files_are_no_analyses(tmp_path):
    bench = dit()
    found = ah.analyze(bench.pipe, bench.inputs(), progress=False)
    (tmp_path / "text").write_text("no zip")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    found.save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file.items())
    np.savez(tmp_path / "shape.npz", **arrays | {"band_mass": arrays["band_mass"][:, :2]})
    np.savez(tmp_path / "pickled.npz", **arrays | {"band_mass": np.array([object()])}, allow_pickle=True)
    for name in ("text", "other.npz", "half", "nowhere.npz", "shape.npz", "pickled.npz"):
        with pytest.raises(InputsInvalid, match=f"{name}.*wanted an npz"):
            ah.Analysis.load(tmp_path / name)
    with pytest.raises(InputsInvalid, match=r"band_mass of shape \(9, 2\) in float32, wanted \(9, 5\)"):
        replace(found, band_mass=found.band_mass[:, :2])
