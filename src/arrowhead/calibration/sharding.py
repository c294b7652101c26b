"""Prompts shared out among processes: each runs the pipeline on its own, and what a search goes by is that of all of them.

Whatever is compared is put together first, in the order of the prompts, and decisions are the first process's. So all of them
take the same way through a search, and end with the plan that one process finds on all prompts, but for rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.models.custom import CustomModel

T = TypeVar("T")
SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class Share:
    """This process's part of all images: how many each of the processes has, and which one this is."""

    rank: int = 0
    sizes: tuple[int, ...] = (0,)

    @property
    def alone(self) -> bool:
        """Whether there is but one process."""
        return len(self.sizes) == 1

    def of_all(self, images: int) -> int:
        """All processes' images, of which this one has so many.

        Raises:
            InputsInvalid: it was to have another number.
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
        """This process's rows (b, …) of those of all images (B, …)."""
        first = sum(self.sizes[: self.rank])
        return rows if self.alone else rows[first : first + self.sizes[self.rank]]

    def joined(self, rows: Tensor) -> Tensor:
        """All processes' rows of what this one has, (k·b, …) -> (k·B, …): one branch after the other."""
        if self.alone:
            return rows
        parts = self.each(rows.detach().cpu())
        split = [part.reshape(len(part) // size, size, *part.shape[1:]) for part, size in zip(parts, self.sizes, strict=True)]
        return torch.cat(split, 1).flatten(0, 1).to(rows.device)

    def pooled(self, moments: Tensor) -> Tensor:
        """Over all images, of (3, …) over this process's: a mean square, a mean, and the variance around that, float32."""
        if self.alone:
            return moments
        weights = torch.tensor(self.sizes, dtype=torch.float64)[:, None, *(None,) * (moments.ndim - 1)] / sum(self.sizes)
        parts = torch.stack(self.each(moments.cpu())).double()  # (processes, 3, …)
        square, mean, variance = (parts * weights).sum(0)
        spread = ((parts[:, 1] - mean).square() * weights[:, 0]).sum(0)
        return torch.stack([square, mean, variance + spread]).float()

    def each(self, value: T) -> list[T]:
        """What every process has, by rank."""
        found: list[Any] = [None] * len(self.sizes)
        dist.all_gather_object(found, value)
        return found

    def agreed(self, value: T) -> T:
        """What the first process has: rounding may differ from machine to machine, and what follows may not."""
        if self.alone:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]


ALONE = Share()


class Part(dict[str, Any]):
    """A process's arguments of a pipeline's call: its own prompts'. `whole` are those of all."""

    def __init__(self, own: Mapping[str, Any], share: Share, whole: Mapping[str, Any]) -> None:
        super().__init__(own)
        self.share, self.whole = share, whole


def share_of(inputs: Mapping[str, Any]) -> Share:
    """Whose images a call with these arguments generates: all, unless they are a part."""
    return inputs.share if isinstance(inputs, Part) else ALONE


def part_of(pipe: Any, inputs: Mapping[str, Any], shard: Sequence[str]) -> Part:
    """This process's part of the inputs: of the arguments that `shard` names its entries, all others as they are.

    Raises:
        InputsInvalid: there are no processes, or the arguments cannot be split, or are others in another process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputsInvalid(
            f"got shard={shard!r} without a process group; wanted torch.distributed initialised, as accelerate's PartialState "
            "does it; start with `accelerate launch`, or leave it out"
        )
    if isinstance(pipe, CustomModel) or isinstance(shard, str) or not shard or not all(isinstance(name, str) for name in shard):
        raise InputsInvalid(
            f"got shard={shard!r} for a {type(pipe.transformer).__name__}, wanted names of a pipeline call's arguments, such "
            "as ('prompt', 'generator'); a callable that generates cannot be split"
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
    share = Share(rank, tuple(b - a for a, b in pairwise(bounds)))
    own = slice(bounds[rank], bounds[rank + 1])
    return Part({name: value[own] if name in shard else value for name, value in inputs.items()}, share, inputs)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim) else 0


def _require_alike(inputs: Mapping[str, Any], shard: Sequence[str]) -> None:
    """Every process is to be given the same: whatever can be said of it in words."""

    def said(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"tensor of shape {tuple(value.shape)}"
        if isinstance(value, torch.Generator):
            return f"seed {value.initial_seed()}"
        if isinstance(value, list | tuple):
            return ", ".join(map(said, value))
        return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__

    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, {"shard": ", ".join(shard), **{name: said(value) for name, value in inputs.items()}})
    for rank, other in enumerate(told):
        if differ := sorted(name for name in {*told[0], *other} if told[0].get(name) != other.get(name)):
            raise InputsInvalid(
                f"got other {', '.join(differ)} in process {rank} than in the first; wanted the same arguments in all: each "
                "takes its part by itself"
            )
