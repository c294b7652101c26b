"""A plan replayed on any model: its own processors run, and attention is computed head by head from the formulas.

Nothing of arrowhead's engine is used here. Where its routed names are replaced, they are replaced by hand.
"""

import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from families import FamilyBench
from independent import dense_mask
from torch import Tensor

from arrowhead.layout import Site, Tokens
from arrowhead.methods import AST, FULL, Arrow, Attend, Cached, Cell, Full

RADII = (2, 5)


def random_cells(seed: int, sites: Sequence[Site], steps: int, share: bool) -> list[list[Cell]]:
    """Steps × sites: a full step, then anything that the kind of site may do."""
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


def each(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """Of tensors, or of tuples of them."""
    if isinstance(outputs[0], tuple):
        return tuple(function(*parts) for parts in zip(*outputs, strict=True))
    return function(*outputs)


class Replayed:
    """One site under its column of cells."""

    def __init__(self, site: Site, column: Sequence[Cell], bench: FamilyBench, guided: bool) -> None:
        self.site, self.column = site, column
        self.calls = 2 if guided and bench.two_calls else 1
        self.batched = guided and not bench.two_calls
        self.conditional_first = bench.conditional_first
        self.tokens = bench.tokens if site.joint else Tokens(bench.visual)
        self.passed = 0
        self.outputs: list[Any] = [None] * self.calls
        self.kept: list[dict[Any, Tensor]] = [{} for _ in range(self.calls)]

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
            out = run() if given is None else each(torch.sub, run(), given)
            if self.cell.share_cfg:
                out = each(self.for_both, out)
                self.outputs = [out] * self.calls
            self.outputs[self.call] = out
        out = self.outputs[self.call]
        return out if given is None else each(torch.add, given, out)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, scale: float | None) -> Tensor:
        """(B, H, N, D)."""
        n = q.shape[2]
        assert n == self.tokens.total
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if own is not None:
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own

        def under(seen: Tensor, h: int) -> Tensor:
            weights = scores[:, h].masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
            return weights @ v[:, h]

        def keep(what: Any, value: Tensor) -> None:
            if self.cell.share_cfg:
                value = self.for_both(value)
            for call in range(self.calls) if self.cell.share_cfg else [self.call]:
                self.kept[call][what] = value

        outs = []
        kept = self.kept[self.call]
        for h, method in enumerate(self.cell.methods(self.site.heads)):
            if isinstance(method, Cached):
                outs.append(kept[h])
                continue
            radius = method.radius if isinstance(method, Arrow) else n
            out = under(dense_mask(self.tokens, radius), h)
            if isinstance(method, Full):
                for radius in RADII:
                    keep((h, radius), out - under(dense_mask(self.tokens, radius), h))
            elif method.residual:
                out = out + kept[h, method.radius]
            keep(h, out)
            outs.append(out)
        return torch.stack(outs, 1).to(v.dtype)


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
    """The modules under these cells, steps × sites."""
    sites = [Replayed(site, column, bench, guided) for site, column in zip(modules, zip(*cells, strict=True), strict=True)]
    before = {}
    for replayed, (site, module) in zip(sites, modules.items(), strict=True):
        if site.kind == "self_attention":
            before[site] = module.processor
            module.processor = processor_of(module.processor, replayed)
        else:
            module.forward = forward_of(module, replayed)
    try:
        yield sites
    finally:
        for site, module in modules.items():
            if site.kind == "self_attention":
                module.processor = before[site]
            else:
                del module.forward
