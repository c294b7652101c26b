"""The only entrance to the kernels: `attend` runs a call by the kernel of a name.

A kernel that is chosen by name never falls back to another one. "auto" chooses, and `resolve` says which kernel that is.
"""

from collections.abc import Sequence

from torch import Tensor

from arrowhead.errors import KernelUnavailable
from arrowhead.kernels import flex, flop_formulas, reference
from arrowhead.kernels.call import Call, Kernel, Policy
from arrowhead.kernels.cpu import chunked
from arrowhead.kernels.head_index import head_index
from arrowhead.kernels.triton import api
from arrowhead.plans.cells import Box, Precision, Radius
from arrowhead.plans.layout import Tokens

KERNELS: dict[str, Kernel] = {
    "chunked": chunked.attend,
    "flex": flex.attend,
    "fused": api.attend,
    "reference": reference.attend,
}
ADD_RESIDUALS = {"fused"}
"""Kernels that add residuals while they write their output; `attend` adds them for the others."""
flop_formulas.register()


def require_kernel(name: str) -> str:
    """Returns `name`, checked to be the name of a kernel, or "auto".

    Raises:
        KernelUnavailable: there is no kernel of this name.
    """
    if not isinstance(name, str) or (name != "auto" and name not in KERNELS):
        raise KernelUnavailable(f"got kernel={name!r}, wanted one of auto, {', '.join(sorted(KERNELS))}")
    return name


def resolve(name: str, call: Call) -> str:
    """The kernel that `attend` runs for a call: "auto" is "fused" where that kernel can run it on CUDA, else "chunked".

    Raises:
        KernelUnavailable: there is no kernel of this name.
    """
    if require_kernel(name) != "auto":
        return name
    return "fused" if call.q.is_cuda and api.obstacle(call) is None else "chunked"


def attend(call: Call, kernel: str = "auto") -> Tensor:
    """Arrow attention of a call by a kernel, with residuals added: (B, H, N, D).

    Raises:
        KernelUnavailable: there is no such kernel, or it cannot compute the call.
    """
    name = resolve(kernel, call)
    out = KERNELS[name](call)
    if call.residual is not None and name not in ADD_RESIDUALS:
        index = head_index(call.adds, out.device)
        out[:, index, call.tokens.visual_slice] += call.residual[:, index]
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
    """Arrow attention, (B, H, N, D), with the arguments of `Call` in a convenient form.

    Args:
        q: queries, (B, H, N, D), where N = `tokens.total`.
        k: keys, (B, H, N, D), or fewer heads, a divisor of H: each is then repeated for as many consecutive heads of `q`.
        v: values, with as many heads as `k`.
        tokens: the sequence.
        radius: a radius in tokens, or a box, for all heads; or one for each head, None where a head is full.
        precision: the precision of the scores Q·Kᵀ, for all heads or for each head.
        scale: multiplies the scores; D^−½ if None.
        mask: the model's own mask, which broadcasts to (B, H, N, N): boolean (True: the query sees the key), or added to the
            scores.
        kernel: the name of a kernel, or "auto".

    Raises:
        KernelUnavailable: there is no such kernel, or it cannot compute the call.
    """
    radii = (radius,) * q.shape[1] if isinstance(radius, int | Box) else tuple(radius)
    precisions = (precision,) * q.shape[1] if isinstance(precision, str) else tuple(precision)
    if k.shape[1] < q.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(Call(q, k, v, tokens, tuple(map(Policy, radii, precisions)), scale, mask), kernel)
