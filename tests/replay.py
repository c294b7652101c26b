"""DiTFastAttn once more, from the formulas and by hand, to compare arrowhead with: nothing of its engine is used here.

A grid holds one word per step and one letter per layer:

    F full   C ASC   R AST   w WA   v WA+ASC   W WA-RS   V WA-RS+ASC      with radius `near`
    E the line               x WA   y WA+ASC   X WA-RS   Y WA-RS+ASC      with radius `far`
"""

import random
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from pipelines import Bench
from torch import Tensor

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import Arrow, Attend, Cell, Full, Reuse
from arrowhead.plans.layout import Tokens

Grid = Sequence[str]
HALVES, FULLS, RESIDUAL, REUSED = "CvVyY", "FC", "WVXY", "RDE"
GRIDS = {
    "AST": ["FFF", "RRR", "FFF", "RRR", "FFF"],
    "ASC": ["FFF", "CCC", "FCF", "CCC", "CFC"],
    "ASC from the start": ["CCC", "CCC", "RRR", "FFF", "CCC"],
    "WA-RS": ["FFF", "WWW", "XXX", "WXW", "XWX"],
    "WA": ["FFF", "www", "xxx", "wxw", "vyv"],
    "WA from the start": ["wxw", "RRR", "vyv", "RRR", "RRR"],
    "WA-RS + ASC": ["FFF", "VVV", "YYY", "VYV", "YVY"],
    "both branches read a residual, then one": ["FFF", "WWW", "VVV", "XXX", "YYY"],
    "one branch reads a residual, then both": ["FFF", "VVV", "WWW", "YYY", "XXX"],
    "ASC makes the residual for both": ["CCC", "WWW", "CCC", "XXX", "VVV"],
    "a chain of AST over WA-RS": ["FFF", "WWW", "RRR", "RRR", "RRR"],
    "a chain of AST over WA-RS + ASC": ["FFF", "VVV", "RRR", "RRR", "WWW"],
    "AST over AST over full": ["FFF", "RRR", "RRR", "WWW", "RRR"],
    "a residual outlives AST and WA": ["FFF", "RRR", "www", "RRR", "WWW"],
    "full again": ["FFF", "WWW", "FFF", "WWW", "VVV"],
    "one layer, the others full": ["FFF", "FWF", "FRF", "FVF", "FRF"],
    "two radii from one full step": ["FFF", "WXW", "XWX", "VYV", "YVY"],
    "a line through full outputs": ["FFF", "FFF", "EEE", "EEE", "EEE"],
    "a line through ASC": ["CCC", "CCC", "EEE", "EEE", "FFF"],
    "a line from full to ASC": ["FFF", "FFF", "CCC", "EEE", "EEE"],
    "a line from ASC to full": ["FFF", "CCC", "FFF", "EEE", "EEE"],
    "a line over WA-RS": ["FFF", "WXV", "EEE", "VYW", "EEE"],
    "a line over WA": ["wxv", "vyw", "EEE", "xwF", "EEE"],
    "lines among AST, and new ones": ["FFF", "CWF", "ERE", "FVw", "RER"],
    "AST after a line, and a line after AST": ["FFC", "RFC", "WEE", "ERE", "RER"],
    "a line through steps far apart": ["FFF", "RRR", "RRR", "WFC", "EEE"],
}
FAULTS = {  # what may go wrong, and a grid that shows it
    "output stale": ["FFF", "WWW", "RRR", "RRR"],
    "residual stale": ["FFF", "WWW", "FFF", "WWW"],
    "residual left out": ["FFF", "WXW", "YVY", "RRR"],
    "ASC makes no residual": ["FFF", "CCC", "WXW", "VYV"],
    "unconditional computed": ["FFF", "CCC", "vyv", "RRR"],
    "unconditional residual": ["FFF", "VYV", "WWW", "VVY"],
    "slope stale": ["FFF", "FFF", "EEE", "FFF", "EEE"],
    "a step on, however late": ["FFF", "FFF", "EEE", "EEE"],
    "as if computed in a row": ["FFF", "RRR", "FFF", "EEE"],
    "a line for each branch": ["FFF", "CvV", "EEE", "EEE"],
    "the unconditional line": ["FFF", "CvV", "EEE", "EEE"],
    "all of the slope": ["FFF", "FFF", "DDD", "FFF", "RRR"],
}
SLOPES = {"R": 0.0, "D": 0.3, "E": 1.0}
NAMES = {"F": "full", "C": "ASC", "R": "AST", "D": "extrapolate", "E": "extrapolate"} | dict(
    zip("wvWVxyXY", ["WA", "WA+ASC", "WA-RS", "WA-RS+ASC"] * 2, strict=True)
)


def random_grid(seed: int, steps: int, layers: int) -> list[str]:
    """Letters at random, none of which reads what no earlier step made."""
    draw = random.Random(seed)
    columns = []
    for _ in range(layers):
        column = ""
        for _ in range(steps):
            full, computed = any(letter in FULLS for letter in column), sum(letter not in REUSED for letter in column)
            earlier = ("RR" if column else "") + ("RWVXYWVXY" if full else "") + ("DEE" if computed > 1 else "")
            column += draw.choice("FCwvxy" + earlier)
        columns.append(column)
    return ["".join(row) for row in zip(*columns, strict=True)]


def rows_held(column: Sequence[str], step: int, halves: Container[str]) -> int:
    """Of how many samples an image's module outputs, and changes of these, are read after a step. `halves` share CFG."""
    steps = range(len(column))
    computed = [i for i in steps if column[i] not in REUSED]
    last, following = (max(i for i in computed if i <= step), min((i for i in computed if i > step), default=len(steps)))
    behind = column[following + 1 : min((i for i in computed if i > following), default=len(steps))]
    output = step + 1 < following or on_line(behind)  # repeated, or the beginning of the next line
    slope = on_line(column[step + 1 : following])
    return (output + slope) * (1 if column[last] in halves else 2)


def on_line(letters: Sequence[str]) -> bool:
    """Whether one of them continues a line."""
    return any(SLOPES.get(letter) for letter in letters)


def cell(letter: str, near: int, far: int) -> Cell:
    """The letter as arrowhead spells it."""
    if letter in REUSED:
        return Reuse(SLOPES[letter])
    if letter in FULLS:
        return Attend(Full(), share_cfg=letter == "C")
    return Attend(Arrow(near if letter in "wvWV" else far, residual=letter in RESIDUAL), share_cfg=letter in HALVES)


def plan(bench: Bench, grid: Grid, near: int = 2, far: int = 5, guided: bool = True, visual: int | None = None) -> ah.Plan:
    cells = tuple(tuple(cell(letter, near, far) for letter in row) for row in grid)
    return ah.Plan(cells, target_of(find(bench.pipe)), Tokens(visual or bench.visual, bench.text), guided)


@dataclass
class Trace:
    """One generation: what the pipeline gave, and what its transformer gave in each step."""

    result: Tensor
    outputs: list[Tensor] = field(default_factory=list)


def trace(bench: Bench, inputs: dict[str, Any]) -> Trace:
    """Generate, and write down each output of the transformer."""
    outputs: list[Tensor] = []
    both = (bench.pipe.transformer, getattr(bench.pipe, "transformer_2", None))
    hooks = [t.register_forward_hook(lambda _m, _a, out: outputs.append(_whole(out[0]))) for t in both if t is not None]
    try:
        images = bench.pipe(**inputs)[0]
        return Trace(torch.cat(images) if isinstance(images, list) else images.clone(), outputs)
    finally:
        for hook in hooks:
            hook.remove()


def _whole(output: Tensor | list[Tensor]) -> Tensor:
    """A copy; of a list as one batch."""
    return torch.stack(output) if isinstance(output, list) else output.clone()


def compressed(bench: Bench, the_plan: ah.Plan, inputs: dict[str, Any], **settings: Any) -> Trace:
    """Generate with arrowhead."""
    with ah.applied(bench.pipe, the_plan, **settings):
        return trace(bench, inputs)


@dataclass(frozen=True)
class Computed:
    """What a layer gave in a step in which it was computed, (B, N, C), perhaps for the conditional branch alone."""

    step: int
    out: Tensor
    shared: bool


@dataclass
class Memory:
    """One run of the formulas: the step, and of every layer the outputs computed and the last full step's residuals."""

    bench: Bench
    near: int
    far: int
    guided: bool = True
    fault: str | None = None  # one of FAULTS
    step: int = -1
    row: str = ""
    frozen: bool = False
    outputs: dict[int, list[Computed]] = field(default_factory=dict)  # of each layer
    residuals: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # layer, radius: (B, H, N, D)

    def half(self, batch: int, conditional: bool = True) -> slice:
        """The rows of one branch."""
        first = self.bench.conditional_first == conditional
        return slice(0, batch // 2) if first else slice(batch // 2, batch)

    def module(self, layer: int, attn: Any, x: Tensor) -> Tensor:
        """What the attention module of a layer gives for x, (B, N, C)."""
        letter = self.row[layer]
        if letter == "R":
            return self.outputs[layer][-1].out
        if letter in REUSED:
            return self.line(self.outputs[layer], SLOPES[letter])
        shared = letter in HALVES and self.guided
        rows = self.half(len(x), self.fault != "unconditional computed") if shared else slice(None)
        q, k, v = (
            linear(x[rows]).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )  # (b, H, N, D)
        if letter in FULLS:
            heads = softmax_attention(q, k, v, radius=x.shape[1])
            made = {radius: heads - softmax_attention(q, k, v, radius) for radius in (self.near, self.far)}
            stale = (self.fault == "residual stale" and self.step) or (self.fault == "ASC makes no residual" and letter == "C")
            for radius, residual in made.items():
                if not self.frozen and not stale:
                    self.residuals[layer, radius] = torch.cat([residual] * 2) if shared else residual
        else:
            radius = self.near if letter in "wvWV" else self.far
            heads = softmax_attention(q, k, v, radius)
            if letter in RESIDUAL and self.fault != "residual left out":
                kept = self.half(len(x), self.fault != "unconditional residual") if shared else slice(None)
                heads = heads + self.residuals[layer, radius][kept]
        out = attn.to_out[0](heads.transpose(1, 2).flatten(2))  # (b, N, C)
        if shared:
            out = torch.cat([out, out])
        if not self.frozen and not (self.fault == "output stale" and layer in self.outputs):
            self.outputs.setdefault(layer, []).append(Computed(self.step, out, shared))
        return out

    def line(self, computed: Sequence["Computed"], slope: float) -> Tensor:
        """What the line through the last two outputs is at this step, with so much of its slope."""
        b, a = computed[-2:]
        change, steps, lag = a.out - b.out, a.step - b.step, self.step - a.step
        if self.fault == "slope stale":
            change = computed[1].out - computed[0].out
        if self.fault == "a step on, however late":
            lag = 1
        if self.fault == "as if computed in a row":
            steps = 1
        if self.fault == "all of the slope":
            slope = 1.0
        out = a.out + slope * change * lag / steps
        if a.shared and self.fault != "a line for each branch":
            out = torch.cat([out[self.half(len(out), self.fault != "the unconditional line")]] * 2)
        return out


@cache
def seen(n: int, radius: int) -> Tensor:
    """Which of n tokens each one sees, (N, N)."""
    return torch.tensor([[abs(i - j) <= radius for j in range(n)] for i in range(n)])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, radius: int) -> Tensor:
    """softmax(q kᵀ / √D) v over the pairs with |i − j| ≤ radius, entry by entry of the definition."""
    n, d = q.shape[-2:]
    weights = torch.einsum("bhid,bhjd->bhij", q, k).div(d**0.5).exp() * seen(n, radius)  # (B, H, N, N)
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v)


class Processor:
    """An attention processor that asks a memory."""

    def __init__(self, layer: int, memory: Memory) -> None:
        self.layer, self.memory = layer, memory

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        assert encoder_hidden_states is None
        assert attention_mask is None
        return self.memory.module(self.layer, attn, hidden_states)


@contextmanager
def processors(bench: Bench, own: Sequence[Any]) -> Iterator[None]:
    """Other processors in place of the pipeline's."""
    before = [attn.processor for attn in bench.attentions]
    for attn, processor in zip(bench.attentions, own, strict=True):
        attn.processor = processor
    try:
        yield
    finally:
        for attn, processor in zip(bench.attentions, before, strict=True):
            attn.processor = processor


def remembering(memory: Memory) -> AbstractContextManager[None]:
    """The memory's processors in place of the pipeline's."""
    return processors(memory.bench, [Processor(layer, memory) for layer in range(memory.bench.layers)])


def replay(
    bench: Bench,
    grid: Grid,
    inputs: dict[str, Any],
    near: int = 2,
    far: int = 5,
    guided: bool = True,
    fault: str | None = None,
) -> Trace:
    """Generate by the formulas, or with one fault in them."""
    memory = Memory(bench, near, far, guided, fault)

    def tick(*_: Any) -> None:
        memory.step += 1
        memory.row = grid[memory.step]

    hook = bench.pipe.transformer.register_forward_pre_hook(tick)
    try:
        with remembering(memory):
            return trace(bench, inputs)
    finally:
        hook.remove()


def assert_same(got: Trace, wanted: Trace, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    assert len(got.outputs) == len(wanted.outputs)
    for step, (a, b) in enumerate(zip(got.outputs, wanted.outputs, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, step=step: f"step {step}: {text}")
    torch.testing.assert_close(got.result, wanted.result, rtol=rtol, atol=atol)


def assert_identical(got: Trace, wanted: Trace) -> None:
    assert len(got.outputs) == len(wanted.outputs)
    assert all(torch.equal(a, b) for a, b in zip(got.outputs, wanted.outputs, strict=True))
    assert torch.equal(got.result, wanted.result)


def distance(a: Trace, b: Trace) -> float:
    """How far two generations are apart, relative to their size: in the result or in any step, whatever is more."""
    pairs = [*zip(a.outputs, b.outputs, strict=True), (a.result, b.result)]
    return max(((x - y).norm() / y.norm()).item() for x, y in pairs)
