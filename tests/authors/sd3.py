"""Stability's SD3: a joint block leaves its work to a function of the file, which calls the attention of another file."""

import torch
from torch import Tensor, nn

from authors.functions import other_impls

WIDTH, HEADS, CHANNELS, TEXT = 16, 2, 4, 3
attention = other_impls.attention


class SelfAttention(nn.Module):
    def __init__(self, pre_only: bool) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        nn.init.normal_(self.qkv.weight, std=0.5)  # sharp enough for bands to matter
        if not pre_only:
            self.proj = nn.Linear(WIDTH, WIDTH)

    def pre_attention(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, -1)


class DismantledBlock(nn.Module):
    def __init__(self, pre_only: bool) -> None:
        super().__init__()
        self.pre_only, self.norm1, self.attn = pre_only, nn.LayerNorm(WIDTH), SelfAttention(pre_only)
        if not pre_only:
            self.norm2 = nn.LayerNorm(WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, (2 if pre_only else 6) * WIDTH))

    def pre_attention(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        shift, scale, *rest = self.adaLN_modulation(c)[:, None].chunk(2 if self.pre_only else 6, -1)
        return self.attn.pre_attention(self.norm1(x) * (1 + scale) + shift), (x, *rest)

    def post_attention(self, attn: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate_mlp: Tensor) -> Tensor:
        x = x + gate * self.attn.proj(attn)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale) + shift)


def block_mixing(context: Tensor, x: Tensor, context_block: DismantledBlock, x_block: DismantledBlock, c: Tensor):
    of_context, context_rest = context_block.pre_attention(context, c)
    of_x, x_rest = x_block.pre_attention(x, c)
    q, k, v = (torch.cat(pair, 1) for pair in zip(of_context, of_x, strict=True))
    attn = attention(q, k, v, x_block.attn.num_heads)
    length = context.shape[1]
    context = None if context_block.pre_only else context_block.post_attention(attn[:, :length], *context_rest)
    return context, x_block.post_attention(attn[:, length:], *x_rest)


class JointBlock(nn.Module):
    def __init__(self, pre_only: bool) -> None:
        super().__init__()
        self.context_block, self.x_block = DismantledBlock(pre_only), DismantledBlock(False)

    def forward(self, *args, **kwargs):
        return block_mixing(*args, context_block=self.context_block, x_block=self.x_block, **kwargs)


class MMDiT(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_size = 2
        self.x_embedder = nn.Conv2d(CHANNELS, WIDTH, 2, 2)
        self.pos_embed = nn.Parameter(torch.randn(1, WIDTH, 8, 8))
        self.t_embedder, self.y_embedder, self.context_embedder = nn.Linear(1, WIDTH), nn.Linear(6, WIDTH), nn.Linear(5, WIDTH)
        self.joint_blocks = nn.ModuleList(JointBlock(pre_only=i == depth - 1) for i in range(depth))
        self.final_layer = nn.Linear(WIDTH, 4 * CHANNELS)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        x = (self.x_embedder(x) + self.pos_embed[:, :, :height, :width]).flatten(2).mT
        c = self.t_embedder(t[:, None] / 1000) + self.y_embedder(y)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, x = block(context, x, c=c)
        x = self.final_layer(x).reshape(len(x), height, width, 2, 2, CHANNELS)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), CHANNELS, 2 * height, 2 * width)


def sample_euler(model: MMDiT, seed: int = 0, images: int = 2, steps: int = 5, height: int = 8, width: int = 10) -> Tensor:
    """Both branches in one batch, the conditional one first."""
    draw = torch.Generator().manual_seed(seed)
    dtype = model.pos_embed.dtype
    x, context, y = (
        torch.randn(images, *shape, generator=draw).to(dtype) for shape in ((CHANNELS, height, width), (TEXT, 5), (6,))
    )
    for step in range(steps):
        sigma = torch.full((2 * images,), 1 - step / steps, dtype=dtype)
        both = torch.cat([context, torch.zeros_like(context)]), torch.cat([y, torch.zeros_like(y)])
        pos, neg = model(torch.cat([x, x]), sigma * 1000, context=both[0], y=both[1]).chunk(2)
        x = x - (neg + 4.0 * (pos - neg)) / steps
    return x
