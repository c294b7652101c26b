"""What a transformer's call takes and gives: latents and outputs, as a tensor, a list, a tuple, or a diffusers output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arrowhead.errors import InputsInvalid, NotIntercepted


def stacked(latents: Any) -> Tensor:
    """Latents (B, C, …), which some models take and give as a list with one for each image.

    Raises:
        InputsInvalid: they are no tensor, and no list of tensors of one shape.
    """
    if isinstance(latents, Tensor):
        return latents
    if isinstance(latents, list) and latents and all(isinstance(each, Tensor) for each in latents):
        if len({each.shape for each in latents}) == 1:
            return torch.stack(latents)
        shapes = ", ".join(str(tuple(each.shape)) for each in latents[:4])
        raise InputsInvalid(f"got latents of several shapes, {shapes}, in one batch; wanted one; generate them one by one")
    raise InputsInvalid(
        f"got a {type(latents).__name__} for latents, wanted a tensor (B, C, …), or a list with a tensor (C, …) for each image"
    )


def samples_of(outputs: Sequence[Any]) -> list[Tensor]:
    """The samples (B, C, …) of several calls' outputs, see `sample_of`.

    Raises:
        NotIntercepted: a sample is no tensor.
    """
    samples = [sample_of(output) for output in outputs]
    if not all(isinstance(sample, Tensor) for sample in samples):
        raise NotIntercepted(
            f"the transformer gave a {type(outputs[0]).__name__}; wanted a tensor, a list with one for each image, or a tuple "
            "that begins with either"
        )
    return samples


def sample_of(output: Any) -> Any:
    """The sample of an output: a list, one entry for each image, is stacked, (B, C, …); of other outputs the first entry."""
    first = output
    if not isinstance(output, Tensor | list):
        try:
            first = output[0]
        except (TypeError, LookupError):  # a plain dict, or an object
            return output
    if isinstance(first, list) and len({each.shape if isinstance(each, Tensor) else None for each in first}) == 1:
        return torch.stack(first) if isinstance(first[0], Tensor) else first
    return first


def output_with(output: Any, sample: Tensor) -> Any:
    """The same output with another sample (B, C, …), in the same form."""
    if isinstance(output, Tensor):
        return sample
    if isinstance(output, list):
        return list(sample)
    whole = list(sample) if isinstance(output[0], list) else sample
    if isinstance(output, tuple):
        return (whole, *output[1:])
    first, *_ = output
    return type(output)(**{**output, first: whole})


def run_forward(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output of a call whose arguments the loop may have made in torch.inference_mode, which the search may not be in."""

    def usable(value: Any) -> Any:
        if isinstance(value, list):  # HunyuanDiT empties the list that a ControlNet gave
            return [*map(usable, value)]
        made_there = isinstance(value, Tensor) and value.is_inference() and not torch.is_inference_mode_enabled()
        return value.clone() if made_there else value

    return forward(*map(usable, args), **{name: usable(value) for name, value in kwargs.items()})
