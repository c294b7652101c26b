"""The folder in which an evaluation stores its images and measured values, so that it can be interrupted and resumed.

    evaluation.json                   model, inputs and seeds: a folder of another evaluation is refused
    raw/, NAME-HASH/                  one folder for the untouched pipeline, and one for each plan, by the plan's content
      images/000007.png               an image, or a frame of a video: 000007-002.png
      batches/000000-000008.json      the batch's record (seconds, summary), written after all of its images
      values/MEASURE/000000-000008.npy    the values that one measure gives for the batch

Each file is written completely or not at all (`plans/atomic_write.py`), so an interruption leaves complete files, and a missing
file is made again. A file that was broken later is refused by its name.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.request import digest
from arrowhead.plans import atomic_write, limits
from arrowhead.plans.plan import Plan

MANIFEST = "evaluation.json"
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow's names of the formats that are read: formats of pixels alone. For some others Pillow starts a program."""
HEADER, MAX_ITEM = 2**14, 16
"""Bytes: more than the header of an npy file has, and the most of one floating number."""
REMEDY = "delete it, and run again: it is made anew"


class _Part(pydantic.BaseModel, extra="allow", allow_inf_nan=False):
    """A part of a batch's record, which may have more keys than are checked."""


class _Flops(_Part):
    attention: float
    module: float


class _Summary(_Part):
    flops: _Flops
    peak_cache_bytes: pydantic.NonNegativeInt


class _Record(_Part):
    """The keys of a batch's record that the table is computed from."""

    frames: int = pydantic.Field(ge=1, le=2**16)
    seconds: pydantic.PositiveFloat
    session: str
    peak_memory_bytes: pydantic.NonNegativeInt | None
    summary: _Summary | None


def write(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, and make its folder if needed."""
    atomic_write.make_folder(path.parent)
    atomic_write.write(path, content)


def as_json(content: Any) -> bytes:
    """A value as JSON, for a file."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def open_work(folder: Path, about: Mapping[str, Any]) -> None:
    """Start an evaluation's folder, or resume one of the same evaluation; `about` says what decides the images.

    Raises:
        InputsInvalid: the folder holds another evaluation (the message names every difference), other files, or a link to
            another folder.
    """
    path = folder / MANIFEST
    _require_no_links(folder)
    if not path.exists():
        others = [each for each in folder.glob("[!.]*") if each.name != MANIFEST]
        if others and not path.exists():  # checked again: another process may have started the folder
            raise InputsInvalid(f"{folder} is not empty, and holds no evaluation; wanted an empty folder for --work")
        atomic_write.make_folder(folder)
        atomic_write.write_first(path, as_json(about))  # another process may start another evaluation there at the same time
    try:
        stored = limits.parse_json(limits.read_bytes(path))
        if not isinstance(stored, dict):
            raise ValueError(f"got {stored!r:.100}, wanted a JSON object")
    except (OSError, ValueError) as error:
        raise InputsInvalid(
            f"cannot read {path}: {limits.shortened(error)}; wanted what an evaluation wrote there; take another folder"
        ) from error
    if apart := "; ".join(differences(stored, json.loads(json.dumps(about)))):
        raise InputsInvalid(
            f"{folder} keeps an evaluation of another setting: {apart[: limits.MAX_MESSAGE]}; go on as it was begun, or "
            "take another folder"
        )


def _require_no_links(folder: Path) -> None:
    """Check that no folder within a work folder is a link: files would be written, or read, elsewhere.

    Raises:
        InputsInvalid: one is; the work folder itself may be a link.
    """
    for where, folders, _ in os.walk(folder):
        if linked := [path for name in folders if (path := Path(where, name)).is_symlink()]:
            raise InputsInvalid(
                f"got {linked[0]}, a link to {linked[0].readlink()}, in a work folder; wanted folders of its own; move what it "
                "links to in its place, or take another folder"
            )


def differences(stored: Any, now: Any, name: str = "") -> list[str]:
    """The differences between two JSON values, one line for each key that differs."""
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = [*stored, *(key for key in now if key not in stored)]
        return [line for key in keys for line in differences(stored.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if stored == now else [f"{name} was {stored!r}, and is {now!r}"]


@dataclass(frozen=True)
class SettingFolder:
    """The folder of one setting within the work folder: a plan, or the untouched pipeline (`plan` is None)."""

    name: str
    plan: Plan | None
    folder: Path

    @classmethod
    def of(cls, work: Path, name: str, plan: Plan | None) -> "SettingFolder":
        """The folder of a setting in the work folder. A hash of the plan's content identifies it; its name is for people."""
        if plan is None:
            return cls(name, None, work / "raw")
        content = json.loads(plan.text())
        content.pop("about", None)  # provenance does not change the images
        return cls(name, plan, work / f"{name}-{digest(content)[:12]}")

    def record_path(self, images: range) -> Path:
        """The path of a batch's record, which exists once the batch is complete."""
        return self.folder / "batches" / f"{_span(images)}.json"

    def value_path(self, measure: str, images: range) -> Path:
        """The path of the values that a measure, by its key, gives for a batch."""
        return self.folder / "values" / measure / f"{_span(images)}.npy"

    def store(self, images: range, pixels: Tensor, record: Mapping[str, Any]) -> None:
        """Store a batch: pixels, uint8 (n, frames, H, W, 3), and then its record."""
        for image, frames in zip(images, pixels.numpy(), strict=True):
            for frame, picture in enumerate(frames):
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "png", compress_level=1)
                write(self._image_path(image, frame, len(frames)), file.getvalue())
        write(self.record_path(images), as_json({**record, "frames": pixels.shape[1]}))

    def record(self, images: range) -> dict[str, Any]:
        """The record of a complete batch.

        Raises:
            InputsInvalid: the file is broken; the message says how to have it made again.
        """
        path = self.record_path(images)
        try:
            found: dict[str, Any] = limits.parse_json(content := limits.read_bytes(path))
            _Record.model_validate_json(content, strict=True)
        except (OSError, ValueError) as error:  # a ValidationError is a ValueError
            raise InputsInvalid(f"cannot read {path}: {limits.shortened(error)}; {REMEDY}") from error
        return found

    def pixels(self, images: range) -> Tensor:
        """The images of a complete batch, uint8 (n · frames, 3, H, W).

        Raises:
            InputsInvalid: an image is broken or missing; the message says how to have it made again.
        """
        frames = self.record(images)["frames"]
        paths = [self._image_path(image, frame, frames) for image in images for frame in range(frames)]
        try:
            return torch.stack([read_image(path) for path in paths])
        except (InputsInvalid, RuntimeError) as error:  # torch raises RuntimeError for images of different sizes
            raise InputsInvalid(f"{error}; delete {self.record_path(images)}, and run again: the batch is made anew") from error

    def values(self, measure: str, batches: Sequence[range], frames: int, columns: int) -> Tensor:
        """The values that a measure gives for all batches, in order: (images · frames, columns).

        Raises:
            InputsInvalid: a file is broken; the message says how to have it made again.
        """
        parts = (load_array(self.value_path(measure, images), (len(images) * frames, columns)) for images in batches)
        return torch.from_numpy(np.concatenate([*parts]))

    def _image_path(self, image: int, frame: int, frames: int) -> Path:
        name = f"{image:06}.png" if frames == 1 else f"{image:06}-{frame:03}.png"
        return self.folder / "images" / name


def _span(images: range) -> str:
    return f"{images.start:06}-{images.stop:06}"


def store_array(path: Path, values: Tensor) -> None:
    """Write a tensor as npy, completely or not at all."""
    file = io.BytesIO()
    np.save(file, values.cpu().numpy())
    write(path, file.getvalue())


def load_array(path: Path, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Read an array of this shape that `store_array` wrote.

    Raises:
        InputsInvalid: the file is broken, or of another shape, or has values that are not finite floating point.
    """
    try:
        array = limits.parse_npy(limits.read_bytes(path, HEADER + MAX_ITEM * math.prod(shape)), path.name)
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"got {array.dtype} of shape {array.shape}, wanted finite floating values of shape {shape}")
    except (OSError, ValueError) as error:
        raise InputsInvalid(f"cannot read {path}: {limits.shortened(error)}; {REMEDY}") from error
    return array


def read_image(path: Path) -> Tensor:
    """Read an image as RGB pixels, uint8 (3, H, W).

    Raises:
        InputsInvalid: the image cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow's readers raise errors of many types
        raise InputsInvalid(f"cannot read the image {path}: {error}") from error
