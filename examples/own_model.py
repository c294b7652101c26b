"""A custom model: ten lines describe it to arrowhead, and plans are searched for and applied. Runs in seconds, offline.

The model is a small one with random weights, in the manner of OpenSora's STDiT2: spatial, temporal and cross-attention, each
with softmax written out, and a sampler that is a plain loop over `model.forward`. For OpenSora itself: `ah.open_sora()`.
"""

from typing import Any

import torch
from torch import Tensor, nn

import arrowhead as ah

WIDTH, HEADS, FRAMES, SIDE, STEPS, GUIDANCE = 32, 4, 4, 8, 12, 4.0


class SelfAttention(nn.Module):
    """Of (rows, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Of (B, N, C) to a text (B, L, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        k, v = self.kv(text).chunk(2, -1)
        return self.proj((self.q(x) @ k.mT * WIDTH**-0.5).softmax(-1) @ v)


class Block(nn.Module):
    """Within each frame, along time, to the text, and a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn, self.attn_temp, self.cross_attn = SelfAttention(), SelfAttention(), CrossAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, text: Tensor, frames: int) -> Tensor:
        spatial = self.norm(x).unflatten(1, (frames, -1)).flatten(0, 1)  # (B, T·S, C) -> (B·T, S, C)
        x = x + self.attn(spatial).view_as(x)
        temporal = self.norm(x).unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)  # -> (B·S, T, C)
        x = x + self.attn_temp(temporal).unflatten(0, (len(x), -1)).transpose(1, 2).flatten(1, 2)
        x = x + self.cross_attn(self.norm(x), text)
        return x + self.mlp(self.norm(x))


class VideoTransformer(nn.Module):
    """A velocity for videos (B, 4, T, H, W), each pixel a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.out = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.place = nn.Parameter(torch.randn(FRAMES * SIDE * SIDE, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, video: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.embed(video.flatten(2).mT) + self.place + self.time(time[:, None])[:, None]
        for block in self.blocks:
            x = block(x, text, video.shape[2])
        return self.out(x).mT.reshape(video.shape)


def sample(model: VideoTransformer, text: Tensor, seed: int, run: Any = None) -> Tensor:
    """The sampler: guidance in one batch [with text, without], Euler steps from noise at 1 to a video at 0."""
    x = torch.randn(len(text), 4, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    for i in range(STEPS):
        if run is not None:
            run.step(i)  # not needed, but it notices a loop that was left in the middle
        both, time = torch.cat([x, x]), torch.full((2 * len(x),), 1 - i / STEPS)
        conditional, other = model.forward(both, time, torch.cat([text, torch.zeros_like(text)])).chunk(2)
        x = x - (other + GUIDANCE * (conditional - other)) / STEPS
    return x


torch.manual_seed(0)
torch.set_grad_enabled(False)
model = VideoTransformer().eval()
text = torch.randn(2, 6, WIDTH)

adapter = ah.Adapter(
    attention={
        r"blocks\.\d+\.attn": ah.FusedQKV(heads="num_heads", over="space"),  # parts qkv and proj, softmax of its own
        r"blocks\.\d+\.attn_temp": ah.FusedQKV(heads="num_heads", over="time"),
    },
    tokens=lambda _, call: ah.Tokens(call["video"][0, 0].numel(), frames=call["video"].shape[2]),
    cfg="cond_first",
    guidance_scale=GUIDANCE,
)

raw = sample(model, text, seed=1)
searches: dict[str, dict[str, Any]] = {
    "greedy, D6": {"threshold": "D6"},
    "head by head": {"strategy": "headwise", "threshold": 0.6},
    "half of the modules' FLOPs": {"budget": ah.Budget(module_flops=0.5)},
}
for name, how in searches.items():
    plan = ah.search(model, lambda: sample(model, text, seed=0), adapter=adapter, progress=False, **how)
    with ah.applied(model, plan, adapter) as run:
        video = sample(model, text, seed=1, run=run)
    print(f"{name}: off by {(video - raw).norm() / raw.norm():.3f}\n{run.summary()}\n")
