"""The only door to the kernels. An explicit choice never falls back; `auto` picks, and says what it picked."""

from collections.abc import Callable

from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import chunked, reference
from arrowhead.layout import Tokens

Kernel = Callable[[Tensor, Tensor, Tensor, Tokens, int, float], Tensor]

KERNELS: dict[str, Kernel] = {"chunked": chunked.attend, "reference": reference.attend}


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
    q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, radius: int, *, scale: float | None = None, kernel: str = "auto"
) -> Tensor:
    """Arrow attention of q, k, v, each (B, H, N, D) with N = `tokens.total`: (B, H, N, D).

    `scale` multiplies the scores; D^−½ when it is None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return KERNELS[resolve(kernel)](q, k, v, tokens, radius, scale)
