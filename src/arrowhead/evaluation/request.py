"""What is generated: which input, which seed and which batch each image has, whoever generates it."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arrowhead.errors import InputsInvalid, InputsRepeated
from arrowhead.plans.target import to_json_value

PER_IMAGE = (
    "prompt",
    "prompt_2",
    "prompt_3",
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_3",
    "class_labels",
)
"""Arguments of a pipeline's call that are lists of one for each image; as one value they are the same for all.

So are tensors that have prompt in their name.
"""
RESERVED = ("generator", "output_type", "return_dict", "latents")
"""Arguments that say what the evaluation says by itself."""


@dataclass(frozen=True)
class Request:
    """Images 0, 1, 2, …: image i has item i mod n of each of the `rows`, n long, and a generator of seed `seed` + i.

    They are generated in batches whose places are fixed, so that an image is the same to the last bit in whatever process,
    and however often it was interrupted.
    """

    common: Mapping[str, Any]
    rows: Mapping[str, Sequence[Any] | Tensor]
    images: int
    seed: int = 0
    batch: int = 8

    @classmethod
    def of(cls, inputs: Mapping[str, Any], images: int, *, seed: int = 0, batch: int = 8) -> "Request":
        """From arguments of the pipeline's call: lists of prompts or labels have one for each image.

        Raises:
            InputsInvalid: there are none, or lists of them differ in length; or the arguments bring what is not theirs to say.
        """
        if images < 1 or batch < 1 or seed < 0:
            raise InputsInvalid(f"got {images} images in batches of {batch} from seed {seed}, wanted 1, 1 and 0 at least")
        if wrong := [name for name in RESERVED if name in inputs]:
            raise InputsInvalid(f"got {', '.join(wrong)} among the inputs; image i has seed {seed} + i; leave them out")
        for name in ("num_images_per_prompt", "num_videos_per_prompt"):
            if inputs.get(name, 1) != 1:
                raise InputsInvalid(f"got {name}={inputs[name]}, wanted 1, since every image has a seed; ask for more images")
        embedded = [name for name, value in inputs.items() if isinstance(value, Tensor) and "prompt" in name]
        varied = {name: inputs[name] for name in (*PER_IMAGE, *embedded) if inputs.get(name) is not None}
        lists = {
            name: value if isinstance(value, Tensor) else [*value]
            for name, value in varied.items()
            if not isinstance(value, str | int)
        }
        lengths = {name: len(value) for name, value in lists.items()}
        if not varied or len({*lengths.values()}) > 1 or 0 in lengths.values():
            raise InputsInvalid(
                f"got lists {lengths or 'none'} among the inputs {sorted(inputs)}; wanted prompt or class_labels, and all "
                "lists of one length"
            )
        count = next(iter(lengths.values()), 1)
        rows = {name: lists.get(name, [value] * count) for name, value in varied.items()}
        common = {name: value for name, value in inputs.items() if name not in rows}
        if images % count and images > count:
            warnings.warn(
                f"{count} inputs for {images} images: the first {images % count} are drawn once more than the others; wanted "
                f"a multiple, such as {images - images % count} images",
                InputsRepeated,
                stacklevel=2,
            )
        return cls(common, rows, images, seed, batch)

    @property
    def inputs(self) -> int:
        """How long the rows are."""
        return len(next(iter(self.rows.values())))

    @property
    def batches(self) -> list[range]:
        """The images of each call of the pipeline; the last may have fewer."""
        return [range(at, min(at + self.batch, self.images)) for at in range(0, self.images, self.batch)]

    def row(self, name: str, images: Sequence[int]) -> Any:
        """What these images have of one of the rows: a list, or a tensor as it is one."""
        values = self.rows[name]
        places = [image % len(values) for image in images]
        return values[places] if isinstance(values, Tensor) else [values[place] for place in places]

    def call(self, images: Sequence[int]) -> dict[str, Any]:
        """Arguments of the pipeline's call that generates these images, on the CPU's generators, as diffusers advises."""
        generators = [torch.Generator().manual_seed(self.seed + image) for image in images]
        return {**self.common, **{name: self.row(name, images) for name in self.rows}, "generator": generators}

    def about(self) -> dict[str, Any]:
        """What decides the images, as JSON holds it; of long lists their length and hash. How many there are decides none."""
        rows = {
            name: values
            if len(values) <= 16 and not isinstance(values[0], list)
            else {"count": len(values), "sha256": digest(values)}
            for name, values in ((name, to_json_value(_listed(values))) for name, values in self.rows.items())
        }
        common = {name: to_json_value(value) for name, value in self.common.items()}
        return {"inputs": common, "per_image": rows, "first_seed": self.seed, "batch": self.batch}


def _listed(values: Sequence[Any] | Tensor) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def digest(value: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def captions(path: Path) -> list[str]:
    """Captions of a text file, one a line; or of a COCO-format JSON, one of each image: that with the lowest id.

    Raises:
        InputsInvalid: the file holds none, or an image or a line has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        read = _coco(json.loads(text)) if path.suffix == ".json" else dict(enumerate(text.splitlines(), 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputsInvalid(
            f"cannot read captions from {path}: {type(error).__name__} {error}; wanted a text file, a caption in each line, "
            "or a JSON as COCO's captions_val2014.json, with images and annotations"
        ) from error
    where = "images" if path.suffix == ".json" else "lines"
    missing = [name for name, caption in read.items() if not caption.strip()]
    if missing or not read:
        raise InputsInvalid(
            f"got {len(read)} captions in {path}, none in {where} {missing[:5]}; wanted one for each; write it, or take it out"
        )
    return [caption.strip() for caption in read.values()]


def _coco(read: Mapping[str, Any]) -> dict[Any, str]:
    found: dict[Any, str] = {image["id"]: "" for image in read["images"]}
    for annotation in sorted(read["annotations"], key=lambda annotation: annotation["id"], reverse=True):
        if annotation["image_id"] not in found:
            raise KeyError(f"annotation {annotation['id']} is of image {annotation['image_id']}, which is not among the images")
        found[annotation["image_id"]] = annotation["caption"]
    return found


@dataclass(frozen=True)
class Shard:
    """Which of how many processes this is: it takes every `count`-th batch from `index` on.

    `waits` where the others run beside it, and the first waits for them to merge what all made.
    """

    index: int = 0
    count: int = 1
    waits: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputsInvalid(f"got shard {self.index}/{self.count}, wanted i/n with i from 0 to n - 1, such as 0/4")

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From `i/n`."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise InputsInvalid(f"got shard {text!r}, wanted i/n with i from 0 to n - 1, such as 0/4")
        return cls(int(index), int(count))

    @classmethod
    def launched(cls, environment: Mapping[str, str]) -> "Shard":
        """As accelerate and torchrun launched this process; the only one, where neither did."""
        count = int(environment.get("WORLD_SIZE", 1))
        return cls(int(environment.get("RANK", 0)), count, waits=count > 1)

    def of(self, everything: Sequence[range]) -> Sequence[range]:
        """Its share."""
        return everything[self.index :: self.count]


__all__ = ["Request", "Shard", "captions", "digest"]
