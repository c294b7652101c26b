"""A run of a pipeline with nothing left out, seen from outside: what its sites gave, and what follows if they give else."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from budget import FluxBench, final_latents, tokens_of
from independent import by_head, dense_mask, in_int8
from pipelines import Bench
from torch import Tensor, nn

from arrowhead.plans.cells import Arrow, Cached, Cell, Reuse
from arrowhead.plans.layout import Tokens


def site_modules(bench: Bench) -> dict[str, nn.Module]:
    """What a calibration looks at by itself, by path, in the modules' order."""
    blocks = bench.pipe.transformer.transformer_blocks
    chosen = [
        *bench.attentions,
        *(block.ff for block in blocks),
        *getattr(bench.pipe.transformer, "single_transformer_blocks", []),
    ]
    if not bench.text:
        chosen += [block.attn2 for block in blocks if block.attn2 is not None]
    known = {id(module) for module in chosen}
    return {path: module for path, module in bench.pipe.transformer.named_modules() if id(module) in known}


def is_attention(bench: Bench, path: str) -> bool:
    """Whether it has heads: self-attention, or attention of text and image together."""
    return bench.pipe.transformer.get_submodule(path) in bench.attentions


def around(change: "Change", path: str) -> Callable[..., Any]:
    """A forward hook of a module without heads. What a block does is what it adds to its input, the text's tokens first."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if isinstance(out, Tensor):
            return change(path, None, None, None, out[:, None])[:, 0]
        before = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], 1)
        after = before + change(path, None, None, None, (torch.cat(out, 1) - before)[:, None])[:, 0]
        return after[:, : out[0].shape[1]], after[:, out[0].shape[1] :]

    return hook


Change = Callable[[str, Tensor | None, Tensor | None, Tensor | None, Tensor], Tensor]


@contextmanager
def heads_seen(bench: Bench, change: Change) -> Iterator[None]:
    """Within the block `change(path, q, k, v, out)`, all (B, H, N, D), says what a site's heads give.

    What is no self-attention has one head, and no q, k and v.
    """
    own, running = torch.nn.functional.scaled_dot_product_attention, []

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = own(query, key, value, *args, **kwargs)
        return change(running[-1], query, key, value, out) if running else out

    def leave(*_: Any) -> None:
        running.pop()

    hooks = []
    for path, module in site_modules(bench).items():
        if not is_attention(bench, path):
            hooks.append(module.register_forward_hook(around(change, path), with_kwargs=True))
            continue
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        hooks.append(module.register_forward_hook(leave))
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = own
        for hook in hooks:
            hook.remove()


def banded(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, radius: int) -> Tensor:
    """softmax(q kᵀ / √D) v over the arrow's pairs."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~dense_mask(tokens, radius), -torch.inf).softmax(-1) @ v


@dataclass
class Seen:
    """A run with nothing left out: its transformer's calls, and of each step and site what the heads gave.

    `full` and `bands` hold both branches' rows, the first call's first where there are two calls: (2B or B, H, N, D).
    """

    bench: Bench
    guidance: float
    radii: tuple[int, ...]
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)  # of each step
    full: list[dict[str, Tensor]] = field(default_factory=list)
    bands: list[dict[tuple[str, int], Tensor]] = field(default_factory=list)  # site, radius
    eights: list[dict[str, Tensor]] = field(default_factory=list)  # what int8 changes of full attention
    final: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def run(cls, bench: Bench, radii: Sequence[int], guidance: float = 3.0, **inputs: Any) -> "Seen":
        seen = cls(bench, guidance, tuple(radii))
        twice = guidance > 1 and isinstance(bench, FluxBench)
        count = 0

        def tick(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal count
            if not (twice and count % 2):
                seen.calls.append([])
                seen.full.append({})
                seen.bands.append({})
                seen.eights.append({})
            seen.calls[-1].append((args, dict(kwargs)))
            count += 1

        def note(path: str, q: Tensor | None, k: Tensor | None, v: Tensor | None, out: Tensor) -> Tensor:
            found = [(seen.full[-1], path, out)]
            if q is not None:
                tokens = tokens_of(bench)
                tokens = tokens if q.shape[2] == tokens.total else Tokens(tokens.visual)
                found += [(seen.bands[-1], (path, radius), banded(q, k, v, tokens, radius)) for radius in radii]
                everywhere = tokens.visual + tokens.text
                eight = banded(*in_int8(q, k), v.double(), tokens, everywhere) - banded(q, k, v, tokens, everywhere)
                found.append((seen.eights[-1], path, eight.to(out.dtype)))
            for where, key, value in found:
                where[key] = torch.cat([where[key], value]) if key in where else value.clone()
            return out

        hook = bench.pipe.transformer.register_forward_pre_hook(tick, with_kwargs=True)
        try:
            with heads_seen(bench, note):
                seen.final = final_latents(bench, bench.inputs(guidance=guidance, **inputs))
        finally:
            hook.remove()
        return seen

    @property
    def steps(self) -> int:
        return len(self.calls)

    def conditional(self, rows: Tensor) -> Tensor:
        """The conditional branch's rows, twice where there are two branches."""
        if self.guidance <= 1:
            return rows
        first, second = rows.chunk(2)
        return torch.cat([first if self.bench.conditional_first else second] * 2)

    @torch.no_grad()
    def guided(self, step: int, change: dict[str, Tensor]) -> Tensor:
        """The guided output of a step, (B, …), when the sites' heads give so much more."""
        outputs = []
        for i, (args, kwargs) in enumerate(self.calls[step]):

            def more(path: str, _q: Any, _k: Any, _v: Any, out: Tensor, i: int = i) -> Tensor:
                return out + change[path].chunk(len(self.calls[step]))[i] if path in change else out

            with heads_seen(self.bench, more):
                outputs.append(self.bench.pipe.transformer(*args, **kwargs)[0])
        out = torch.cat(outputs)
        if out.ndim == 4:
            out = out[:, : self.bench.pipe.transformer.config.in_channels]  # without what is learnt of the variance
        if self.guidance <= 1:
            return out
        first, second = out.chunk(2)
        conditional, other = (first, second) if self.bench.conditional_first else (second, first)
        return other + self.guidance * (conditional - other)

    def response(self, step: int, change: dict[str, Tensor], size: float = 1e-4) -> Tensor:
        """The derivative of the guided output along a change: J·ΔO."""
        there = {path: size * value for path, value in change.items()}
        back = {path: -value for path, value in there.items()}
        return (self.guided(step, there) - self.guided(step, back)) / (2 * size)

    def errors(self, path: str, column: Sequence[Cell]) -> list[Tensor]:
        """In each step, what the heads give under a column less what they give in this run, (2B or B, H, N, D)."""
        heads = self.full[0][path].shape[1]
        given: list[Tensor] = []
        computed: list[tuple[int, bool, Tensor]] = []  # step, for one branch alone
        kept: dict[int, Tensor] = {}  # of each head, what it computed last
        residuals: dict[tuple[int, int], Tensor] = {}  # head, radius
        visual = slice(-self.bench.visual, None) if isinstance(self.bench, FluxBench) else slice(0, self.bench.visual)
        for step, cell in enumerate(column):
            full = self.full[step][path]
            if isinstance(cell, Reuse):
                a, alone, now = computed[-1]
                if cell.extrapolate:
                    b, _, then = computed[-2]
                    now = now + cell.extrapolate * (step - a) / (a - b) * (now - then)
                    now = self.conditional(now) if alone else now
                given.append(now)
                continue
            out = torch.empty_like(full)
            shared = self.conditional if cell.share_cfg else lambda rows: rows
            for head, method in enumerate(by_head(cell, heads)):
                if isinstance(method, Cached):
                    out[:, head] = shared(kept[head])
                    continue
                if isinstance(method, Arrow):
                    value = shared(self.bands[step][path, method.radius][:, head]).clone()
                    if method.residual:
                        value[:, visual] += shared(residuals[head, method.radius])
                elif method.precision != "native":
                    value = shared(full[:, head]).clone()
                else:
                    value = shared(full[:, head])
                    for (own, radius), band in self.bands[step].items():
                        if own == path:
                            residuals[head, radius] = shared(full[:, head] - band[:, head])[:, visual]
                if method.precision != "native":  # of an arrow as of full attention, which is how a table takes it
                    value += shared(self.eights[step][path][:, head])
                out[:, head] = kept[head] = value
            given.append(out)
            computed.append((step, cell.share_cfg, out))
        return [value - self.full[step][path] for step, value in enumerate(given)]

    def groups(self, path: str, column: Sequence[Cell]) -> list[list[int]]:
        """Heads of a site that do the same throughout."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        heads = self.full[0][path].shape[1]
        for head in range(heads):
            own = tuple(cell if isinstance(cell, Reuse) else (by_head(cell, heads)[head], cell.share_cfg) for cell in column)
            alike.setdefault(own, []).append(head)
        return list(alike.values())


def at_heads(change: Tensor, heads: Sequence[int]) -> Tensor:
    """A change of these heads alone."""
    only = torch.zeros_like(change)
    only[:, list(heads)] = change[:, list(heads)]
    return only
