"""DiTFastAttn (arXiv:2406.08552) from its formulas, in one file and without arrowhead's engine. Runs in seconds, offline.

Of arrowhead it takes the bundled DiT alone. A letter says what each layer's self-attention does in each step:

    F  full attention
    W  WA-RS: window attention with residual sharing
    R  AST: attention sharing across timesteps
    C  ASC: attention sharing across the two branches of classifier-free guidance (CFG)
    V  WA-RS + ASC

Shapes: B samples, the conditional ones first and then as many unconditional ones; N tokens; H heads of D channels; c = H·D.
The window is a mask here. That gives the right numbers, but only a kernel that skips the masked pairs saves time.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import arrowhead as ah

PLAN = (  # a string for each step, a letter for each layer; the paper's search found it for this model, at δ = 0.1
    "FFFFFFFF",
    "FCWVVWWV",
    "FVWVVCCC",
    "FWCVWVCR",
    "WCRVCVVV",
    "CVVVRWCV",
    "WCRVVCVW",
    "CVCVVVWC",
    "CCVVWVCW",
    "FCCCCVWW",
)


def radius(n: int) -> int:
    """How far the window reaches on each side: w = N/8 tokens."""
    return n // 8


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """W: attention in which token i sees the tokens j with |i − j| ≤ w."""
    i = torch.arange(q.shape[2], device=q.device)
    return scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] - i).abs() <= radius(len(i)))  # mask: (N, N)


def conditional(x: Tensor) -> Tensor:
    """The conditional half of a batch with CFG. In a DiT's it comes first."""
    return x[: len(x) // 2]


def residual_rows(column: str, step: int, samples: int) -> int:
    """How many of B samples R is made for: all if a W reads it before the next F or C, half if only V does, else none."""
    readers = re.split("[FC]", column[step + 1 :])[0]  # `column` holds the letters of one layer
    return samples if "W" in readers else samples // 2 if "V" in readers else 0


class CompressedAttention:
    """The self-attention of one layer in one generation. It is a processor of diffusers, which calls it in each step."""

    def __init__(self, column: str) -> None:
        self.column, self.step = column, -1
        self.output: Tensor  # what the layer's attention gave last, (B, N, c)
        self.residual: Tensor  # what the window missed, (B, H, N, D), or (B/2, H, N, D) where only V reads it

    def __call__(self, attn: Any, x: Tensor, **_: Any) -> Tensor:
        """What the layer's attention gives for x, (B, N, c)."""
        self.step += 1
        letter = self.column[self.step]
        if letter == "R":  # AST: no projection, no attention. What is kept stays, so R after R gives the same again.
            return self.output
        rows = residual_rows(self.column, self.step, len(x))
        if letter in "CV":  # ASC: the conditional branch alone
            x = conditional(x)  # (B, N, c) -> (B/2, N, c)
        q, k, v = (  # (B, N, c) -> (B, N, H, D) -> (B, H, N, D), of B/2 samples under ASC
            linear(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        if letter in "FC":  # O = softmax(Q·Kᵀ / √D)·V
            o = scaled_dot_product_attention(q, k, v)
            if rows:  # R = O − W, before the output projection; C makes it of the conditional half, for both
                residual = o[:rows] - window(q[:rows], k[:rows], v[:rows])
                self.residual = torch.cat([residual, residual]) if letter == "C" else residual
        else:  # O = W + R, with the R of the last F or C; V takes the conditional half of R, which comes first
            o = window(q, k, v) + self.residual[: len(q)]
        out = attn.to_out[0](o.transpose(1, 2).flatten(2))  # (B, H, N, D) -> (B, N, H, D) -> (B, N, c)
        self.output = torch.cat([out, out]) if letter in "CV" else out  # ASC: (B/2, N, c) -> (B, N, c), the same for both
        return self.output


def compress(pipe: Any, plan: Sequence[str]) -> None:
    """Put the plan on a pipeline, for one generation of as many steps."""
    for block, letters in zip(pipe.transformer.transformer_blocks, zip(*plan, strict=True), strict=True):
        block.attn1.set_processor(CompressedAttention("".join(letters)))


def flops_left(plan: Sequence[str], n: int, c: int) -> tuple[float, float]:
    """Which part is left: of attention's two matmuls, 4·N²·c; and with its four projections, 8·N·c², as the paper counts."""
    band = n * (2 * radius(n) + 1) - radius(n) * (radius(n) + 1)  # pairs of tokens in the window, out of N²
    samples = pairs = 0  # an image has two samples, one for each branch
    for column in map("".join, zip(*plan, strict=True)):
        for step, letter in enumerate(column):
            computed = {"F": 2, "W": 2, "C": 1, "V": 1, "R": 0}[letter]
            extra = min(computed, residual_rows(column, step, 2)) if letter in "FC" else 0  # the window pass that R costs
            samples += computed
            pairs += computed * (n**2 if letter in "FC" else band) + extra * band
    full = 2 * len(plan) * len(plan[0])
    return pairs / (full * n**2), (4 * pairs * c + 8 * samples * n * c**2) / (full * (4 * n**2 * c + 8 * n * c**2))


if __name__ == "__main__":
    pipe, inputs = ah.tiny.load("dit"), {"class_labels": [0, 8], "num_inference_steps": len(PLAN), "output_type": "pt"}
    raw = pipe(**inputs, generator=torch.Generator().manual_seed(1)).images  # (2, 3, 32, 32), from 0 to 1
    compress(pipe, PLAN)  # of 16 × 16 tokens, with 4 heads of 32 channels
    images = pipe(**inputs, generator=torch.Generator().manual_seed(1)).images
    print("FLOPs left: {:.1%} of attention, {:.1%} with its projections".format(*flops_left(PLAN, n=256, c=128)))
    print(f"PSNR to the raw images: {-10 * (images - raw).square().mean().log10():.1f} dB")
