"""The only door to the kernels. An explicit choice never falls back; `auto` picks, and says what it picked."""

from collections.abc import Sequence

from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import flex, reference
from arrowhead.kernels.call import Call, Kernel, Policy
from arrowhead.kernels.cpu import chunked
from arrowhead.kernels.head_index import places
from arrowhead.kernels.triton import api
from arrowhead.plans.cells import Box, Precision, Radius
from arrowhead.plans.layout import Tokens

KERNELS: dict[str, Kernel] = {
    "chunked": chunked.attend,
    "flex": flex.attend,
    "fused": api.attend,
    "reference": reference.attend,
}
ADDING = {"fused"}
"""Kernels that add residuals while they write."""


def known(name: str) -> str:
    """The name of a kernel, or `auto`.

    Raises:
        KernelUnavailable: there is no kernel of this name.
    """
    if not isinstance(name, str) or (name != "auto" and name not in KERNELS):
        raise KernelUnavailable(f"got kernel={name!r}, wanted one of auto, {', '.join(sorted(KERNELS))}")
    return name


def resolve(name: str, call: Call) -> str:
    """The kernel that `attend` runs for a call: `auto` is `fused` on a device that can, and else `chunked`.

    Raises:
        KernelUnavailable: there is no kernel of this name.
    """
    if known(name) != "auto":
        return name
    return "fused" if call.q.is_cuda and api.obstacle(call) is None else "chunked"


def attend(call: Call, kernel: str = "auto") -> Tensor:
    """Arrow attention of a call by a kernel, residuals added: (B, H, N, D)."""
    name = resolve(kernel, call)
    out = KERNELS[name](call)
    if call.residual is not None and name not in ADDING:
        where = places(call.adds, out.device)
        out[:, where, call.tokens.visual_slice] += call.residual[:, where]
    return out


def arrow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    radius: Radius | Sequence[Radius | None],
    *,
    precision: Precision | Sequence[Precision] = "native",
    scale: float | None = None,
    mask: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Arrow attention of q, k, v, each (B, H, N, D) with N = `tokens.total`: (B, H, N, D).

    k and v may have fewer heads, a divisor of H, each for as many heads of q in a row; they are repeated for the kernels.

    `radius`, in tokens or a box in their grid, is one for all heads, or one for each, None where a head is full, and so is
    `precision`, of the product Q·Kᵀ.
    `scale` multiplies the scores; D^−½ when it is None. `mask`, the model's own, is boolean (True: seen) or added to the
    scores, and broadcasts to (B, H, N, N).
    """
    radii = (radius,) * q.shape[1] if isinstance(radius, int | Box) else tuple(radius)
    precisions = (precision,) * q.shape[1] if isinstance(precision, str) else tuple(precision)
    if k.shape[1] < q.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(Call(q, k, v, tokens, tuple(map(Policy, radii, precisions)), scale, mask), kernel)
