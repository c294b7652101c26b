"""The output of a transformer's call, in its three forms: a tensor, a tuple, or a diffusers output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arrowhead.errors import NotIntercepted


def samples_of(outputs: Sequence[Any]) -> list[Tensor]:
    """The samples (B, C, …) of several calls' outputs, see `sample_of`.

    Raises:
        NotIntercepted: a sample is no tensor.
    """
    samples = [sample_of(output) for output in outputs]
    if not all(isinstance(sample, Tensor) for sample in samples):
        raise NotIntercepted(f"the transformer gave a {type(samples[0]).__name__}; wanted a tensor as its first output")
    return samples


def sample_of(output: Any) -> Any:
    """The sample of an output: its first entry. A list of latents, one for each image, is stacked: (B, C, …)."""
    first = output if isinstance(output, Tensor) else output[0]
    return torch.stack(first) if isinstance(first, list) else first


def output_with(output: Any, sample: Tensor) -> Any:
    """The same output with another sample (B, C, …), in the same form."""
    if isinstance(output, Tensor):
        return sample
    whole = list(sample) if isinstance(output[0], list) else sample
    if isinstance(output, tuple):
        return (whole, *output[1:])
    first, *_ = output
    return type(output)(**{**output, first: whole})
