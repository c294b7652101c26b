"""The only door to the kernels. An explicit choice never falls back; `auto` picks, and says what it picked."""

from collections.abc import Sequence

from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import chunked, flex, fused, reference
from arrowhead.kernels.call import Call, Kernel, Policy
from arrowhead.layout import Tokens
from arrowhead.methods import Box, Precision, Radius

KERNELS: dict[str, Kernel] = {
    "chunked": chunked.attend,
    "flex": flex.attend,
    "fused": fused.attend,
    "reference": reference.attend,
}


def known(name: str) -> str:
    """The name of a kernel, or `auto`.

    Raises:
        KernelUnavailable: there is no kernel of this name.
    """
    if name != "auto" and name not in KERNELS:
        raise KernelUnavailable(f"got kernel={name!r}, wanted one of auto, {', '.join(sorted(KERNELS))}")
    return name


def resolve(
    name: str, q: Tensor, scale: float | None = None, mask: Tensor | None = None, policies: Sequence[Policy] = ()
) -> str:
    """The kernel that `arrow` runs for these arguments: `auto` is `fused` on a device that can, and else `chunked`.

    Raises:
        KernelUnavailable: there is no kernel of this name.
    """
    if known(name) != "auto":
        return name
    able = q.is_cuda and fused.obstacle(q, _scale(q, scale), _of_four(mask), policies) is None
    return "fused" if able else "chunked"


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

    `radius`, in tokens or a box in their grid, is one for all heads, or one for each, None where a head is full, and so is
    `precision`, of the product Q·Kᵀ.
    `scale` multiplies the scores; D^−½ when it is None. `mask`, the model's own, is boolean (True: seen) or added to the
    scores, and broadcasts to (B, H, N, N).
    """
    radii = (radius,) * q.shape[1] if isinstance(radius, int | Box) else tuple(radius)
    precisions = (precision,) * q.shape[1] if isinstance(precision, str) else tuple(precision)
    policies = tuple(map(Policy, radii, precisions))
    return attend(q, k, v, tokens, policies, scale=scale, mask=mask, kernel=kernel)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    policies: Sequence[Policy],
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """`arrow` for what each head does."""
    own = KERNELS[resolve(kernel, q, scale, mask, policies)]
    return own(Call(q, k, v, tokens, tuple(policies), _scale(q, scale), _of_four(mask)))


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _of_four(mask: Tensor | None) -> Tensor | None:
    """A mask with all four dimensions."""
    return None if mask is None else mask[(None,) * (4 - mask.ndim)]
