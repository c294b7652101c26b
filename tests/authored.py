"""The stand-ins of `authors` with their adapters and loops, and their replays, for which names are exchanged by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from authors import flux as bfl
from authors import functions, images, sd3, stdit3, wan
from family_replay import Replayed
from torch import Tensor, nn

import arrowhead as ah
from arrowhead.models.custom import CustomModel
from arrowhead.models.find import find
from arrowhead.models.model import Model, target_of
from arrowhead.plans.layout import ATTENTION_KINDS


@dataclass(frozen=True)
class Authored:
    """A stand-in, its adapter, its loop, and where its attention function is found under which name, for the replay.

    `heads_first` gives queries, keys and values (B, H, N, D) and a mask of a call of the function, `joined` what it returns.
    """

    model: nn.Module
    adapter: ah.Adapter
    loop: Callable[..., Tensor]
    tokens: ah.Tokens
    place: Any
    name: str
    heads_first: Callable[..., tuple[Any, ...]]
    joined: Callable[[Tensor], Tensor] = lambda out: out.transpose(1, 2)
    steps: int = 5

    def sample(self, seed: int = 0, **more: Any) -> Tensor:
        return self.loop(self.model, seed=seed, steps=self.steps, **more)

    @property
    def guided(self) -> bool:
        return self.adapter.cfg is not None

    @property
    def calls(self) -> int:
        return 2 if self.adapter.cfg == "two_calls" else 1

    def found(self, kinds: Any = ATTENTION_KINDS) -> Model:
        return find(CustomModel(self.model, self.adapter), kinds)

    def plan(self, cells: Any, kinds: Any = ATTENTION_KINDS) -> ah.Plan:
        model = self.found(kinds)
        return ah.Plan(tuple(map(tuple, cells)), target_of(model), self.tokens, self.guided, calls=self.calls)


def tokens_first(q: Tensor, k: Tensor, v: Tensor, k_lens: Any = None, **_: Any) -> tuple[Any, ...]:
    mask = None if k_lens is None else (torch.arange(k.shape[1]) < k_lens[:, None])[:, None, None]
    return *(part.transpose(1, 2) for part in (q, k, v)), mask


def of_flux(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> tuple[Any, ...]:
    return functions.turned(q, pe), functions.turned(k, pe), v, None


def of_sd3(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Any, ...]:
    return *(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v)), None


def of_torch(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Any, ...]:
    return q, k, v, None


def flat(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def flux_model() -> Authored:
    tokens = ah.Tokens(20, 3, text_first=True)
    return Authored(bfl.Flux().double(), ah.adapters.flux(), bfl.denoise, tokens, bfl, "attention", of_flux, flat)


def sd3_model() -> Authored:
    tokens = ah.Tokens.of_grid(1, 4, 5, text=3, text_first=True)
    return Authored(
        sd3.MMDiT().double(), ah.adapters.sd3(guidance_scale=4.0), sd3.sample_euler, tokens, sd3, "attention", of_sd3, flat
    )


def wan_model() -> Authored:
    tokens, adapter = ah.Tokens.of_grid(3, 2, 3, text=5), ah.adapters.wan(guidance_scale=3.0)
    return Authored(wan.WanModel().double(), adapter, wan.generate, tokens, wan, "flash_attention", tokens_first)


def dit_model() -> Authored:
    tokens, torch_s = ah.Tokens.of_grid(1, 4, 5), "scaled_dot_product_attention"
    return Authored(
        images.DiT().double(), ah.adapters.dit(), images.sample, tokens, images.F, torch_s, of_torch, lambda out: out
    )


def pixart_model() -> Authored:
    tokens, adapter = ah.Tokens.of_grid(1, 4, 5), ah.adapters.pixart_sigma(guidance_scale=4.0, cfg="cond_first")
    name = "memory_efficient_attention"
    return Authored(images.PixArtMS().double(), adapter, images.sample, tokens, functions.xformers.ops, name, tokens_first)


def open_sora_model() -> Authored:
    tokens = replace(ah.Tokens.of_grid(7, 2, 5), frames=7)
    adapter = ah.open_sora(guidance_scale=4.0, temporal=True, version="1.2")
    return Authored(stdit3.STDiT3().double(), adapter, stdit3.rflow, tokens, None, "", of_torch)


MODELS = {
    "flux": flux_model,
    "sd3": sd3_model,
    "wan": wan_model,
    "dit": dit_model,
    "pixart": pixart_model,
    "open-sora 1.2": open_sora_model,
}


@contextmanager
def replaying(own: Authored, model: Model, columns: Any, seen: ah.Tokens | None = None) -> Iterator[list[Replayed]]:
    """The model under columns of cells, by hand: attention from its definition, nothing of arrowhead's engine."""
    tokens, current, undo = seen or own.tokens, list[Replayed](), list[Callable[[], None]]()
    found = []

    def function(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if not current:
                return original(*args, **kwargs)
            replayed = current[-1]
            del current[-1]

            def run() -> Any:
                q, k, v, mask = own.heads_first(*args, **kwargs)
                return own.joined(replayed.attention(q, k, v, mask, None))

            return replayed(run) if replayed.site.is_function else run()

        return called

    def wrapped(module: Any, replayed: Replayed) -> Callable[..., Any]:
        forward = module.forward

        def within(*args: Any, **kwargs: Any) -> Any:
            current.append(replayed)
            return forward(*args, **kwargs)

        def block(*args: Any, **kwargs: Any) -> Any:
            names = model.blocks[replayed.site.path].names
            if len(names) == 1:
                return replayed(lambda: forward(*args, **kwargs), args[0])
            given = args[:2] if args else (kwargs["img"], kwargs["txt"])
            if replayed.site.joint:
                return replayed(lambda: forward(*args, **kwargs), given)
            return None, replayed(lambda: forward(*args, **kwargs)[1], given[1])  # SD3's last one gives no text

        def called(*args: Any, **kwargs: Any) -> Any:
            if replayed.site.kind == "block":
                return block(*args, **kwargs)
            if replayed.site.is_function:
                return within(*args, **kwargs)
            if replayed.site.kind != "self_attention":
                return replayed(lambda: forward(*args, **kwargs))
            if own.place is None:
                return replayed(lambda: by_parts(module, replayed, *args))
            return replayed(lambda: within(*args, **kwargs))

        return called

    bench = SimpleNamespace(two_calls=own.calls == 2, conditional_first=True, tokens=tokens, frames=1, grid=None)
    for site, column in zip(model.sites, columns, strict=True):
        bench.visual = site.tokens(tokens).visual
        found.append(Replayed(site, column, bench, own.guided))
        module = own.model.get_submodule(site.module_path)
        undo.append(_restoring(module))
        module.forward = wrapped(module, found[-1])
    if own.place is not None:
        before = getattr(own.place, own.name)
        setattr(own.place, own.name, function(before))
        undo.append(lambda: setattr(own.place, own.name, before))
    try:
        yield found
    finally:
        for each in reversed(undo):
            each()


def _restoring(module: nn.Module) -> Callable[[], None]:
    before = vars(module).get("forward")
    return lambda: module.__dict__.pop("forward") if before is None else setattr(module, "forward", before)


def by_parts(module: Any, replayed: Replayed, x: Tensor) -> Tensor:
    """STDiT3's attention, with norms before the rotary embeddings."""
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(q), module.k_norm(k)
    if module.rope:
        q, k = module.rotary_emb(q), module.rotary_emb(k)
    return module.proj(flat(replayed.attention(q, k, v, None, None)))
