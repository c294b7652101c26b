"""A fingerprint of a model's weights, by which a plan notices that it meets other weights of the same shapes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

SAMPLES = 32
"""Numbers in a fingerprint."""


def fingerprint(transformers: Iterable[nn.Module]) -> str | None:
    """Returns 32 numbers, spread over the parameters of the transformers, as hexadecimal digits of bfloat16.

    LoRA layers that are not fused are no part of it. None where the weights cannot be read: on the meta device, offloaded,
    quantised, or in less than 16 bits.

    >>> fingerprint([nn.Linear(2, 2, device="meta")]) is None
    True
    """
    weights = [weight for transformer in transformers for weight in _weights(transformer)]
    if not weights:
        return None
    picked = [weights[i * len(weights) // SAMPLES] for i in range(SAMPLES)]
    try:
        numbers = [weight.detach().flatten()[_place(i, weight.numel())] for i, weight in enumerate(picked)]
        values = torch.stack([number.to("cpu", torch.float32) for number in numbers]).bfloat16()
    except (RuntimeError, NotImplementedError, TypeError):  # weights that are no plain tensors
        return None
    return values.view(torch.uint8).numpy().tobytes().hex()


def same_weights(mine: str | None, theirs: str | None) -> bool:
    """Whether two fingerprints are those of the same weights, in whichever dtypes, or one of them is not known."""
    if mine is None or theirs is None:
        return True
    a, b = _values(mine), _values(theirs)
    return len(a) == len(b) and torch.allclose(a, b, rtol=2**-6, atol=1e-30)  # two steps of bfloat16


def _weights(transformer: nn.Module) -> Sequence[Tensor]:
    """The parameters without those of LoRA, in the order of their names."""
    named = {name.replace("base_layer.", ""): weight for name, weight in transformer.named_parameters() if "lora_" not in name}
    weights = [weight for _, weight in sorted(named.items()) if weight.numel()]
    readable = all(weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta for weight in weights)
    return weights if readable else ()


def _place(i: int, count: int) -> int:
    """The place of the i-th number in a parameter of so many."""
    return (i * 7919 + count // 3) % count


def _values(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).float()
