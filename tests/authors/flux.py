"""Black Forest Labs' FLUX: two kinds of blocks, each of which projects and calls a function."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from authors.functions import attention, rope

WIDTH, HEADS, CHANNELS, TEXT = 16, 2, 4, 3


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        nn.init.normal_(self.query_norm.weight, std=2.0)  # sharp enough for bands to matter
        nn.init.normal_(self.key_norm.weight, std=2.0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    """Holds the parts that a block uses; it is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), QKNorm(WIDTH // HEADS)


class Modulation(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, count * WIDTH)
        self.count = count

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(torch.nn.functional.silu(vec))[:, None].chunk(self.count, -1)


def heads_of(qkv: Tensor) -> Tensor:
    return qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)


class DoubleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.hidden_size = HEADS, WIDTH
        for name in ("img", "txt"):
            setattr(self, f"{name}_mod", Modulation(6))
            setattr(self, f"{name}_norm1", nn.LayerNorm(WIDTH))
            setattr(self, f"{name}_attn", SelfAttention())
            setattr(self, f"{name}_norm2", nn.LayerNorm(WIDTH))
            mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            setattr(self, f"{name}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        i = heads_of(self.img_attn.qkv((1 + img_mod[1]) * self.img_norm1(img) + img_mod[0]))
        t = heads_of(self.txt_attn.qkv((1 + txt_mod[1]) * self.txt_norm1(txt) + txt_mod[0]))
        img_q, img_k = self.img_attn.norm(i[0], i[1], i[2])
        txt_q, txt_k = self.txt_attn.norm(t[0], t[1], t[2])
        q, k, v = torch.cat([txt_q, img_q], 2), torch.cat([txt_k, img_k], 2), torch.cat([t[2], i[2]], 2)
        attn = attention(q, k, v, pe=pe)
        of_text, of_image = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]
        img = img + img_mod[2] * self.img_attn.proj(of_image)
        img = img + img_mod[5] * self.img_mlp((1 + img_mod[4]) * self.img_norm2(img) + img_mod[3])
        txt = txt + txt_mod[2] * self.txt_attn.proj(of_text)
        return img, txt + txt_mod[5] * self.txt_mlp((1 + txt_mod[4]) * self.txt_norm2(txt) + txt_mod[3])


class SingleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.linear1, self.linear2 = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.norm, self.pre_norm, self.modulation = QKNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH), Modulation(3)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1((1 + scale) * self.pre_norm(x) + shift).split([3 * WIDTH, 2 * WIDTH], -1)
        q, k, v = heads_of(qkv)
        q, k = self.norm(q, k, v)
        attn = attention(q, k, v, pe=pe)
        return x + gate * self.linear2(torch.cat([attn, torch.nn.functional.gelu(mlp)], 2))


class Flux(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.img_in, self.txt_in, self.time_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(5, WIDTH), nn.Linear(1, WIDTH)
        self.vector_in = nn.Linear(6, WIDTH)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(layers))
        self.single_blocks = nn.ModuleList(SingleStreamBlock() for _ in range(layers))
        self.final_layer = nn.Linear(WIDTH, CHANNELS)
        self.eval().requires_grad_(False)

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None) -> Tensor:
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.time_in(timesteps[:, None]) + self.vector_in(y) + guidance[:, None] / 10
        ids = torch.cat([txt_ids, img_ids], 1)
        pe = torch.cat([rope(ids[..., 1], WIDTH // HEADS // 2), rope(ids[..., 2], WIDTH // HEADS // 2)], -2)[:, None]
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        return self.final_layer(img[:, txt.shape[1] :])


def denoise(model: Flux, seed: int = 0, images: int = 2, steps: int = 5, rows: int = 4, columns: int = 5) -> Tensor:
    """FLUX's own loop: guidance is a number that the model is given, the image a sequence of patches."""
    draw = torch.Generator().manual_seed(seed)
    dtype = model.img_in.weight.dtype
    img, txt, y = (
        torch.randn(images, *shape, generator=draw).to(dtype) for shape in ((rows * columns, CHANNELS), (TEXT, 5), (6,))
    )
    img_ids = torch.zeros(rows, columns, 3)
    img_ids[..., 1] += torch.arange(rows)[:, None]
    img_ids[..., 2] += torch.arange(columns)
    ids = {"img_ids": img_ids.flatten(0, 1).repeat(images, 1, 1), "txt_ids": torch.zeros(images, TEXT, 3)}
    times = torch.linspace(1, 0, steps + 1).tolist()
    for now, then in pairwise(times):
        timesteps, guidance = (torch.full((images,), value, dtype=dtype) for value in (now, 4.0))
        img = img + (then - now) * model(img=img, txt=txt, y=y, timesteps=timesteps, guidance=guidance, **ids)
    return img
