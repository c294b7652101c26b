"""Models of nobody's library, and loops over them: what OpenSora's STDiT2 is by its module names and calls, and others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from family_replay import Replayed
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend_by_another_name

import arrowhead as ah
from arrowhead.plans.layout import Grid, Site

WIDTH, HEADS, TEXT, LATENT = 16, 2, 3, 4


def turned(x: Tensor) -> Tensor:
    """Rotary embeddings of (rows, H, N, D)."""
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / torch.arange(1, x.shape[3] // 2 + 1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class SelfAttention(nn.Module):
    """One fused layer, norms of queries and keys, and a softmax of its own, or torch's attention."""

    def __init__(self, rotary: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.fused = HEADS, fused
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.rotary_emb = turned if rotary else nn.Identity()

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, n, _ = x.shape
        q, k, v = (part.reshape(rows, n, HEADS, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.q_norm(self.rotary_emb(q)), self.k_norm(self.rotary_emb(k)), v

    def joined(self, out: Tensor) -> Tensor:
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        if not self.fused:
            return self.joined(attend_by_another_name(q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return self.joined(scores.float().softmax(-1).to(v.dtype) @ v)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_linear, self.kv_linear, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k, v = self.kv_linear(y).chunk(2, -1)
        return self.proj((self.q_linear(x) @ k.mT).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.attn, self.attn_temp = SelfAttention(fused=fused), SelfAttention(rotary=True, fused=fused)
        self.cross_attn = CrossAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, y: Tensor, frames: int) -> Tensor:
        batch, tokens, _ = x.shape
        places = tokens // frames
        x = x + self.attn(x.reshape(batch * frames, places, WIDTH)).reshape(batch, tokens, WIDTH)
        along = x.reshape(batch, frames, places, WIDTH).transpose(1, 2).reshape(batch * places, frames, WIDTH)
        x = x + self.attn_temp(along).reshape(batch, places, frames, WIDTH).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + self.cross_attn(x, y)
        return x + self.mlp(x)


class STDiT2(nn.Module):
    """A video (B, 4, T, H, W) in patches, with an output of twice the channels."""

    def __init__(self, layers: int = 2, fused: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch_size = (1, 2, 2)
        self.x_embedder = nn.Conv3d(LATENT, WIDTH, self.patch_size, self.patch_size)
        self.t_embedder = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(fused) for _ in range(layers))
        self.final_layer = nn.Linear(WIDTH, 4 * 2 * LATENT)
        for block in self.blocks:  # sharp enough for bands to matter
            for attn in (block.attn, block.attn_temp):
                nn.init.normal_(attn.q_norm.weight, std=2.0)
                nn.init.normal_(attn.k_norm.weight, std=2.0)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Any = None, num_frames: Any = None) -> Tensor:
        frames, height, width = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        h = self.x_embedder(x).flatten(2).mT + self.t_embedder(timestep[:, None].to(x.dtype) / 100)[:, None]
        place = torch.arange(frames * height * width, dtype=x.dtype)[:, None] * torch.arange(1, WIDTH + 1) * 0.37
        h = h + place.sin()
        for block in self.blocks:
            h = block(h, y, frames)
        out = self.final_layer(h).reshape(len(x), frames, height, width, 2, 2, 2 * LATENT)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), 2 * LATENT, frames, 2 * height, 2 * width)


@dataclass(frozen=True)
class Own:
    """A model, its adapter, and its loop. The video is oblong, and its number of frames no power of two."""

    model: STDiT2
    adapter: ah.Adapter
    steps: int = 5
    shape: tuple[int, int, int] = (7, 4, 10)
    scale: float = 3.0
    images: int = 2

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def frames(self) -> int:
        return self.shape[0]

    @property
    def grid(self) -> Grid:
        return Grid(self.shape[0], self.shape[1] // 2, self.shape[2] // 2)

    @property
    def tokens(self) -> ah.Tokens:
        return ah.Tokens(self.grid.size, frames=self.frames, grid=self.grid)

    @property
    def guided(self) -> bool:
        return self.adapter.cfg is not None

    @property
    def calls(self) -> int:
        return 2 if self.adapter.cfg == "two_calls" else 1

    def sample(self, seed: int = 0, run: Any = None, by_call: bool = False) -> Tensor:
        """IDDPM: x₀ is predicted, and noise drawn in every step; the model's `forward` is called directly."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.images, LATENT, *self.shape)
        x = torch.randn(shape, generator=generator).to(self.dtype)
        y = torch.randn(self.images, TEXT, WIDTH, generator=generator).to(self.dtype)
        model = self.model if by_call else self.model.forward
        kept = torch.linspace(0.02, 0.98, self.steps + 1)  # ᾱ of each step
        for i in range(self.steps):
            if run is not None:
                run.step(i)
            out = self.output(model, x, torch.full((len(x),), float(self.steps - i)), y)
            a, b = kept[i].item(), kept[i + 1].item()
            noise = (x - a**0.5 * out) / (1 - a) ** 0.5
            x = b**0.5 * out + (1 - b) ** 0.5 * (0.9 * noise + 0.1 * torch.randn(shape, generator=generator).to(x.dtype))
        return x

    def output(self, model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Guided, without the variance."""
        other = torch.zeros_like(y)
        if not self.guided:
            return model(x, t, y)[:, :LATENT]
        if self.calls == 2:
            cond, uncond = (model(x, t, text, mask=None, num_frames=self.frames)[:, :LATENT] for text in (y, other))
        else:
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, other]), num_frames=self.frames)[:, :LATENT]
            cond, uncond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)


def left_alone(model: nn.Module) -> dict[str, list[str]]:
    """What a model's modules carry of their own."""
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@contextmanager
def replaying(own: Own, sites: list[Site], columns: Any, boxes: bool = False) -> Iterator[list[Replayed]]:
    """The model under columns of cells, by hand: attention from its definition, nothing of arrowhead's engine."""
    bench = SimpleNamespace(two_calls=own.calls == 2, conditional_first=True, tokens=own.tokens, frames=1)
    found = []
    whole = own.grid
    grids = {"attn": replace(whole, frames=1), "attn_temp": replace(whole, rows=1, columns=1), "mlp": whole}
    for site, column in zip(sites, columns, strict=True):
        grid = grids[site.path.split(".")[-1]]
        bench.visual, bench.grid = grid.size, grid if boxes else None
        found.append(Replayed(site, column, bench, own.guided))
        module = own.model.get_submodule(site.path)
        module.forward = by_hand(module, found[-1]) if site.kind == "self_attention" else kept(module, found[-1])
    try:
        yield found
    finally:
        for site in sites:
            del own.model.get_submodule(site.path).forward


def by_hand(module: Any, replayed: Replayed) -> Callable[[Tensor], Tensor]:
    return lambda x: replayed(lambda: module.joined(replayed.attention(*module.projected(x), None, None)))


def kept(module: nn.Module, replayed: Replayed) -> Callable[[Tensor], Tensor]:
    own = module.forward
    return lambda x: replayed(lambda: own(x))
