"""Cross-attention and whole blocks as sites of a plan, against forwards replaced by hand."""

from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from budget import flux, tokens_of
from pipelines import BENCHES, CAPTION, JOINT
from replay import assert_identical, assert_same, compressed, distance, trace
from test_feed_forward import CELLS, random_rows
from torch.utils.flop_counter import FlopCounterMode
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import NotIntercepted, PlanInvalid, PlanMismatch
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import AST, FULL, Attend, Cached, wa_rs
from arrowhead.plans.layout import Tokens
from arrowhead.plans.plan import Plan

WHERE = {
    **{f"cross_attention of {name}": ("cross_attention", BENCHES[name]) for name in BENCHES if "pixart" in name},
    **{f"block of {name}": ("block", make) for name, make in {**BENCHES, **JOINT, "flux": flux}.items()},
}
STEPS = 5


@pytest.fixture(params=WHERE)
def kind_and_bench(request):
    kind, make = WHERE[request.param]
    return kind, make()


def tokens(bench):
    return Tokens(bench.visual, CAPTION[0]) if "PixArt" in type(bench.pipe).__name__ else tokens_of(bench)


def plan_of(kind, bench, rows, guided=True):
    target, calls = target_of(find(bench.pipe, {kind})), 2 if guided and type(bench.pipe).__name__ == "FluxPipeline" else 1
    return Plan(tuple(tuple(map(CELLS.get, row)) for row in rows), target, tokens(bench), guided, calls=calls)


def modules(kind, bench):
    return [bench.pipe.transformer.get_submodule(site.path) for site in find(bench.pipe, {kind}).sites]


def rows_of(kind, bench, seed, lines=True):
    """Without lines where a step has two calls."""
    rows = random_rows(seed, STEPS, len(modules(kind, bench)))
    return rows if lines else [row.replace("E", "R") for row in rows]


@contextmanager
def by_hand(kind, bench, rows, calls, reaching=False):
    """Forwards that do what the letters say, and know nothing of arrowhead; a block's changes are what is repeated.

    `reaching`: a module that repeats runs all the same, so that what lies within it is called, and its output is not used.
    """
    count, last = Counter(), defaultdict(list)

    def conditional(x):
        return x.chunk(2)[not bench.conditional_first]

    def own_part(value, batch):
        return conditional(value) if torch.is_tensor(value) and value.shape[0] == batch else value

    def each(change, *values):
        if isinstance(values[0], tuple):
            return tuple(None if parts[0] is None else change(*parts) for parts in zip(*values, strict=True))
        return change(*values)

    def forward_of(place, module):
        own = type(module).forward

        def forward(hidden_states, *args, **kwargs):
            call, now = count[place] % calls, count[place] // calls
            count[place] += 1
            letter, memory = rows[now][place], last[place, call]
            text = kwargs.get("encoder_hidden_states", args[0] if args else None)

            def base(like):
                if kind != "block":
                    return each(torch.zeros_like, like)
                return (None if like[0] is None else text, hidden_states) if isinstance(like, tuple) else hidden_states

            if letter == "F" or (letter == "C" and calls == 2 and call == 0):
                out = own(module, hidden_states, *args, **kwargs)
                memory.append((now, letter, each(torch.sub, out, base(out))))
                if letter == "C":
                    last[place, 1].append(memory[-1])
                return out
            if letter == "C" and calls == 1:
                part = partial(own_part, batch=len(hidden_states))
                out = own(module, part(hidden_states), *map(part, args), **{k: part(v) for k, v in kwargs.items()})
                change = each(lambda a, b: torch.cat([a - conditional(b)] * 2), out, base(out))
                memory.append((now, letter, change))
            if reaching:
                own(module, hidden_states, *args, **kwargs)
            change = memory[-1][-1]
            if letter == "E":
                (b, _, before), (a, shared, after) = memory[-2:]
                change = each(lambda x, y: (y * (now - b) - x * (now - a)) / (a - b), before, after)
                change = each(lambda x: torch.cat([conditional(x)] * 2), change) if shared == "C" else change
            return each(torch.add, change, base(change))

        return forward

    for place, module in enumerate(modules(kind, bench)):
        module.forward = forward_of(place, module)
    try:
        yield
    finally:
        for module in modules(kind, bench):
            del module.forward


@pytest.mark.parametrize("seed", range(3))
def test_cells_of_modules(kind_and_bench, seed):
    kind, bench = kind_and_bench
    calls = plan_of(kind, bench, rows_of(kind, bench, 0, lines=False)).calls
    rows, inputs = rows_of(kind, bench, seed, lines=calls == 1), {"seed": seed, "images": 2}
    got = compressed(bench, plan_of(kind, bench, rows), bench.inputs(**inputs))
    with by_hand(kind, bench, rows, calls):
        wanted = trace(bench, bench.inputs(**inputs))
    assert_same(got, wanted)
    assert distance(got, trace(bench, bench.inputs(**inputs))) > 0.01


def test_full_plans_change_nothing(kind_and_bench):
    kind, bench = kind_and_bench
    raw = trace(bench, bench.inputs())
    with left_as_it_was(bench):
        got = compressed(bench, plan_of(kind, bench, ["F" * len(modules(kind, bench))] * STEPS), bench.inputs())
    assert_identical(got, raw)
    assert not any("forward" in vars(module) for module in bench.pipe.transformer.modules())


def test_what_is_counted_is_what_is_multiplied(kind_and_bench, monkeypatch):
    """What torch counts, attention by its shapes, falls by what the plan says; a block's modulation is not counted."""
    kind, bench = kind_and_bench
    rows, own, multiplied = rows_of(kind, bench, 3, lines=False), torch.nn.functional.scaled_dot_product_attention, [0]

    def attention(query, key, value, *args, **kwargs):
        multiplied[-1] += 4 * query.numel() * key.shape[2]
        return own(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)

    def counted():
        multiplied.append(0)
        with FlopCounterMode(display=False) as counter:
            bench.pipe(**bench.inputs())
        return multiplied[-1] + sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    the_plan = plan_of(kind, bench, rows)
    raw = counted()
    with ah.applied(bench.pipe, the_plan) as run:
        saved = raw - counted()
    whole = 0
    for site, module in zip(the_plan.target.sites, modules(kind, bench), strict=True):
        halves = sum({"F": 0, "C": 1, "R": 2}[row[the_plan.target.sites.index(site)]] for row in rows)
        once = [m for name, m in module.named_modules() if name.startswith("norm") and isinstance(m, torch.nn.Linear)]
        saved -= halves * 2 * sum(m.weight.numel() for m in once)
        whole += 2 * STEPS * flops_alone(bench, site, module, once)
    assert saved / whole == pytest.approx(1 - the_plan.flops().module)
    assert run.summary().flops.module == pytest.approx(the_plan.flops().module)
    assert run.summary().flops.attention == pytest.approx(the_plan.flops().attention)


def flops_alone(bench, site, module, once):
    """Of one sample: every linear layer with its tokens, and every attention with its pairs."""
    text, visual, found = CAPTION[0], bench.visual, 0
    for name, layer in module.named_modules():
        path = f"{site.path}.{name}" if name else site.path
        if isinstance(layer, torch.nn.Linear) and layer not in once:
            crossed = not bench.text and ("attn2.to_k" in path or "attn2.to_v" in path)
            of_text = crossed or "context" in path or "add_" in path
            rows = text if of_text else visual + text if "single" in path else visual
            found += 2 * rows * layer.weight.numel()
        if hasattr(layer, "to_q"):
            joint = getattr(layer, "add_q_proj", None) is not None or "single" in path
            pairs = visual * text if "attn2" in path and not bench.text else (visual + text * joint) ** 2
            found += 4 * pairs * layer.to_q.out_features
    return found


def test_caches_hold_what_the_plan_says(kind_and_bench):
    kind, bench = kind_and_bench
    lines = type(bench.pipe).__name__ != "FluxPipeline"
    the_plan = plan_of(kind, bench, rows_of(kind, bench, 5, lines))
    with ah.applied(bench.pipe, the_plan) as run:
        bench.pipe(**bench.inputs(images=2))
        assert run.cache_bytes == 0
    assert run.summary().peak_cache_bytes == max(the_plan.cache_bytes(images=2, itemsize=8))


def test_a_plan_with_modules_is_saved_and_read(kind_and_bench, tmp_path):
    kind, bench = kind_and_bench
    the_plan = plan_of(kind, bench, rows_of(kind, bench, 1, lines=False))
    the_plan.save(tmp_path / "plan.json")
    assert ah.Plan.load(tmp_path / "plan.json") == the_plan
    assert not the_plan.count_heads()


def test_a_block_and_what_lies_within_it_is_one_too_many():
    bench = BENCHES["dit"]()
    target = target_of(find(bench.pipe, {"block", "feed_forward"}))
    with pytest.raises(PlanInvalid, match=r"transformer_blocks\.0\.ff and the block.*wanted one of the two"):
        Plan(((FULL,) * len(target.sites),), target, tokens(bench), guided=True)


@pytest.mark.parametrize("cell", [wa_rs(2), Attend(Cached())], ids=["arrow", "cached"])
def test_modules_have_no_heads(kind_and_bench, cell):
    kind, bench = kind_and_bench
    the_plan = plan_of(kind, bench, ["F" * len(modules(kind, bench))] * 2)
    with pytest.raises(PlanInvalid, match=f"a {kind} has no heads"):
        Plan((the_plan.cells[0], (cell, *the_plan.cells[1][1:])), the_plan.target, the_plan.tokens, guided=True)


def test_a_block_beside_what_lies_within_another():
    """Of two blocks the first as a whole, of the second the attention alone; anything that is left out is refused."""
    bench = BENCHES["dit"](num_layers=2)
    found = find(bench.pipe, {"block", "self_attention"})
    paths = ("transformer_blocks.0", "transformer_blocks.1.attn1")
    target = target_of(found.filtered(lambda site: site.path in paths))
    cells = ((FULL, FULL), (AST, FULL), (FULL, AST), (AST, AST), (FULL, FULL))
    got = compressed(bench, Plan(cells, target, tokens(bench), guided=True), bench.inputs(images=2))
    alone = Plan(
        tuple(zip(*[[FULL] * 5, [row[1] for row in cells]], strict=True)), target_of(find(bench.pipe)), tokens(bench), True
    )
    skipping = ["FF", "RF", "FF", "RF", "FF"]
    with by_hand("block", bench, skipping, 1, reaching=True):
        wanted = compressed(bench, alone, bench.inputs(images=2))
    assert_same(got, wanted)
    with by_hand("block", bench, skipping, 1), pytest.raises(NotIntercepted, match=r"0\.attn1: got no call of it in 1 of .* 2"):
        compressed(bench, alone, bench.inputs(images=2))
    for missing in paths:
        left = target_of(found.filtered(lambda site, missing=missing: site.path in paths and site.path != missing))
        with pytest.raises(PlanMismatch, match="number of sites"):
            ah.apply(bench.pipe, Plan(((FULL,),) * 5, left, tokens(bench), guided=True))
