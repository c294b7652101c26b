"""DiT and PixArt-Σ: attention modules with one layer for Q, K and V; timm's with torch's attention, or xformers' function."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from authors.functions import xformers

WIDTH, HEADS, CHANNELS, TEXT = 16, 2, 4, 3


class Attention(nn.Module):
    """timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        nn.init.normal_(self.qkv.weight, std=0.5)  # sharp enough for bands to matter

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class AttentionKVCompress(Attention):
    def __init__(self, sr_ratio: int = 1) -> None:
        super().__init__()
        self.sr_ratio = sr_ratio
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)  # over all heads
        nn.init.normal_(self.q_norm.weight, std=2.0)
        nn.init.normal_(self.k_norm.weight, std=2.0)

    def forward(self, x: Tensor, mask=None, HW=None) -> Tensor:  # noqa: N803
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.sr_ratio > 1:
            k, v = (part[:, :: self.sr_ratio] for part in (k, v))
        q, k, v = (part.unflatten(2, (self.num_heads, -1)) for part in (q, k, v))
        out = xformers.ops.memory_efficient_attention(q, k, v, p=self.attn_drop.p, attn_bias=None)
        return self.proj_drop(self.proj(out.flatten(2)))


class MultiHeadCrossAttention(nn.Module):
    """All texts are packed into one row; `mask` has their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_linear, self.kv_linear, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cond: Tensor, mask: list[int]) -> Tensor:
        rows, tokens, _ = x.shape
        q = self.q_linear(x).view(1, -1, HEADS, WIDTH // HEADS)
        k, v = self.kv_linear(cond).view(1, -1, 2, HEADS, WIDTH // HEADS).unbind(2)
        out = xformers.ops.memory_efficient_attention(q, k, v, p=0.0, attn_bias=([tokens] * rows, mask))
        return self.proj(out.view(rows, -1, WIDTH))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class DiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention(), mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + m[2] * self.attn(self.norm1(x) * (1 + m[1]) + m[0])
        return x + m[5] * self.mlp(self.norm2(x) * (1 + m[4]) + m[3])


class PixArtMSBlock(nn.Module):
    def __init__(self, sr_ratio: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.cross_attn, self.mlp = AttentionKVCompress(sr_ratio), MultiHeadCrossAttention(), mlp()

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask=None, HW=None) -> Tensor:  # noqa: N803
        x = x + self.attn(self.norm1(x) + t[:, None], HW=HW)
        x = x + self.cross_attn(x, y, mask)
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    """What both have: images (B, C, H, W) in patches of 2 × 2, twice the channels out, and guidance in one batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x_embedder, self.t_embedder = nn.Conv2d(CHANNELS, WIDTH, 2, 2), nn.Linear(1, WIDTH)
        self.pos_embed = nn.Parameter(torch.randn(1, WIDTH, 8, 8))
        self.final_layer = nn.Linear(WIDTH, 4 * 2 * CHANNELS)

    def embedded(self, x: Tensor) -> Tensor:
        return (self.x_embedder(x) + self.pos_embed[:, :, : x.shape[2] // 2, : x.shape[3] // 2]).flatten(2).mT

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.final_layer(x).reshape(len(x), height // 2, width // 2, 2, 2, 2 * CHANNELS)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 2 * CHANNELS, height, width)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, **more) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y, **more)
        cond, uncond = out[:, :CHANNELS].chunk(2)
        return torch.cat([torch.cat([uncond + cfg_scale * (cond - uncond)] * 2), out[:, CHANNELS:]], 1)


class DiT(_Patches):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patch_size = 2
        self.y_embedder = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(depth))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embedded(x), self.t_embedder(t[:, None] / 1000) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(h, *x.shape[2:])


class PixArtMS(_Patches):
    def __init__(self, depth: int = 2, sr_ratio: int = 1) -> None:
        super().__init__()
        self.patch_size = 2
        self.y_embedder = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(PixArtMSBlock(sr_ratio) for _ in range(depth))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask=None, data_info=None) -> Tensor:
        h, t, y = self.embedded(x), self.t_embedder(timestep[:, None] / 1000), self.y_embedder(y)
        lengths, y = [y.shape[2]] * len(y), y.squeeze(1).view(1, -1, WIDTH)
        for block in self.blocks:
            h = block(h, y, t, lengths, (x.shape[2] // 2, x.shape[3] // 2))
        return self.unpatchify(h, *x.shape[2:])


def sample(model: DiT | PixArtMS, seed: int = 0, images: int = 2, steps: int = 5, height: int = 8, width: int = 10) -> Tensor:
    """The sampling of DiT: `forward_with_cfg` doubles the latents, with the conditional rows first."""
    draw = torch.Generator().manual_seed(seed)
    dtype = model.pos_embed.dtype
    z = torch.randn(images, CHANNELS, height, width, generator=draw).to(dtype)
    if isinstance(model, DiT):
        y = torch.cat([torch.arange(images), torch.full((images,), 10)])
    else:
        text = torch.randn(images, 1, TEXT, 5, generator=draw).to(dtype)
        y = torch.cat([text, torch.zeros_like(text)])
    for step in range(steps):
        t = torch.full((2 * images,), 1000.0 * (1 - step / steps), dtype=dtype)
        out = model.forward_with_cfg(torch.cat([z, z]), t, y, 4.0)[: len(z), :CHANNELS]
        z = z - out / steps
    return z
