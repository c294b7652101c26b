"""Replays a plan on any model: the model's processors run, and attention is computed head by head from the formulas.

The engine is not used. The names by which processors call attention are replaced here, while a processor runs.
"""

import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from families import FamilyBench
from independent import dense_mask
from torch import Tensor

from arrowhead.plans.cells import AST, FULL, Arrow, Attend, Cached, Cell, Full, Method
from arrowhead.plans.layout import Site, Tokens

RADII = (2, 5)


def random_cells(seed: int, sites: Sequence[Site], steps: int, share: bool, switch: int | None = None) -> list[list[Cell]]:
    """Random cells, steps × sites: a full step, then any cells that the kind of site allows; again so from `switch` on."""
    if switch:
        return random_cells(seed, sites, switch, share) + random_cells(seed + 100, sites, steps - switch, share)
    draw = random.Random(seed)
    kinds = [Full(), Cached(), *(Arrow(radius, residual) for radius in RADII for residual in (False, True))]

    def random_cell(site: Site) -> Cell:
        shared = share and draw.random() < 0.4
        if draw.random() < (0.15 if site.kind == "self_attention" else 0.5):
            return AST
        if site.kind != "self_attention" or draw.random() < 0.15:
            return Attend(Full(), shared)
        return Attend(tuple(draw.choice(kinds) for _ in range(site.heads)), shared)

    return [[FULL] * len(sites), *([random_cell(site) for site in sites] for _ in range(steps - 1))]


def methods_of(column: Sequence[Cell]) -> Iterator[Method]:
    """The methods of the heads in a column of cells."""
    for cell in column:
        if isinstance(cell, Attend):
            yield from cell.method if isinstance(cell.method, tuple) else (cell.method,)


def on_tensors(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """Call a function with tensors, or with the tensors of tuples one by one."""
    if isinstance(outputs[0], tuple):
        return tuple(None if parts[0] is None else function(*parts) for parts in zip(*outputs, strict=True))
    return function(*outputs)


def without_text(out: Any, given: Any) -> Any:
    """The input in the form of an output: a pair whose text is None, where the last block gives one."""
    return (None, given) if isinstance(out, tuple) and isinstance(given, Tensor) else given


class Replayed:
    """A site of one transformer, replayed by its column of cells; guidance ends before the step `ends`."""

    def __init__(self, site: Site, column: Sequence[Cell], bench: FamilyBench, guided: bool, ends: int | None = None) -> None:
        self.ends = len(column) if ends is None else ends
        self.site, self.column = site, column
        self.radii = {m.radius for m in methods_of(column) if isinstance(m, Arrow)}
        self.calls = 2 if guided and bench.two_calls else 1
        self.batched = guided and not bench.two_calls
        self.conditional_first = bench.conditional_first
        grid = bench.grid if bench.grid is None or bench.frames == 1 else replace(bench.grid, frames=1)
        alone = Tokens(bench.frames if site.over == "time" and bench.frames > 1 else bench.visual // bench.frames)
        self.tokens = replace(bench.tokens if site.joint else alone, grid=grid)
        self.passed = 0
        self.outputs: list[Any] = [None] * self.calls
        self.stored: list[dict[Any, Tensor]] = [{} for _ in range(self.calls)]  # of the last steps
        self.made: dict[Any, list[Tensor]] = {}  # in the running step: several parts where attention is called by sample

    def conditional(self, value: Tensor) -> Tensor:
        return value.chunk(2)[not self.conditional_first]

    def conditional_for_both(self, value: Tensor) -> Tensor:
        """The rows of the conditional branch, twice."""
        if not self.batched:
            return value
        return torch.cat([self.conditional(value)] * 2)

    def __call__(self, run: Callable[[], Any], given: Any = None) -> Any:
        """The output of the module's next call; `given` is the input of a block, to which the block adds."""
        (step, self.call), self.passed = divmod(self.passed, self.calls), self.passed + 1
        step %= len(self.column)  # where a call has several denoising loops, each begins anew
        if step >= self.ends:
            step, self.call = self.passed - 1 - self.ends * (self.calls - 1), 0
            if self.batched:
                self.outputs = [on_tensors(self.conditional, out) for out in self.outputs]
                self.stored = [{what: self.conditional(value) for what, value in each.items()} for each in self.stored]
                self.batched = False
        self.cell = self.column[step]
        if self.cell != AST and not (self.cell.share_cfg and self.call):
            self.made, self.rows_done = {}, 0
            out = run()
            if given is not None:
                given = without_text(out, given)
                out = on_tensors(torch.sub, out, given)
            for what, parts in self.made.items():
                value = torch.cat(parts)
                for call in range(self.calls) if self.cell.share_cfg else [self.call]:
                    self.stored[call][what] = self.conditional_for_both(value) if self.cell.share_cfg else value
            if self.cell.share_cfg:
                out = on_tensors(self.conditional_for_both, out)
                self.outputs = [out] * self.calls
            self.outputs[self.call] = out
        out = self.outputs[self.call]
        return out if given is None else on_tensors(torch.add, without_text(out, given), out)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, scale: float | None) -> Tensor:
        """Attention by the step's cell: tensors are (B, H, N, D), `own` is the mask that the model gives."""
        if q.shape[2] != k.shape[2]:  # an IP-Adapter's, to an image prompt
            return F.scaled_dot_product_attention(q, k, v)
        length, tokens = q.shape[2], self.tokens
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))  # shared by heads
        if self.site.joint and not self.site.by_sample:  # the text may have any length
            tokens = replace(tokens, text=length - tokens.visual)
        n = tokens.total
        if self.site.by_sample:  # without the text's padding: other samples may be longer
            q, k, v = (F.pad(tensor, (0, 0, 0, n - length)) for tensor in (q, k, v))
            own = torch.arange(n) < length
        assert q.shape[2] == n
        rows = slice(self.rows_done, self.rows_done + len(q))
        self.rows_done += len(q)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if own is not None:
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own

        def under(seen: Tensor, h: int) -> Tensor:
            weights = scores[:, h].masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
            return weights @ v[:, h]

        def store(what: Any, value: Tensor) -> None:
            self.made.setdefault(what, []).append(value)

        outs = []
        stored = {what: value[rows] for what, value in self.stored[self.call].items()}
        for h, method in enumerate(self.cell.methods(self.site.heads)):
            if isinstance(method, Cached):
                outs.append(stored[h])
                continue
            radius = method.radius if isinstance(method, Arrow) else n
            out = under(dense_mask(tokens, radius), h)
            if isinstance(method, Full):
                for radius in self.radii:
                    store((h, radius), out - under(dense_mask(tokens, radius), h))
            elif method.residual:
                out = out + stored[h, method.radius]
            store(h, out)
            outs.append(out)
        return torch.stack(outs, 1)[:, :, :length].to(v.dtype)


def processor_of(processor: Any, replayed: Replayed) -> Any:
    """A processor that runs the model's, with the replayed attention."""
    base, names = type(processor), sys.modules[type(processor).__module__]

    def of_functional(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None, **_: Any) -> Tensor:
        return replayed.attention(query, key, value, attn_mask, scale)

    def of_dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None, **_: Any) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.ndim == 2:  # of the keys (B, N)
            attn_mask = attn_mask[:, None, None]
        return replayed.attention(q, k, v, attn_mask, scale).transpose(1, 2)

    functional = types.SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": of_functional})
    others = {name: own for name, own in (("F", functional), ("dispatch_attention_fn", of_dispatch)) if hasattr(names, name)}

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            before = {name: vars(names)[name] for name in others}
            vars(names).update(others)
            try:
                return base.__call__(processor, *args, **kwargs)
            finally:
                vars(names).update(before)

        return replayed(run)

    __call__.__signature__ = inspect.signature(base.__call__)  # what diffusers passes depends on it
    made: Any = object.__new__(type(base.__name__, (base,), {"__call__": __call__}))
    object.__setattr__(made, "__dict__", vars(processor))  # of an IP-Adapter's, which are modules
    return made


def forward_of(module: Any, replayed: Replayed) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = None
        if replayed.site.kind == "block":
            named = inspect.signature(own).bind(*args, **kwargs).arguments
            given = next(iter(named.values()))  # the image's
            if replayed.site.joint and named.get("encoder_hidden_states") is not None:  # of two streams
                given = named["encoder_hidden_states"], given
        return replayed(lambda: own(*args, **kwargs), given)

    return forward


@contextmanager
def replaying(
    bench: FamilyBench, modules: dict[Site, Any], cells: Sequence[Sequence[Cell]], guided: bool, ends: int | None = None
) -> Iterator[list[Replayed]]:
    """Replay these cells, steps × sites, on the modules; from `switch` on, on those of the second transformer."""
    split, placed = bench.switch if bench.switch is not None else len(cells), []
    for site, column, module in zip(modules, zip(*cells, strict=True), modules.values(), strict=True):
        placed.append((Replayed(site, column[:split], bench, guided, ends), module))
        if bench.switch is not None:
            later = bench.pipe.transformer_2.get_submodule(site.path)
            placed.append((Replayed(site, column[split:], bench, guided), later))
    before = {}
    for replayed, module in placed:
        if replayed.site.kind == "self_attention":
            before[module] = module.processor
            module.processor = processor_of(module.processor, replayed)
        else:
            module.forward = forward_of(module, replayed)
    try:
        yield [replayed for replayed, _ in placed]
    finally:
        for _, module in placed:
            if module in before:
                module.processor = before[module]
            else:
                del module.forward
