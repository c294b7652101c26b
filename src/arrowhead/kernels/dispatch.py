"""The only door to the kernels. An explicit choice never falls back; `auto` picks, and says what it picked."""

from collections.abc import Callable, Sequence

from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import chunked, flex, fused, reference
from arrowhead.layout import Tokens
from arrowhead.methods import Precision

Kernel = Callable[[Tensor, Tensor, Tensor, Tokens, Sequence[int | None], Sequence[Precision], float, Tensor | None], Tensor]

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
    name: str, q: Tensor, scale: float | None = None, mask: Tensor | None = None, precisions: Sequence[Precision] = ()
) -> str:
    """The kernel that `arrow` runs for these arguments: `auto` is `fused` on a device that can, and else `chunked`.

    Raises:
        KernelUnavailable: there is no kernel of this name.
    """
    if known(name) != "auto":
        return name
    able = q.is_cuda and fused.obstacle(q, _scale(q, scale), _of_four(mask), precisions) is None
    return "fused" if able else "chunked"


def arrow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    radius: int | Sequence[int | None],
    *,
    precision: Precision | Sequence[Precision] = "native",
    scale: float | None = None,
    mask: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Arrow attention of q, k, v, each (B, H, N, D) with N = `tokens.total`: (B, H, N, D).

    k and v may have fewer heads, a divisor of H, each for as many heads of q in a row; they are repeated for the kernels.

    `radius` is one for all heads, or one for each, None where a head is full, and so is `precision`, of the product Q·Kᵀ.
    `scale` multiplies the scores; D^−½ when it is None. `mask`, the model's own, is boolean (True: seen) or added to the
    scores, and broadcasts to (B, H, N, N).
    """
    radii = (radius,) * q.shape[1] if isinstance(radius, int) else tuple(radius)
    precisions = (precision,) * q.shape[1] if isinstance(precision, str) else tuple(precision)
    attend = KERNELS[resolve(kernel, q, scale, mask, precisions)]
    if k.shape[1] < q.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    return attend(q, k, v, tokens, radii, precisions, _scale(q, scale), _of_four(mask))


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _of_four(mask: Tensor | None) -> Tensor | None:
    """A mask with all four dimensions."""
    return None if mask is None else mask[(None,) * (4 - mask.ndim)]
