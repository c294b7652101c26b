"""A plan replayed on any model: its own processors run, and attention is computed head by head from the formulas.

Nothing of arrowhead's engine is used here. Where its routed names are replaced, they are replaced by hand.
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
    """Steps × sites: a full step, then anything that the kind of site may do; so again from `switch` on."""
    if switch:
        return random_cells(seed, sites, switch, share) + random_cells(seed + 100, sites, steps - switch, share)
    draw = random.Random(seed)
    kinds = [Full(), Cached(), *(Arrow(radius, residual) for radius in RADII for residual in (False, True))]

    def some(site: Site) -> Cell:
        shared = share and draw.random() < 0.4
        if draw.random() < (0.15 if site.kind == "self_attention" else 0.5):
            return AST
        if site.kind != "self_attention" or draw.random() < 0.15:
            return Attend(Full(), shared)
        return Attend(tuple(draw.choice(kinds) for _ in range(site.heads)), shared)

    return [[FULL] * len(sites), *([some(site) for site in sites] for _ in range(steps - 1))]


def methods_of(column: Sequence[Cell]) -> Iterator[Method]:
    """What heads do somewhere."""
    for cell in column:
        if isinstance(cell, Attend):
            yield from cell.method if isinstance(cell.method, tuple) else (cell.method,)


def each(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """Of tensors, or of tuples of them."""
    if isinstance(outputs[0], tuple):
        return tuple(function(*parts) for parts in zip(*outputs, strict=True))
    return function(*outputs)


class Replayed:
    """One site of one transformer under its column of cells."""

    def __init__(self, site: Site, column: Sequence[Cell], bench: FamilyBench, guided: bool) -> None:
        self.site, self.column = site, column
        self.radii = {*RADII} if bench.grid is None else {m.radius for m in methods_of(column) if isinstance(m, Arrow)}
        self.calls = 2 if guided and bench.two_calls else 1
        self.batched = guided and not bench.two_calls
        self.conditional_first = bench.conditional_first
        grid = bench.grid if bench.grid is None or bench.frames == 1 else replace(bench.grid, frames=1)
        alone = Tokens(bench.frames if site.over == "time" and bench.frames > 1 else bench.visual // bench.frames)
        self.tokens = replace(bench.tokens if site.joint else alone, grid=grid)
        self.passed = 0
        self.outputs: list[Any] = [None] * self.calls
        self.kept: list[dict[Any, Tensor]] = [{} for _ in range(self.calls)]
        self.made: dict[
            Any, list[Tensor]
        ] = {}  # in the running step, of one sample after another where these ask by themselves

    def for_both(self, value: Tensor) -> Tensor:
        """The conditional branch's rows in place of the other's."""
        if not self.batched:
            return value
        first, second = value.chunk(2)
        return torch.cat([first, first] if self.conditional_first else [second, second])

    def __call__(self, run: Callable[[], Any], given: Any = None) -> Any:
        """What the module gives in its next call; `given` is a block's input, to which it adds."""
        (step, self.call), self.passed = divmod(self.passed, self.calls), self.passed + 1
        self.cell = self.column[step]
        if self.cell != AST and not (self.cell.share_cfg and self.call):
            self.made, self.asked = {}, 0
            out = run() if given is None else each(torch.sub, run(), given)
            for what, parts in self.made.items():
                for call in range(self.calls) if self.cell.share_cfg else [self.call]:
                    self.kept[call][what] = self.for_both(torch.cat(parts)) if self.cell.share_cfg else torch.cat(parts)
            if self.cell.share_cfg:
                out = each(self.for_both, out)
                self.outputs = [out] * self.calls
            self.outputs[self.call] = out
        out = self.outputs[self.call]
        return out if given is None else each(torch.add, given, out)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, scale: float | None) -> Tensor:
        """(B, H, N, D)."""
        asks, n = q.shape[2], self.tokens.total
        if self.site.by_sample:  # over its valid text, which the others' may be longer than
            q, k, v = (F.pad(tensor, (0, 0, 0, n - asks)) for tensor in (q, k, v))
            own = torch.arange(n) < asks
        assert q.shape[2] == n
        rows = slice(self.asked, self.asked + len(q))
        self.asked += len(q)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if own is not None:
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own

        def under(seen: Tensor, h: int) -> Tensor:
            weights = scores[:, h].masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
            return weights @ v[:, h]

        def keep(what: Any, value: Tensor) -> None:
            self.made.setdefault(what, []).append(value)

        outs = []
        kept = {what: value[rows] for what, value in self.kept[self.call].items()}
        for h, method in enumerate(self.cell.methods(self.site.heads)):
            if isinstance(method, Cached):
                outs.append(kept[h])
                continue
            radius = method.radius if isinstance(method, Arrow) else n
            out = under(dense_mask(self.tokens, radius), h)
            if isinstance(method, Full):
                for radius in self.radii:
                    keep((h, radius), out - under(dense_mask(self.tokens, radius), h))
            elif method.residual:
                out = out + kept[h, method.radius]
            keep(h, out)
            outs.append(out)
        return torch.stack(outs, 1)[:, :, :asks].to(v.dtype)


def processor_of(processor: Any, replayed: Replayed) -> Any:
    """A processor that runs the model's own, with another attention."""
    base, names = type(processor), sys.modules[type(processor).__module__]

    def of_functional(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None, **_: Any) -> Tensor:
        return replayed.attention(query, key, value, attn_mask, scale)

    def of_dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None, **_: Any) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
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
    return type(base.__name__, (base,), {"__call__": __call__})()


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
    bench: FamilyBench, modules: dict[Site, Any], cells: Sequence[Sequence[Cell]], guided: bool
) -> Iterator[list[Replayed]]:
    """The modules under these cells, steps × sites; a second transformer's have what is left of the columns to themselves."""
    split, placed = bench.switch if bench.switch is not None else len(cells), []
    for site, column, module in zip(modules, zip(*cells, strict=True), modules.values(), strict=True):
        placed.append((Replayed(site, column[:split], bench, guided), module))
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
