"""OpenSora v1.2's STDiT3: blocks in space and blocks along time, which take turns."""

import torch
from own import turned
from torch import Tensor, nn

from authors.images import MultiHeadCrossAttention, mlp

WIDTH, HEADS, CHANNELS, TEXT = 16, 2, 4, 3


class Attention(nn.Module):
    """Norms, then rotary embeddings along time; softmax written out, as without flash-attn."""

    def __init__(self, rope=None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rope = HEADS, WIDTH // HEADS, rope is not None
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)
        nn.init.normal_(self.q_norm.weight, std=2.0)  # sharp enough for bands to matter
        nn.init.normal_(self.k_norm.weight, std=2.0)
        if rope is not None:
            self.rotary_emb = rope

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        attn = (q * self.head_dim**-0.5 @ k.mT).softmax(-1) @ v
        return self.proj(attn.transpose(1, 2).flatten(2))


class STDiT3Block(nn.Module):
    def __init__(self, temporal: bool = False) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.cross_attn, self.mlp = Attention(turned if temporal else None), MultiHeadCrossAttention(), mlp()
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / 4)

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None) -> Tensor:  # noqa: N803
        m = (self.scale_shift_table[None] + t.reshape(len(t), 6, -1)).chunk(6, 1)
        h = (self.norm1(x) * (1 + m[1]) + m[0]).unflatten(1, (T, S))  # (B, T, S, C)
        h = self.attn((h.transpose(1, 2) if self.temporal else h).flatten(0, 1)).unflatten(0, (len(x), -1))
        x = x + m[2] * (h.transpose(1, 2) if self.temporal else h).flatten(1, 2)
        x = x + self.cross_attn(x, y, mask)
        return x + m[5] * self.mlp(self.norm2(x) * (1 + m[4]) + m[3])


class STDiT3(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_size = (1, 2, 2)
        self.x_embedder = nn.Conv3d(CHANNELS, WIDTH, self.patch_size, self.patch_size)
        self.t_embedder, self.t_block, self.y_embedder = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(5, WIDTH)
        self.pos_embed = nn.Parameter(torch.randn(1, 1, 32, WIDTH))
        self.spatial_blocks = nn.ModuleList(STDiT3Block() for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(temporal=True) for _ in range(depth))
        self.final_layer = nn.Linear(WIDTH, 4 * 2 * CHANNELS)
        self.eval().requires_grad_(False)

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None) -> Tensor:
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        t = self.t_block(self.t_embedder(timestep[:, None] / 1000))
        y = self.y_embedder(y)
        lengths, y = [y.shape[2]] * len(y), y.squeeze(1).view(1, -1, WIDTH)
        h = self.x_embedder(x).flatten(3).permute(0, 2, 3, 1) + self.pos_embed[:, :, : rows * columns]
        h = h.flatten(1, 2)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            h = spatial(h, y, t, lengths, x_mask, None, frames, rows * columns)
            h = temporal(h, y, t, lengths, x_mask, None, frames, rows * columns)
        out = self.final_layer(h).reshape(len(x), frames, rows, columns, 2, 2, 2 * CHANNELS)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), 2 * CHANNELS, frames, 2 * rows, 2 * columns)


def rflow(model: STDiT3, seed: int = 0, images: int = 2, steps: int = 5, frames: int = 7, height: int = 4, width: int = 10):
    """The loop of its rectified flow: conditional rows first."""
    draw = torch.Generator().manual_seed(seed)
    dtype = model.pos_embed.dtype
    z = torch.randn(images, CHANNELS, frames, height, width, generator=draw).to(dtype)
    y = torch.randn(images, 1, TEXT, 5, generator=draw).to(dtype)
    y = torch.cat([y, torch.zeros_like(y)])
    for step in range(steps):
        t = torch.full((2 * images,), 1000.0 * (1 - step / steps), dtype=dtype)
        cond, uncond = model(torch.cat([z, z]), t, y=y, fps=None).chunk(2, 1)[0].chunk(2)
        z = z + (uncond + 4.0 * (cond - uncond)) / steps
    return z
