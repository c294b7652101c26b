"""A stand-in for Wan's transformer from its own source: the names and calls of `wan.modules.model`, lists in and out."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import arrowhead as ah

WIDTH, HEADS, CHANNELS, TEXT = 16, 2, 4, 5


class WanSelfAttention(nn.Module):
    """Of (B, L, C); lengths and grids are tensors with a row for each sample, and the angles are for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = WIDTH, HEADS, WIDTH // HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        assert len(x) == len(seq_lens) == len(grid_sizes)
        assert bool((seq_lens == x.shape[1]).all())
        q, k, v = (part.unflatten(2, (HEADS, -1)) for part in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)))
        q, k = rotated(q, freqs), rotated(k, freqs)  # (B, L, H, D)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(out.transpose(1, 2).flatten(2))


def rotated(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotary embeddings of (B, L, H, D), by angles (at least L, D / 2)."""
    turn = torch.polar(torch.ones_like(freqs), freqs)[: x.shape[1], None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)


class WanT2VCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, context_lens: Any) -> Tensor:
        return self.o((self.norm_q(self.q(x)) @ self.norm_k(self.k(context)).mT).softmax(-1) @ self.v(context))


class WanAttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn, self.cross_attn = WanSelfAttention(), WanT2VCrossAttention()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU("tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Parameter(torch.randn(1, 6, WIDTH) / WIDTH**0.5)

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        e = (self.modulation + e).chunk(6, 1)
        x = x + self.self_attn(self.norm1(x) * (1 + e[1]) + e[0], seq_lens, grid_sizes, freqs) * (1 + e[2])
        x = x + self.cross_attn(x, context, context_lens)
        return x + self.ffn(self.norm2(x) * (1 + e[4]) + e[3]) * (1 + e[5])


class WanModel(nn.Module):
    """Videos (C, F, H, W) in a list, texts (L, C) in a list; the velocities in a list."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_size = (1, 2, 2)
        self.patch_embedding = nn.Conv3d(CHANNELS, WIDTH, self.patch_size, self.patch_size)
        self.text_embedding = nn.Linear(WIDTH, WIDTH)
        self.time_embedding = nn.Linear(1, 6 * WIDTH)
        self.blocks = nn.ModuleList(WanAttentionBlock() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 4 * CHANNELS)
        self.freqs = torch.arange(1024.0)[:, None] / torch.arange(1, WIDTH // HEADS // 2 + 1)
        for block in self.blocks:  # sharp enough for bands to matter
            nn.init.normal_(block.self_attn.norm_q.weight, std=2.0)
            nn.init.normal_(block.self_attn.norm_k.weight, std=2.0)
        self.eval().requires_grad_(False)

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
        embedded = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:]) for u in embedded])
        flat = [u.flatten(2).transpose(1, 2) for u in embedded]
        seq_lens = torch.tensor([u.shape[1] for u in flat])
        assert int(seq_lens.max()) <= seq_len
        h = torch.cat([torch.cat([u, u.new_zeros(1, seq_len - u.shape[1], u.shape[2])], 1) for u in flat])
        e = self.time_embedding(t[:, None].to(h.dtype) / 1000).unflatten(1, (6, WIDTH))
        texts = self.text_embedding(torch.stack([F.pad(u, (0, 0, 0, TEXT - len(u))) for u in context]))
        for block in self.blocks:
            h = block(
                h,
                e=e,
                seq_lens=seq_lens,
                grid_sizes=grid_sizes,
                freqs=self.freqs.to(h.dtype),
                context=texts,
                context_lens=None,
            )
        return self.unpatchify(self.head(h), grid_sizes)

    def unpatchify(self, x: Tensor, grid_sizes: Tensor) -> list[Tensor]:
        out = []
        for u, (f, h, w) in zip(x, grid_sizes.tolist(), strict=True):
            patches = u[: f * h * w].view(f, h, w, 1, 2, 2, CHANNELS)
            out.append(torch.einsum("fhwpqrc->cfphqwr", patches).reshape(CHANNELS, f, h * 2, w * 2))
        return out


def tokens(model: Any, call: Any) -> ah.Tokens:
    """The tokens of the first video; all are alike."""
    return ah.Tokens.of_grid(*(size // patch for size, patch in zip(call["x"][0].shape[1:], model.patch_size, strict=True)))


ADAPTER = ah.Adapter(
    {r"blocks\.\d+\.self_attn": ah.Attention()},
    tokens=tokens,
    cfg="two_calls",
    feed_forward=r"blocks\.\d+\.ffn",
    guidance_scale=3.0,
)


@dataclass(frozen=True)
class Wan:
    """The model with the loop of `wan.text2video`: two calls a step, the latents in a list."""

    model: WanModel
    images: int = 1
    steps: int = 5
    shape: tuple[int, int, int] = (3, 4, 6)
    stacked: bool = False  # whether the loop returns a tensor; else a list

    @property
    def seq_len(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2] // 4

    def sample(self, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        latents = [torch.randn(CHANNELS, *self.shape, generator=generator) for _ in range(self.images)]
        context = [torch.randn(TEXT - place, WIDTH, generator=generator) for place in range(self.images)]
        arg_c = {"context": context, "seq_len": self.seq_len}
        arg_null = {"context": [torch.zeros(1, WIDTH)] * self.images, "seq_len": self.seq_len}
        for step in range(self.steps):
            t = torch.full((self.images,), 1000.0 * (1 - step / self.steps))
            cond = self.model(latents, t=t, **arg_c)
            uncond = self.model(latents, t=t, **arg_null)
            latents = [x - (u + 3.0 * (c - u)) / self.steps for x, c, u in zip(latents, cond, uncond, strict=True)]
        return torch.stack(latents) if self.stacked else latents


class Stacked(nn.Module):
    """The same model with tensors in and out, as a reference for what is found with lists."""

    def __init__(self, model: WanModel) -> None:
        super().__init__()
        self.inner = model
        self.patch_size = model.patch_size

    def forward(self, x: Tensor, t: Tensor, context: list[Tensor], seq_len: int) -> Tensor:
        return torch.stack(self.inner(list(x), t, context, seq_len))
