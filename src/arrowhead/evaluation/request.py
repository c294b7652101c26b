"""The images that an evaluation asks for: the input, seed and batch of each, and how batches are shared among processes."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arrowhead.errors import InputsInvalid, InputsRepeated
from arrowhead.models.model import did_you_mean
from arrowhead.plans import limits
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
"""Arguments of a pipeline's call that may be lists with one item for each image. One value holds for all images.

Tensors with `prompt` in their name are taken as lists, too.
"""
MAX_CAPTION_BYTES = 2**28
"""Bytes of a file of captions. COCO's captions_train2014.json has 66 MB."""
UNWANTED = re.compile(r"[\x00\ud800-\udfff]")
"""What no text has: NUL, which shows another encoding than UTF-8, and surrogates, which cannot be encoded."""
RESERVED = ("generator", "output_type", "return_dict", "latents")
"""Arguments of a pipeline's call that the evaluation sets."""


@dataclass(frozen=True)
class Request:
    """Which images to generate. Image i has item i mod n of each of the `rows`, which have n items, and the seed `seed` + i.

    `common` are the arguments that all images share. Each image has a fixed place in a fixed batch. So an image is the same bit
    for bit in any process, and after any interruption.
    """

    common: Mapping[str, Any]
    rows: Mapping[str, Sequence[Any] | Tensor]
    images: int
    seed: int = 0
    batch: int = 8

    @classmethod
    def of(cls, inputs: Mapping[str, Any], images: int, *, seed: int = 0, batch: int = 8) -> "Request":
        """Build a request from the arguments of a pipeline's call, in which prompts or labels may be lists.

        Raises:
            InputsInvalid: there are no prompts or labels, their lists differ in length, or an argument is one of `RESERVED`.

        Warns:
            InputsRepeated: the number of images is no multiple of the number of inputs.
        """
        if images < 1 or batch < 1 or seed < 0:
            raise InputsInvalid(f"got {images} images in batches of {batch} from seed {seed}, wanted 1, 1 and 0 at least")
        if seed + images > 2**64:
            raise InputsInvalid(f"got seed {seed} for {images} images, wanted seeds below 2**64; take a smaller one")
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
                f"got lists {lengths or 'none'} among the inputs {sorted(inputs)}; wanted prompt or class_labels"
                f"{did_you_mean(inputs, PER_IMAGE)}, and all lists of one length"
            )
        count = next(iter(lengths.values()), 1)
        rows = {name: lists.get(name, [value] * count) for name, value in varied.items()}
        common = {name: value for name, value in inputs.items() if name not in rows}
        if images % count and images > count:
            warnings.warn(
                f"{count} inputs for {images} images: the first {images % count} are generated once more than the others; "
                f"wanted a multiple, such as {images - images % count} images",
                InputsRepeated,
                stacklevel=2,
            )
        return cls(common, rows, images, seed, batch)

    @property
    def inputs(self) -> int:
        """The number of items in each row."""
        return len(next(iter(self.rows.values())))

    @property
    def batches(self) -> list[range]:
        """The images of each call of the pipeline. The last batch may be smaller."""
        return [range(at, min(at + self.batch, self.images)) for at in range(0, self.images, self.batch)]

    def row(self, name: str, images: Sequence[int]) -> Any:
        """The items of one row for these images: a list, or a tensor if the row is a tensor."""
        values = self.rows[name]
        places = [image % len(values) for image in images]
        return values[places] if isinstance(values, Tensor) else [values[place] for place in places]

    def call(self, images: Sequence[int]) -> dict[str, Any]:
        """Arguments of the call that generates these images. Generators are on the CPU, for the same noise on every device."""
        generators = [torch.Generator().manual_seed(self.seed + image) for image in images]
        return {**self.common, **{name: self.row(name, images) for name in self.rows}, "generator": generators}

    def about(self) -> dict[str, Any]:
        """What decides the images, for JSON; long lists as length and hash. The number of images is left out: it may grow."""
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
    """A hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def captions(path: Path) -> list[str]:
    """Read captions from a text file, one in each line, or from a COCO-format JSON, for each image the one of lowest id.

    Raises:
        InputsInvalid: the file cannot be read, or an image or a line has no caption.
    """
    try:
        text = limits.read_bytes(path, MAX_CAPTION_BYTES).decode("utf-8-sig")
        found = _coco(limits.parse_json(text)) if path.suffix == ".json" else dict(enumerate(text.splitlines(), 1))
        if wrong := [name for name, caption in found.items() if not isinstance(caption, str) or UNWANTED.search(caption)]:
            raise ValueError(f"got no text, NUL characters or half of a surrogate pair for {wrong[:5]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputsInvalid(
            f"cannot read captions from {path}: {type(error).__name__} {limits.shortened(error)}; wanted a text file in UTF-8, "
            "a caption in each line, or a JSON as COCO's captions_val2014.json, with images and annotations"
        ) from error
    where = "images" if path.suffix == ".json" else "lines"
    missing = [name for name, caption in found.items() if not caption.strip()]
    if missing or not found:
        raise InputsInvalid(
            f"got {len(found)} captions in {path}, none in {where} {missing[:5]!r:.200}; wanted one for each; add it, or "
            "remove the entry"
        )
    return [caption.strip() for caption in found.values()]


def _coco(read: Mapping[str, Any]) -> dict[Any, str]:
    found: dict[Any, str] = {image["id"]: "" for image in read["images"]}
    for annotation in sorted(read["annotations"], key=lambda annotation: annotation["id"], reverse=True):
        if annotation["image_id"] not in found:
            raise KeyError(f"annotation {annotation['id']} is of image {annotation['image_id']}, which is not among the images")
        found[annotation["image_id"]] = annotation["caption"]
    return found


@dataclass(frozen=True)
class Shard:
    """One process of `count` that share an evaluation: it takes every `count`-th batch from `index` on.

    `waits` says that all processes run at the same time, and that the first waits for the others and merges the results.
    """

    index: int = 0
    count: int = 1
    waits: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputsInvalid(f"got shard {self.index}/{self.count}, wanted i/n with i from 0 to n - 1, such as 0/4")

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Parse `i/n`, as the command line has it."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise InputsInvalid(f"got shard {text!r}, wanted i/n with i from 0 to n - 1, such as 0/4")
        return cls(int(index), int(count))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Shard":
        """The shard of a process that accelerate or torchrun launched; of any other process, the only shard."""
        count = int(environment.get("WORLD_SIZE", 1))
        return cls(int(environment.get("RANK", 0)), count, waits=count > 1)

    def share(self, batches: Sequence[range]) -> Sequence[range]:
        """The batches of this process."""
        return batches[self.index :: self.count]


__all__ = ["Request", "Shard", "captions", "digest"]
