"""The file of a profile: tensors as safetensors, the large one in 16 bits, and all else as JSON in the file's header."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.plans import atomic_write, limits
from arrowhead.plans.about import About, about_in_file
from arrowhead.plans.layout import Branches, Tokens
from arrowhead.plans.target import Target

if TYPE_CHECKING:  # profile.py imports this file
    from arrowhead.searches.stack.profile import Profile

FORMAT = 1
MAX_BYTES = 2**26
"""Bytes of a file. A profile of 50 steps has less than 4 MiB."""
MAX_STEPS_TIMES_AGES = 2**12
"""The time to solve grows with its square: 125 steps of 16 ages take four seconds, 1000 would take minutes."""


class _Header(pydantic.BaseModel, extra="forbid"):
    """All of a profile but its tensor, which is stored over `scales`, one for each step."""

    format: int
    target: Target
    tokens: Tokens
    branches: Branches
    sampler_gains: tuple[float, ...]
    model_feedback: tuple[float, ...]
    final: float
    flops: tuple[float, float]
    seconds: tuple[float, float]
    switch: int | None = None
    scales: tuple[float, ...]
    about: About


def write_profile(path: str | Path, profile: "Profile") -> None:
    """Write a profile to a file, completely or not at all."""
    if fault := next(_too_long(profile.steps, profile.ages), None):
        raise InputsInvalid(f"{fault}; resample the profile to fewer steps")
    scales = profile.changes.abs().amax((1, 2, 3)).clamp_min(1e-30)
    names = _Header.model_fields.keys() - {"format", "scales", "about"}
    header = _Header(
        format=FORMAT,
        scales=tuple(scales.tolist()),
        about=about_in_file(profile.about, InputsInvalid),
        **{name: getattr(profile, name) for name in names},
    )
    content = json.dumps(header.model_dump(mode="json", by_alias=True), allow_nan=False)
    tensors = {"changes": (profile.changes / scales[:, None, None, None]).half().contiguous(), "products": profile.products}
    atomic_write.write(path, save(tensors, metadata={"arrowhead_profile": content}))


def read_profile(path: str | Path) -> dict[str, Any]:
    """The fields of the profile in a file.

    Raises:
        InputsInvalid: the file is no such profile, or contradicts itself.
    """
    unsound = f"{path} is no sound profile; wanted a file that Profile.save wrote."
    try:
        if (size := Path(path).stat().st_size) > MAX_BYTES:
            raise ValueError(f"got {size} bytes, wanted {MAX_BYTES} at most")
        with safe_open(path, "pt") as file:
            content = (file.metadata() or {}).get("arrowhead_profile", "{}")
            limits.require_length(content)
            limits.parse_json(content)
            header = _Header.model_validate_json(content, strict=True)
            changes, products = file.get_tensor("changes"), file.get_tensor("products")
        limits.require_sizes(len(header.sampler_gains), header.tokens, header.target.sites)
    except (OSError, SafetensorError, ValueError) as error:  # a ValidationError is a ValueError
        raise InputsInvalid(f"{unsound} {limits.shortened(error)}") from error
    if fault := next(_faults(header, changes, products), None):
        raise InputsInvalid(f"{unsound} {fault}")
    fields = {name: getattr(header, name) for name in _Header.model_fields if name not in ("format", "scales")}
    return fields | {"changes": changes.float() * torch.tensor(header.scales)[:, None, None, None], "products": products}


def _faults(header: _Header, changes: Tensor, products: Tensor) -> Iterator[str]:
    """What is wrong with a file, one after the other: each check assumes that those before it found nothing."""
    steps, guided = len(header.sampler_gains), header.branches.guided
    if header.format != FORMAT:
        yield f"got format {header.format}, wanted {FORMAT}"
    if (
        not steps
        or len({steps, len(header.model_feedback), len(header.scales), len(header.target.levels or header.scales)}) > 1
    ):
        yield f"got {steps} gains and other numbers of feedbacks, scales or noise levels, wanted one for each step"
    values = (*header.sampler_gains, *header.model_feedback, *header.scales, *header.seconds, *header.flops)
    wholes = header.final, header.seconds[0], header.flops[0]
    if not all(0 <= value < math.inf for value in values) or not all(0 < value < math.inf for value in wholes):
        yield "got gains, scales, seconds, FLOPs or a norm below 0 or not finite"
    if [site.kind for site in header.target.sites] != ["stack"]:
        yield "got other sites than one stack"
    if header.switch is not None and not 0 < header.switch < steps:
        yield f"got switch={header.switch} with {steps} steps"
    if (changes.dtype, products.dtype) != (torch.float16, torch.float32):
        yield f"got tensors of {changes.dtype} and {products.dtype}, wanted float16 and float32"
    if not all(tensor.isfinite().all() for tensor in (changes, products)):
        yield "got tensors that are not finite"
    shape = tuple(changes.shape)
    if len(shape) != 4 or shape[0] != steps or shape[1] < 2 or shape[2] != 1 + guided or shape[3] < 1:
        yield f"got changes of shape {shape}, wanted ({steps}, ages + 1, {1 + guided}, sketch)"
    wanted = (steps, 1 + guided, shape[1], shape[1])
    if tuple(products.shape) != wanted:
        yield f"got products of shape {tuple(products.shape)}, wanted {wanted}"
    yield from _too_long(steps, shape[1] - 1)


def _too_long(steps: int, ages: int) -> Iterator[str]:
    """What is wrong with a profile that would take too long to solve."""
    if steps * ages > MAX_STEPS_TIMES_AGES:
        yield f"got {steps} steps of {ages} ages, {steps * ages} together, wanted {MAX_STEPS_TIMES_AGES} at most"
