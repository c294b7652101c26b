"""The only door to the kernels. An explicit choice never falls back; `auto` picks, and says what it picked."""

from collections.abc import Callable, Sequence

from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import chunked, flex, reference
from arrowhead.layout import Tokens

Kernel = Callable[[Tensor, Tensor, Tensor, Tokens, Sequence[int | None], float, Tensor | None], Tensor]

KERNELS: dict[str, Kernel] = {"chunked": chunked.attend, "flex": flex.attend, "reference": reference.attend}


def resolve(name: str) -> str:
    """The kernel's own name: `auto` picks one that runs everywhere.

    Raises:
        KernelUnavailable: there is no kernel of this name.
    """
    if name == "auto":
        return "chunked"
    if name not in KERNELS:
        raise KernelUnavailable(f"got kernel={name!r}, wanted one of auto, {', '.join(sorted(KERNELS))}")
    return name


def arrow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    radius: int | Sequence[int | None],
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Arrow attention of q, k, v, each (B, H, N, D) with N = `tokens.total`: (B, H, N, D).

    `radius` is one for all heads, or one for each, None where a head is full. `scale` multiplies the scores; D^−½ when it is
    None. `mask`, the model's own, is boolean (True: seen) or added to the scores, and broadcasts to (B, H, N, N).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    radii = (radius,) * q.shape[1] if isinstance(radius, int) else tuple(radius)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    return KERNELS[resolve(kernel)](q, k, v, tokens, radii, scale, mask)
