"""FLOPs that others count: torch's counter, and the pairs of every call of torch's operators, against the closed forms."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import dit
from replay import plan, trace
from test_kernels import random_qkv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import arrowhead as ah
from arrowhead.kernels import dispatch
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.computed_pairs import computed_pairs, way_of
from arrowhead.plans import masks
from arrowhead.plans.cells import Box
from arrowhead.plans.flops import full_flops
from arrowhead.plans.layout import Tokens

DIM = 8


class Multiplied(TorchDispatchMode):
    """Pairs of queries and keys in every attention operator, and in products of Q and Kᵀ, whose second has D rows."""

    def __init__(self):
        super().__init__()
        self.pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("aten._scaled_dot_product_flash_attention_for_cpu"):
            self.pairs += args[0].shape[:-1].numel() * args[1].shape[-2]
        elif name.startswith("aten.bmm") and args[0].shape[-1] == DIM:
            self.pairs += args[0].shape[:-1].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.sampled_from(["chunked", "chunked", "reference"]),
    visual=st.integers(1, 500),
    text=st.sampled_from([0, 1, 30]),
    radii=st.lists(st.none() | st.integers(0, 300), min_size=1, max_size=3),
    masked=st.booleans(),
    tracked=st.booleans(),
)
def test_every_call_of_torch_is_counted(kernel, visual, text, radii, masked, tracked):
    tokens = Tokens(visual, text)
    q, k, v = random_qkv(tokens, 2, len(radii), DIM)
    q.requires_grad_(tracked)
    mask = torch.rand(1, 1, 1, tokens.total) < 0.9 if masked else None
    call = Call(q, k, v, tokens, tuple(map(Policy, radii)), 1.0, mask)
    with Multiplied() as multiplied:
        dispatch.attend(call, kernel)
    with FlopCounterMode(display=False) as counter:
        dispatch.attend(call, kernel)
    wanted = 2 * sum(computed_pairs(way_of(kernel, call), tokens, radius) for radius in radii)
    assert multiplied.pairs == wanted
    assert counter.get_total_flops() == 4 * DIM * wanted
    assert wanted >= 2 * sum(masks.pairs(tokens, radius) for radius in radii)


@pytest.mark.parametrize("box", [Box(1, 4, 3), Box(rows=0), Box(0, 5)])
def test_boxes_compute_what_they_keep(box):
    tokens = Tokens.of_grid(3, 13, 10, text=6)
    call = Call(*random_qkv(tokens, 1, 2, DIM), tokens, (Policy(box),) * 2, 1.0)
    with FlopCounterMode(display=False) as counter:
        dispatch.attend(call, "chunked")
    wanted = 2 * computed_pairs(way_of("chunked", call), tokens, box)
    assert counter.get_total_flops() == 4 * DIM * wanted == 4 * DIM * 2 * masks.pairs(tokens, box)


@pytest.mark.parametrize(("visual", "text", "radius"), [(300, 0, 20), (300, 7, 130), (513, 40, 0), (100, 3, 5)])
def test_blocks_of_flex_attention(visual, text, radius):
    """By every pair of blocks: those are computed in which some pair is kept."""
    tokens = Tokens(visual, text)
    kept = masks.arrow(tokens, radius)
    blocks = [part for rows in kept.split(128) for part in rows.split(128, 1) if part.any()]
    assert computed_pairs(("flex", 0, 0), tokens, radius) == sum(part.numel() for part in blocks)


@contextmanager
def tiles_seen(monkeypatch):
    """The shapes of all products that Triton's interpreter computes."""
    from triton.runtime import interpreter

    seen, create_dot = [], interpreter.InterpreterBuilder.create_dot

    def counted(self, a, b, *args):
        seen.append((a.data.shape[0], a.data.shape[1], b.data.shape[1]))
        return create_dot(self, a, b, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    yield seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what Triton's interpreter does")
@pytest.mark.parametrize(("visual", "text", "radius"), [(256, 0, 20), (256, 64, 100), (384, 0, 0), (256, 0, None)])
def test_tiles_of_the_fused_kernel(visual, text, radius, monkeypatch):
    """Where tiles end with the sequence, and with the text."""
    tokens = Tokens(visual, text)
    call = Call(*random_qkv(tokens, 1, 2, 64), tokens, (Policy(radius),) * 2, 1.0)
    with tiles_seen(monkeypatch) as seen:
        dispatch.attend(call, "fused")
    queries, keys = way_of("fused", call)[1:]
    assert {rows for rows, _, _ in seen} == {queries}
    pairs = sum(rows * columns for rows, inner, columns in seen) / 2  # Q·Kᵀ, and weights times V: as many of the same size
    assert keys == 64
    assert pairs == 2 * computed_pairs(way_of("fused", call), tokens, radius)


def test_a_summary_says_what_was_kept_and_what_was_computed(monkeypatch):
    """By the pairs of the transformer's calls, with and without the plan."""
    bench = dit()
    the_plan, forward = plan(bench, ["FFF", "WXV", "REW", "CwR", "VYE"]), bench.pipe.transformer.forward

    def multiplied():
        pairs = 0

        def counting(*args, **kwargs):
            nonlocal pairs
            with Multiplied() as mode:
                out = forward(*args, **kwargs)
            pairs += mode.pairs
            return out

        with monkeypatch.context() as patch:
            patch.setattr(bench.pipe.transformer, "forward", counting)
            trace(bench, bench.inputs())
        return pairs

    raw = multiplied()
    with ah.applied(bench.pipe, the_plan) as run:
        spent = multiplied()
    summary = run.summary()
    assert summary.computed.attention == pytest.approx(spent / raw)
    assert summary.flops.attention == pytest.approx(the_plan.flops().attention)
    assert summary.computed.attention > summary.flops.attention
    saved = summary.flops.attention - summary.computed.attention
    whole = full_flops(the_plan.target.sites, the_plan.tokens, 2)
    assert summary.flops.module - summary.computed.module == pytest.approx(saved * whole.attention / whole.module)
    assert f"computed       attention {summary.computed.attention:.1%}" in str(summary)


@pytest.mark.parametrize("first", ["import arrowhead", "import torch.utils.flop_counter"])
def test_the_counter_knows_attention_in_any_order_of_imports(first):
    code = f"""
import sys
{first}
assert ("torch.utils.flop_counter" in sys.modules) == ("flop_counter" in {first!r})
import torch, arrowhead
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 2, 30, 8)
with FlopCounterMode(display=False) as counter:
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
assert counter.get_total_flops() == 4 * 2 * 30 * 30 * 8
"""
    subprocess.run([sys.executable, "-c", code], check=True)
