"""Plans whose heads differ, replayed from the formulas: nothing of arrowhead's engine is used here.

A grid holds one line per step and one word per site. A word has a letter for each head, or is repeated over the heads:

    F full   K cached   w WA   W WA-RS with radius `near`   x WA   X WA-RS with radius `far`

A + after it shares CFG. The word R reuses the site's last output, E continues the line through the last two that were
computed.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from pipelines import Bench
from replay import Trace, processors, trace
from torch import Tensor

import arrowhead as ah
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import Arrow, Attend, Cached, Cell, Full, Reuse
from arrowhead.plans.layout import Tokens

Grid = Sequence[str]
Output = Tensor | tuple[Tensor, Tensor]
NEAR, FAR = 2, 5
RADII = {"w": NEAR, "W": NEAR, "x": FAR, "X": FAR}
NAMES = {"F": "full", "K": "cached", "w": "WA", "x": "WA", "W": "WA-RS", "X": "WA-RS"}
REUSED = {"R": "AST", "E": "extrapolate", "D": "extrapolate"}
SLOPES = {"R": 0.0, "D": 0.3, "E": 1.0}
UNIFORM = {"C": "F+", "v": "w+", "V": "W+", "y": "x+", "Y": "X+"}  # V1's letters, see replay.py
FAULTS = {  # what may go wrong, and a grid that shows it
    "another head's output": ["F F F", "KFw FKw wFK", "xKF KxF FxK"],
    "the first output kept": ["F F F", "wFx FwF xxw", "R R R", "KKF FKK K"],
    "output without residual": ["F F F", "WXF FWX XFW", "KKF FKK KFK"],
    "unconditional output": ["F F F", "KFw+ wK+ K+"],
    "sharing rewrites outputs": ["F F F", "KFw+ wK+ K+", "KFw wK K"],
    "another head's residual": ["F F F", "WXF FWX XFW"],
    "the first residual kept": ["F F F", "WXF FWX XFW", "F F F", "WXF FWX XFW"],
    "residual left out": ["FwF wFF FFw", "WwX wXW XWw"],
    "unconditional residual": ["F F F", "WFX+ XW+ W+"],
    "unconditional computed": ["F+ F+ F+", "wFK+ Fx+ x+"],
    "unconditional line": ["F F F", "wFx+ F+ Kxw+", "E E E"],
    "heads in order of method": ["F F F", "wFx FwF xwF"],
}
TEXT_FAULTS = {
    "text columns cut off": ["F F F", "wFx FwF xwF"],
    "band over the text": ["F F F", "wFx FwF xwF"],
    "residual on the text": ["F F F", "WFX FWF XWF"],
    "reused text stale": ["F F F", "wFx FwF xwF", "R FwF FxF"],
    "text off the line": ["F F F", "wFx FwF xwF", "E FwF FxF"],
}


def methods(word: str, heads: int) -> str:
    """The letters of a word, one for each head."""
    letters = word.rstrip("+")
    return (letters * heads)[:heads]


def cell(word: str, heads: int, radii: dict[str, int]) -> Cell:
    """The word as arrowhead spells it."""
    if word in REUSED:
        return Reuse(SLOPES[word])
    spelt = {"F": Full(), "K": Cached()} | {a: Arrow(radius, residual=a in "WX") for a, radius in radii.items()}
    return Attend(tuple(spelt[letter] for letter in methods(word, heads)), share_cfg=word.endswith("+"))


def plan(bench: Bench, grid: Grid, guided: bool = True, radii: dict[str, int] = RADII) -> ah.Plan:
    heads = bench.attentions[0].heads
    cells = tuple(tuple(cell(word, heads, radii) for word in row.split()) for row in grid)
    return ah.Plan(cells, target_of(find(bench.pipe)), Tokens(bench.visual, bench.text), guided)


def uniform(grid: Sequence[str]) -> list[str]:
    """A grid of replay.py's in the words of this file."""
    return [" ".join(UNIFORM.get(letter, letter) for letter in row) for row in grid]


def unshared(grid: Grid) -> list[str]:
    """The grid with both branches computed everywhere."""
    return [row.replace("+", "") for row in grid]


def random_grid(seed: int, steps: int, bench: Bench, kinds: str = "FKwxWX", lines: bool = False) -> list[str]:
    """Words at random, none of which reads what no earlier step made; with `lines` some continue them."""
    draw = random.Random(seed)
    heads = bench.attentions[0].heads
    columns = []
    for _ in bench.attentions:
        column: list[str] = []
        for _ in range(steps):
            possible = [[a for a in kinds if can_follow(a, column, head)] for head in range(heads)]
            if lines and sum(word not in REUSED for word in column) > 1 and draw.random() < 0.25:
                column.append(draw.choice("DE"))
            elif column and draw.random() < 0.2:
                column.append("R")
            elif draw.random() < 0.2:
                column.append(draw.choice([a for a in possible[0] if all(a in p for p in possible)]))
            else:
                column.append("".join(map(draw.choice, possible)))
            column[-1] += "+" * (column[-1] not in REUSED and draw.random() < 0.35)
        columns.append(column)
    return [" ".join(row) for row in zip(*columns, strict=True)]


def can_follow(letter: str, column: Sequence[str], head: int) -> bool:
    """Whether a head has what the letter reads, after a site's words so far."""
    before = [methods(word, head + 1)[head] for word in column if word not in REUSED]
    if letter in "WX":
        return "F" in before
    return letter != "K" or any(other != "K" for other in before)


def counted(bench: Bench, grid: Grid) -> Counter[str]:
    """How many heads do what."""
    words = [(word, attn.heads) for row in grid for word, attn in zip(row.split(), bench.attentions, strict=True)]
    return Counter(
        name
        for word, heads in words
        for name in ([REUSED[word]] * heads if word in REUSED else map(NAMES.get, methods(word, heads)))
    )


@dataclass
class Past:
    """What a site has given so far, of both branches."""

    outputs: list[tuple[int, bool, tuple[Tensor, ...]]] = field(default_factory=list)  # step, shared, streams
    first_text: Tensor | None = None
    heads: dict[int, Tensor] = field(default_factory=dict)  # (B, N, D)
    residuals: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # head, radius: (B, V, D)


@dataclass
class Memory:
    """One run of the formulas, perhaps with a fault: the step's words, and the past of every site."""

    bench: Bench
    guided: bool
    radii: dict[str, int]
    fault: str | None
    row: Sequence[str] = ()
    step: int = -1
    past: dict[int, Past] = field(default_factory=dict)

    def half(self, batch: int, wrong: str) -> slice:
        """The conditional rows, or under the fault `wrong` the others."""
        first = self.bench.conditional_first == (self.fault != wrong)
        return slice(0, batch // 2) if first else slice(batch // 2, batch)

    def module(self, place: int, attn: Any, image: Tensor, text: Tensor | None) -> Output:
        """What a site gives for image (B, V, C) and text (B, T, C): both, or the image where it sees no text."""
        word, past = self.row[place], self.past.setdefault(place, Past())
        if word in REUSED:
            streams = past.outputs[-1][-1] if word == "R" else self._line(past, SLOPES[word])
            if self.fault == "reused text stale" and text is not None:
                return streams[0], past.first_text
            return streams[0] if text is None else streams
        shared = word.endswith("+") and self.guided
        rows = self.half(len(image), "unconditional computed") if shared else slice(None)
        q, k, v = projections(attn, image[rows], None if text is None else text[rows])  # (b, H, N, D)
        outs = {}
        for head, letter in enumerate(methods(word, attn.heads)):
            of_head = q[:, head], k[:, head], v[:, head]
            outs[head] = self._head(past, head, letter, of_head, image.shape[1], shared)
        if self.fault == "heads in order of method":
            outs = dict(enumerate(outs[head] for head in sorted(outs, key=lambda h: methods(word, attn.heads)[h])))
        out = torch.stack(list(outs.values()), 2).flatten(2)  # (b, N, H·D)
        seen_text = out[:, image.shape[1] :]
        streams = [attn.to_out[0](out[:, : image.shape[1]])]
        if text is not None:
            streams.append(seen_text if attn.context_pre_only else attn.to_add_out(seen_text))
        streams = [both(stream) if shared else stream for stream in streams]
        past.outputs.append((self.step, shared, tuple(streams)))
        past.first_text = streams[-1] if past.first_text is None else past.first_text
        return streams[0] if text is None else (streams[0], streams[1])

    def _line(self, past: Past, slope: float) -> tuple[Tensor, ...]:
        (b, _, before), (a, shared, after) = past.outputs[-2:]
        weight = slope * (self.step - a) / (a - b)
        streams = [now + weight * (now - then) for now, then in zip(after, before, strict=True)]
        if self.fault == "text off the line":
            streams[-1] = after[-1]
        if not shared:
            return tuple(streams)
        return tuple(both(stream[self.half(len(stream), "unconditional line")]) for stream in streams)

    def _head(
        self, past: Past, head: int, letter: str, qkv: tuple[Tensor, Tensor, Tensor], visual: int, shared: bool
    ) -> Tensor:
        """One head's output, (b, N, D), before the output projection."""
        fault, count = self.fault, len(past.heads)
        if letter == "K":
            kept = past.heads[(head + 1) % count if fault == "another head's output" else head]
            out = kept[self.half(len(kept), "unconditional output")] if shared else kept
            if fault == "sharing rewrites outputs" and shared:
                past.heads[head] = both(out)
            return out
        plain = out = attention(*qkv, visual, self.radii.get(letter), fault)
        if letter == "F":
            for radius in set(self.radii.values()):
                residual = (out - attention(*qkv, visual, radius, fault))[:, :visual]
                if fault != "the first residual kept" or (head, radius) not in past.residuals:
                    past.residuals[head, radius] = both(residual) if shared else residual
        if letter in "WX" and fault != "residual left out":
            kept = past.residuals[(head + 1) % count if fault == "another head's residual" else head, self.radii[letter]]
            added = kept[self.half(len(kept), "unconditional residual")] if shared else kept
            out = torch.cat([out[:, :visual] + added, out[:, visual:]], 1)
            if fault == "residual on the text":
                out[:, visual:] += added[:, : out.shape[1] - visual]
        if fault != "the first output kept" or head not in past.heads:
            stored = plain if fault == "output without residual" else out
            past.heads[head] = both(stored) if shared else stored
        return out


def both(half: Tensor) -> Tensor:
    """One branch's rows for both."""
    return torch.cat([half, half])


def projections(attn: Any, image: Tensor, text: Tensor | None) -> list[Tensor]:
    """Q, K and V of all tokens, the image's first, (B, H, N, D) each; Q and K are normalised where the model does so."""
    found = []
    for name in "qkv":
        linears = [(getattr(attn, f"to_{name}"), getattr(attn, f"norm_{name}", None), image)]
        if text is not None:
            linears.append((getattr(attn, f"add_{name}_proj"), getattr(attn, f"norm_added_{name}", None), text))
        streams = [linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for linear, _, x in linears]
        norms = [norm for _, norm, _ in linears]
        found.append(torch.cat([x if norm is None else norm(x) for x, norm in zip(streams, norms, strict=True)], 2))
    return found


@cache
def seen(n: int, visual: int, radius: int, fault: str | None) -> Tensor:
    """Which of n tokens, the visual ones first, each one sees: (N, N)."""

    def sees(i: int, j: int) -> bool:
        if max(i, j) < visual or fault == "band over the text":
            return abs(i - j) <= radius
        return fault != "text columns cut off" or i >= visual

    return torch.tensor([[sees(i, j) for j in range(n)] for i in range(n)])


def attention(q: Tensor, k: Tensor, v: Tensor, visual: int, radius: int | None, fault: str | None) -> Tensor:
    """softmax(q kᵀ / √D) v of one head, (B, N, D), over all pairs, or over the arrow's."""
    n, d = q.shape[-2:]
    weights = torch.einsum("bid,bjd->bij", q, k).div(d**0.5).exp()  # (B, N, N)
    if radius is not None:
        weights = weights * seen(n, visual, radius, fault)
    return torch.einsum("bij,bjd->bid", weights / weights.sum(-1, keepdim=True), v)


class Processor:
    """An attention processor that asks a memory."""

    def __init__(self, place: int, memory: Memory) -> None:
        self.place, self.memory = place, memory

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Output:
        assert attention_mask is None
        return self.memory.module(self.place, attn, hidden_states, encoder_hidden_states)


@contextmanager
def remembering(memory: Memory, grid: Grid) -> Iterator[None]:
    """The memory's processors in place of the pipeline's, and a line of the grid for each call of the transformer."""
    lines = iter(grid)

    def tick(*_: Any) -> None:
        memory.row, memory.step = next(lines).split(), memory.step + 1

    hook = memory.bench.pipe.transformer.register_forward_pre_hook(tick)
    try:
        with processors(memory.bench, [Processor(place, memory) for place in range(memory.bench.layers)]):
            yield
    finally:
        hook.remove()


def replay(
    bench: Bench,
    grid: Grid,
    inputs: dict[str, Any],
    guided: bool = True,
    radii: dict[str, int] = RADII,
    fault: str | None = None,
) -> Trace:
    """Generate by the formulas, or with one fault in them."""
    with remembering(Memory(bench, guided, radii, fault), grid):
        return trace(bench, inputs)
