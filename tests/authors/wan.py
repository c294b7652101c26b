"""Wan from its own source: the transformer of `own_wan`, with attention by a function that is no attention of torch's."""

import own_wan
import torch
from own_wan import WIDTH, rotated
from torch import Tensor, nn

from authors.functions import flash_attention


class WanSelfAttention(own_wan.WanSelfAttention):
    window_size = (-1, -1)

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim

        def qkv_fn(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.view(b, s, n, d) for part in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)))

        q, k, v = qkv_fn(x)
        out = flash_attention(q=rotated(q, freqs), k=rotated(k, freqs), v=v, k_lens=seq_lens, window_size=self.window_size)
        return self.o(out.flatten(2))


class WanT2VCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)) for part in (q, k, v))
        return self.o(flash_attention(q, k, v, k_lens=context_lens).flatten(2))


class WanModel(own_wan.WanModel):
    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        self.text_len = own_wan.TEXT
        for block in self.blocks:
            block.self_attn, block.cross_attn = WanSelfAttention(), WanT2VCrossAttention()
            nn.init.normal_(block.self_attn.norm_q.weight, std=2.0)
            nn.init.normal_(block.self_attn.norm_k.weight, std=2.0)
        self.eval().requires_grad_(False)


def generate(model: WanModel, seed: int = 0, images: int = 2, steps: int = 5, padding: int = 0) -> Tensor:
    """The loop of `wan.text2video`, over videos of 3 × 4 × 6 in lists; `padding` tokens follow those of the video."""
    draw = torch.Generator().manual_seed(seed)
    dtype = model.head.weight.dtype
    latents = [torch.randn(own_wan.CHANNELS, 3, 4, 6, generator=draw).to(dtype) for _ in range(images)]
    context = [torch.randn(own_wan.TEXT, WIDTH, generator=draw).to(dtype) for _ in range(images)]
    null = [torch.zeros(1, WIDTH, dtype=dtype)] * images
    for step in range(steps):
        t = torch.full((images,), 1000.0 * (1 - step / steps))
        cond = model(latents, t=t, context=context, seq_len=18 + padding)
        uncond = model(latents, t=t, context=null, seq_len=18 + padding)
        latents = [x - (u + 3.0 * (c - u)) / steps for x, c, u in zip(latents, cond, uncond, strict=True)]
    return torch.stack(latents)
