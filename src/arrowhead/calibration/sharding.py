"""Prompts split among processes: each process generates its share of the images, and a search decides by the images of all.

Values that decide are first joined, in the order of the prompts, and decisions are taken from the first process. So all
processes go through a search alike, and end with the plan that one process finds on all prompts, but for rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from arrowhead.errors import InputsInvalid

T = TypeVar("T")
SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class Share:
    """This process's images: `sizes` are the numbers of images of all processes, `rank` is this process's place among them."""

    rank: int = 0
    sizes: tuple[int, ...] = (0,)

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return len(self.sizes) == 1

    def of_all(self, images: int) -> int:
        """The number of all processes' images, given the number `images` that this process generates.

        Raises:
            InputsInvalid: this process was to generate another number.
        """
        if self.alone:
            return images
        if images != self.sizes[self.rank]:
            raise InputsInvalid(
                f"got {images} images of {self.sizes[self.rank]} prompts in process {self.rank}; wanted one of each; name all "
                "arguments that have one entry for each prompt in `shard`"
            )
        return sum(self.sizes)

    def own(self, rows: Tensor) -> Tensor:
        """This process's rows (b, …), of rows for all images (B, …)."""
        first = sum(self.sizes[: self.rank])
        return rows if self.alone else rows[first : first + self.sizes[self.rank]]

    def joined(self, rows: Tensor) -> Tensor:
        """All processes' rows (k·B, …), of this process's rows (k·b, …) of k branches, one branch after the other."""
        if self.alone:
            return rows
        return cat_images(self.each(rows.detach().cpu()), self.sizes).to(rows.device)

    def pooled(self, moments: Tensor) -> Tensor:
        """The moments (3, …) over all images, float32, of those over this process's images.

        The moments are a mean square, a mean, and the variance around that mean.
        """
        if self.alone:
            return moments
        weights = torch.tensor(self.sizes, dtype=torch.float64)[:, None, *(None,) * (moments.ndim - 1)] / sum(self.sizes)
        parts = torch.stack(self.each(moments.cpu())).double()  # (processes, 3, …)
        square, mean, variance = (parts * weights).sum(0)
        spread = ((parts[:, 1] - mean).square() * weights[:, 0]).sum(0)
        return torch.stack([square, mean, variance + spread]).float()

    def each(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        found: list[Any] = [None] * len(self.sizes)
        dist.all_gather_object(found, value)
        return found

    def agreed(self, value: T) -> T:
        """The first process's value: rounding may differ between machines, and decisions may not."""
        if self.alone:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]


ALONE = Share()


@dataclass(frozen=True)
class Part(Share):
    """One prompt of several that one process runs one after another; what they give is joined when all have run."""

    def joined(self, rows: Tensor) -> Tensor:
        """This prompt's rows."""
        return rows

    def each(self, value: T) -> list[T]:
        """The value alone: there is one process."""
        return [value]

    def agreed(self, value: T) -> T:
        """The value: there is one process."""
        return value


def cat_images(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The rows of all images (k·B, …), of the rows of parts (k·b, …) for k branches, one branch after the other."""
    split = [part.reshape(len(part) // size, size, *part.shape[1:]) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(split, 1).flatten(0, 1)


BY_PROMPT = (
    "prompt",
    "negative_prompt",
    "pooled_prompt",
    "negative_pooled_prompt",
    "class_labels",
    "generator",
    "latents",
)
"""What arguments of a pipeline's call begin with that may have one entry for each prompt."""
PICTURES = ("image", "video", "mask", "frames")
"""What names of arguments hold pictures by. A list of these may be one for each prompt, or references that prompts share."""


def _belongs_to_prompts(name: str, value: Any, count: int) -> bool:
    """Whether entries of an argument that is not in `BY_PROMPT` may belong to prompts, of which there are `count`."""
    is_picture = any(part in name for part in PICTURES) and not isinstance(value, int | float | None)
    return not name.startswith(BY_PROMPT) and (is_picture or _length(value) == count)


def one_by_one(inputs: Mapping[str, Any]) -> list[tuple[dict[str, Any], Share]]:
    """The arguments of a pipeline's call for each prompt alone, in order; of one prompt, these arguments.

    Raises:
        InputsInvalid: the arguments do not say how many prompts there are, what noise each picture begins with, or which
            prompt an entry belongs to.
    """
    lengths = {name: _length(value) for name, value in inputs.items() if name.startswith(BY_PROMPT)}
    count = max(lengths.values(), default=1)
    several = {name: inputs[name] for name in SEVERAL if inputs.get(name) not in (None, 1)}
    if count <= 1 and not several:
        return [(dict(inputs), ALONE)]
    noise = "generator" if inputs.get("generator") is not None else "latents"
    if several or lengths.get(noise) != count:
        raise InputsInvalid(
            f"got prompts to run one after another, and {several or f'{noise} for {lengths.get(noise, 0)} of {count}'}; wanted "
            "one picture for each prompt, and a list of generators, or latents, with an entry for each; repeat prompts, and "
            "give these, or run all at once"
        )
    if unclear := [name for name, value in inputs.items() if _belongs_to_prompts(name, value, count)]:
        raise InputsInvalid(
            f"got prompts to run one after another with {', '.join(unclear)}, which prompts may share or have an entry each; "
            "wanted no other lists than prompts, their embeddings, labels, generators and latents; run all at once"
        )
    split = [name for name, length in lengths.items() if length == count]
    return [
        (
            {name: value[i : i + 1] if name in split else value for name, value in inputs.items()},
            Part(i, (1,) * count),
        )
        for i in range(count)
    ]


def share_out(inputs: Mapping[str, Any], shard: Sequence[str]) -> tuple[dict[str, Any], Share]:
    """This process's arguments of the pipeline's call: of those that `shard` names its entries, and all others.

    Raises:
        InputsInvalid: there is no process group, the arguments cannot be split, or another process has other arguments.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputsInvalid(
            f"got shard={shard!r} without a process group; wanted torch.distributed initialised, as accelerate's PartialState "
            "does it; start with `accelerate launch`, or leave it out"
        )
    if isinstance(shard, str) or not shard or not all(isinstance(name, str) for name in shard):
        raise InputsInvalid(
            f"got shard={shard!r}, wanted names of the pipeline call's arguments, such as ('prompt', 'generator')"
        )
    lengths = {name: _length(inputs.get(name)) for name in shard}
    count = max(lengths.values())
    if min(lengths.values()) != count or count < dist.get_world_size():
        raise InputsInvalid(
            f"got entries {lengths} among the arguments to be split for {dist.get_world_size()} processes; wanted lists or "
            "tensors of one length, one entry for each prompt, and at least one prompt for each process"
        )
    if (inputs.get("generator") is not None and "generator" not in shard) or not {"generator", "latents"} & {*shard}:
        raise InputsInvalid(
            f"got shard={tuple(shard)!r}, which says nothing of the noise that pictures begin with; wanted a list of "
            "generators, one for each prompt, or latents, and one of 'generator', 'latents' among the names"
        )
    if several := {name: inputs[name] for name in SEVERAL if inputs.get(name) not in (None, 1)}:
        raise InputsInvalid(
            f"got {several} with shard={tuple(shard)!r}, wanted one picture for each prompt; repeat the prompts"
        )
    _require_alike(inputs, shard)
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = [count * i // world for i in range(world + 1)]
    own = slice(bounds[rank], bounds[rank + 1])
    arguments = {name: value[own] if name in shard else value for name, value in inputs.items()}
    return arguments, Share(rank, tuple(b - a for a, b in pairwise(bounds)))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim) else 0


def _require_alike(inputs: Mapping[str, Any], shard: Sequence[str]) -> None:
    """Check that every process was given the same arguments, as far as a description of them shows."""

    def described(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"tensor of shape {tuple(value.shape)}"
        if isinstance(value, torch.Generator):
            return f"seed {value.initial_seed()}"
        if isinstance(value, list | tuple):
            return ", ".join(map(described, value))
        return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"shard": ", ".join(shard), **{name: described(value) for name, value in inputs.items()}})
    for rank, other in enumerate(found):
        if differ := sorted(name for name in {*found[0], *other} if found[0].get(name) != other.get(name)):
            raise InputsInvalid(
                f"got other {', '.join(differ)} in process {rank} than in the first; wanted the same arguments in all: each "
                "process takes its share of them"
            )
