"""Operands for tests of the fused kernel's operators. Skips the tests where Triton can neither interpret nor run."""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the fused kernel cannot run")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no device, and Triton was told not to interpret", allow_module_level=True)

from arrowhead.kernels import reference
from arrowhead.kernels.call import Call, Policy
from arrowhead.kernels.triton import ops
from arrowhead.kernels.triton.launch_table import CACHED, FULL, Config

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
interpreted = pytest.mark.skipif(CUDA, reason="of tensors on a CPU")
SMALL = Config(16, 16, 4, 2)


def close(got, wanted):
    torch.testing.assert_close(got.float(), wanted.float(), atol=TOLERANCE[got.dtype], rtol=TOLERANCE[got.dtype])


def inputs(tokens, radii, dim=64, batch=2, dtype=DTYPE, seed=0, adds=None, eights=None):
    """All operands of an operator, as processors make them: (B, H, N, D) views of (B, N, H, D).

    `radii` are as the policy has them. The buffers hold noise, by which it is told who was left alone. `eights` say which heads
    are in int8; then all is in multiples of 1/256, so that sums are exact, and what is rounded is the same in any order.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(length):
        values = torch.randn(batch, length, len(radii), dim, generator=generator)
        return (values if eights is None else (256 * values).round() / 256).to(DEVICE, dtype).transpose(1, 2)

    columns = [radii, adds or [0] * len(radii), *([] if eights is None else [eights])]
    policy = torch.tensor([*zip(*columns, strict=True)])
    return SimpleNamespace(
        out=noise(tokens.total),
        residual=noise(tokens.visual),
        q=noise(tokens.total),
        k=noise(tokens.total),
        v=noise(tokens.total),
        policy=policy.to(DEVICE, torch.int32),
        seen=None,
        scale=1.2 * dim**-0.5,
        image=(tokens.visual, tokens.visual_slice.start),
    )


def attended(x, tokens, radii):
    """The reference kernel's attention for a policy's radii and precisions, (B, H, N, D)."""
    mask = None if x.seen is None else x.seen[:, None, None]
    radii = [None if radius in {FULL, CACHED} else radius for radius in radii]
    eights = x.policy[:, 2].tolist() if x.policy.shape[-1] > 2 else [0] * len(radii)
    policies = tuple(Policy(radius, "int8" if eight else "native") for radius, eight in zip(radii, eights, strict=True))
    return reference.attend(Call(x.q.float(), x.k.float(), x.v.float(), tokens, policies, x.scale, mask))


def arrow(x, *, residual=True):
    ops.arrow(
        x.out, x.q, x.k, x.v, x.policy, x.residual if residual else None, x.seen, *x.image, x.scale
    )  # fmt: skip


def full_and_residual(x):
    ops.full_and_residual(x.out, x.residual, x.q, x.k, x.v, x.policy, x.seen, *x.image, x.scale)


def random_keys(tokens, radii, batch, seed=0):
    """A mask of keys, (B, N), under which every query sees one: a text token, or one within every radius."""
    seen = torch.rand(batch, tokens.total, generator=torch.Generator().manual_seed(seed)) < 0.5
    if tokens.text:
        seen[:, tokens.text_slice.start] = True
    else:
        seen[:, :: min([tokens.visual, *(radius for radius in radii if radius >= 0)]) + 1] = True
    return seen.to(DEVICE)
