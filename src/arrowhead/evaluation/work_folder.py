"""What an evaluation keeps on disk: images, what networks made of them, and which setting it is all of.

    evaluation.json                   the setting: another one's folder is refused
    raw/, NAME-HASH/                  of the untouched pipeline, and of each plan by its content
      images/000007.png               or 000007-002.png, a video's frame
      batches/000000-000008.json      written when all of a batch's images are there: seconds, counters
      values/MEASURE/000000-000008.npy    what one measure gives of a batch

A file is there whole or not at all: each is written under another name first. So whatever is there can be counted on, and what
is not is made again.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.request import digest
from arrowhead.plans.plan import Plan

MANIFEST = "evaluation.json"


def write(path: Path, content: bytes) -> None:
    """Write a file whole, or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write`, of what JSON can hold."""
    write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def open_work(folder: Path, about: Mapping[str, Any]) -> None:
    """Begin a folder, or go on with one of the same setting.

    Raises:
        InputsInvalid: it is of another one, or it is no folder of ours and not empty; every difference is named.
    """
    path = folder / MANIFEST
    if not path.exists():
        strangers = [each for each in folder.glob("[!.]*") if each.name != MANIFEST]
        if strangers and not path.exists():  # asked again, since another process may have begun it meanwhile
            raise InputsInvalid(f"{folder} is not empty, and no evaluation's; wanted a folder of its own for --work")
        write_json(path, about)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputsInvalid(
            f"cannot read {path}: {error}; wanted what an evaluation wrote there; take another folder"
        ) from error
    if apart := list(differences(kept, json.loads(json.dumps(about)))):
        raise InputsInvalid(
            f"{folder} keeps an evaluation of another setting: {'; '.join(apart)}; go on as it was begun, or "
            "take another folder"
        )


def differences(kept: Any, now: Any, name: str = "") -> list[str]:
    """Where two values of JSON differ, by their keys."""
    if isinstance(kept, dict) and isinstance(now, dict):
        keys = [*kept, *(key for key in now if key not in kept)]
        return [apart for key in keys for apart in differences(kept.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if kept == now else [f"{name} was {kept!r}, and is {now!r}"]


@dataclass(frozen=True)
class WorkFolder:
    """The folder of one setting: `plan` on the pipeline, or none."""

    name: str
    plan: Plan | None
    folder: Path

    @classmethod
    def of(cls, work: Path, name: str, plan: Plan | None) -> "WorkFolder":
        """In an evaluation's folder. A plan is known by what it holds, its name is for people."""
        if plan is None:
            return cls(name, None, work / "raw")
        content = json.loads(plan.text())
        content.pop("about", None)  # how it was found, which does not decide the images
        return cls(name, plan, work / f"{name}-{digest(content)[:12]}")

    def record_path(self, images: range) -> Path:
        """Where a batch is recorded as complete."""
        return self.folder / "batches" / f"{_span(images)}.json"

    def value_path(self, measure: str, images: range) -> Path:
        """Where what a measure gives of a batch is kept."""
        return self.folder / "values" / measure / f"{_span(images)}.npy"

    def keep(self, images: range, pixels: Tensor, record: Mapping[str, Any]) -> None:
        """Keep a batch: pixels (n, frames, H, W, 3) in bytes, and its record, which is written last."""
        for image, frames in zip(images, pixels.numpy(), strict=True):
            for frame, picture in enumerate(frames):
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "png", compress_level=1)
                write(self._picture(image, frame, len(frames)), file.getvalue())
        write_json(self.record_path(images), {**record, "frames": pixels.shape[1]})

    def record(self, images: range) -> dict[str, Any]:
        """Of a batch that is complete."""
        return json.loads(self.record_path(images).read_text(encoding="utf-8"))

    def pixels(self, images: range) -> Tensor:
        """A batch's images, (n · frames, 3, H, W) in bytes.

        Raises:
            InputsInvalid: one is broken or gone; the message says how to have it made again.
        """
        frames = self.record(images)["frames"]
        paths = [self._picture(image, frame, frames) for image in images for frame in range(frames)]
        try:
            return torch.stack([read_image(path) for path in paths])
        except (InputsInvalid, RuntimeError) as error:
            raise InputsInvalid(f"{error}; delete {self.record_path(images)}, and run again: the batch is made anew") from error

    def values(self, measure: str, batches: Sequence[range]) -> Tensor:
        """What a measure gives of all batches, in order: (images · frames, d)."""
        return torch.from_numpy(np.concatenate([load_array(self.value_path(measure, images)) for images in batches]))

    def _picture(self, image: int, frame: int, frames: int) -> Path:
        name = f"{image:06}.png" if frames == 1 else f"{image:06}-{frame:03}.png"
        return self.folder / "images" / name


def _span(images: range) -> str:
    return f"{images.start:06}-{images.stop:06}"


def keep_array(path: Path, values: Tensor) -> None:
    """`write`, of an array."""
    file = io.BytesIO()
    np.save(file, values.cpu().numpy())
    write(path, file.getvalue())


def load_array(path: Path) -> np.ndarray[Any, Any]:
    """What `keep_array` wrote.

    Raises:
        InputsInvalid: it is broken.
    """
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputsInvalid(f"cannot read {path}: {error}; delete it, and run again: it is made anew") from error


def read_image(path: Path) -> Tensor:
    """An image's pixels, (3, H, W) in bytes; grey and transparent ones become RGB.

    Raises:
        InputsInvalid: there is no image that can be read.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputsInvalid(f"cannot read the image {path}: {error}") from error
