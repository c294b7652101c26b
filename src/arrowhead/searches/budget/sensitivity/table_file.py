"""The file of a sensitivity table: tensors as safetensors, and everything else as JSON in the file's header."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.plans import atomic_write, limits
from arrowhead.plans.about import About
from arrowhead.plans.cells import Precision, Radius
from arrowhead.plans.layout import Branches, Site, Tokens
from arrowhead.plans.target import Target

FORMAT = 7
READABLE = (4, 5, 6, FORMAT)
"""Format 6 has no noise levels, format 5 no grids or second transformer, format 4 no precisions either."""
TENSORS = {"outputs": "outputs", "residuals": "residuals", "quantisation_errors": "roundings"}
"""The names of the tensors: in a table, and in its file."""


class _Header(pydantic.BaseModel, extra="forbid"):
    """All of a table but its tensors. The aliases are the keys in the file."""

    format: int
    target: Target
    tokens: Tokens
    branches: Branches
    radii: tuple[Radius, ...]
    ages: int
    sampler_gains: tuple[float, ...] = pydantic.Field(alias="gains")
    final: float
    elements: int
    other_flops: float
    images: int
    regions: int
    itemsize: int
    model_feedback: tuple[float, ...] = pydantic.Field(alias="answers")
    feedback: float
    blocks: tuple[Site, ...]
    switch: int | None = None
    precisions: tuple[Precision, ...] = ()
    other_texts: bool = False
    about: About


def write_table(path: str | Path, fields: Mapping[str, Any]) -> None:
    """Write the fields of a table to a file, completely or not at all."""
    stored = _stored_tensors(fields["precisions"])
    keys = {name: info.alias or name for name, info in _Header.model_fields.items() if name != "format"}
    header = _Header(format=FORMAT, **{key: fields[name] for name, key in keys.items()})
    content = json.dumps(header.model_dump(mode="json", by_alias=True), default=str, allow_nan=False)
    tensors = {key: fields[name].contiguous() for name, key in stored.items()}
    atomic_write.write(path, save(tensors, metadata={"arrowhead": content}))


def read_table(path: str | Path) -> dict[str, Any]:
    """The fields of the table in a file.

    Raises:
        InputsInvalid: the file is no such table, or contradicts itself.
    """
    unsound = f"{path} is no sound table; wanted a file that Table.save wrote."
    try:
        with safe_open(path, "pt") as file:
            content = (file.metadata() or {}).get("arrowhead", "{}")
            limits.require_length(content)
            limits.parse_json(content)
            header = _Header.model_validate_json(content, strict=True)
            tensors = {key: file.get_tensor(key) for key in _stored_tensors(header.precisions).values()}
    except (OSError, SafetensorError, ValueError) as error:  # a ValidationError is a ValueError
        raise InputsInvalid(f"{unsound} {limits.shortened(error)}") from error
    try:
        fault = next(_faults(header, tensors), None)
        limits.require_sizes(len(header.sampler_gains), header.tokens, (*header.target.sites, *header.blocks))
    except ValueError as error:
        fault = str(error)
    if fault:
        raise InputsInvalid(f"{unsound} {fault}")
    fields = {name: getattr(header, name) for name in _Header.model_fields if name != "format"}
    return fields | {name: tensors[key] for name, key in TENSORS.items() if key in tensors}


def _stored_tensors(precisions: Sequence[Precision]) -> dict[str, str]:
    """The tensors that a table of these precisions has, as in `TENSORS`."""
    return {name: key for name, key in TENSORS.items() if precisions or name != "quantisation_errors"}


def _faults(header: _Header, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with a file, one after the other: each check assumes that those before it found nothing."""
    if header.format not in READABLE:
        yield f"got format {header.format}, wanted {' or '.join(map(str, READABLE))}"
    gains, feedback, steps = header.sampler_gains, header.model_feedback, len(header.sampler_gains)
    sizes = {"steps": steps, "ages": header.ages, "elements": header.elements, "images": header.images}
    sizes |= {"regions": header.regions, "itemsize": header.itemsize, "sites": len(header.target.sites)}
    sizes |= {} if header.switch is None else {"switch + 1": header.switch + 1, "steps - switch": steps - header.switch}
    if small := [f"{name} {value}" for name, value in sizes.items() if value < 1]:
        yield f"got {', '.join(small)}, wanted at least 1"
    of_tokens = [radius for radius in header.radii if isinstance(radius, int)]
    values, above = (*gains, header.other_flops, *of_tokens), (*feedback, header.final)
    if not all(0 <= value < math.inf for value in values) or not all(0 < value < math.inf for value in above):
        yield "got gains, answers, FLOPs, radii or a final square below 0 or not finite"
    if header.target.levels is not None and len(header.target.levels) != steps:
        yield f"got {len(header.target.levels)} noise levels for {steps} steps, wanted one for each"
    if len(feedback) not in (0, steps) or not 0 <= header.feedback <= 1:
        yield f"got {len(feedback)} answers to the power {header.feedback}, wanted one a step, and a power of 0 to 1"
    if strange := [block.path for block in header.blocks if not block.made_of(header.target.sites)]:
        yield f"got blocks {', '.join(strange)}, wanted such as compute sites of the table"
    if header.tokens.grid is None and len(of_tokens) < len(header.radii):
        yield "got boxes for tokens of no grid"
    if "native" in header.precisions or len(set(header.precisions)) < len(header.precisions):
        yield f"got precisions {header.precisions}, wanted others than native, each once"
    yield from _tensor_faults(header, tensors)


def _tensor_faults(header: _Header, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """How the tensors of a file do not fit its header."""
    if not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
        yield "got tensors that are not float32, or not finite"
    heads, pairs = sum(site.heads for site in header.target.sites), 3 if header.branches.guided else 1
    products = tensors["outputs"].shape[-1] if tensors["outputs"].ndim == 5 else 0
    if products < 1 or products % header.regions:
        yield f"got {products} products of each kind, wanted a multiple of {header.regions} regions"
    steps, each = len(header.sampler_gains), (header.ages + 1, pairs, products)
    shapes = {
        "outputs": (steps, heads, *each),
        "residuals": (steps, heads, len(header.radii), *each),
        "roundings": (steps, heads, len(header.precisions), *each),
    }
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[key]:
            yield f"got {key} of shape {tuple(tensor.shape)}, wanted {shapes[key]}"
