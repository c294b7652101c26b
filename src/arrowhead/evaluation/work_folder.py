"""The folder in which an evaluation stores its images and measured values, so that it can be interrupted and resumed.

    evaluation.json                   model, inputs and seeds: a folder of another evaluation is refused
    raw/, NAME-HASH/                  one folder for the untouched pipeline, and one for each plan, by the plan's content
      images/000007.png               an image, or a frame of a video: 000007-002.png
      batches/000000-000008.json      the batch's record (seconds, summary), written after all of its images
      values/MEASURE/000000-000008.npy    the values that one measure gives for the batch

Each file is written under a temporary name and then renamed. So a file that exists is complete. A missing file is made again.
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
    """Write a file completely or not at all, and make its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a value as JSON, completely or not at all."""
    write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


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
        write_json(path, about)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputsInvalid(
            f"cannot read {path}: {error}; wanted what an evaluation wrote there; take another folder"
        ) from error
    if apart := list(differences(stored, json.loads(json.dumps(about)))):
        raise InputsInvalid(
            f"{folder} keeps an evaluation of another setting: {'; '.join(apart)}; go on as it was begun, or "
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
        write_json(self.record_path(images), {**record, "frames": pixels.shape[1]})

    def record(self, images: range) -> dict[str, Any]:
        """The record of a complete batch."""
        return json.loads(self.record_path(images).read_text(encoding="utf-8"))

    def pixels(self, images: range) -> Tensor:
        """The images of a complete batch, uint8 (n · frames, 3, H, W).

        Raises:
            InputsInvalid: an image is broken or missing; the message says how to have it made again.
        """
        frames = self.record(images)["frames"]
        paths = [self._image_path(image, frame, frames) for image in images for frame in range(frames)]
        try:
            return torch.stack([read_image(path) for path in paths])
        except (InputsInvalid, RuntimeError) as error:
            raise InputsInvalid(f"{error}; delete {self.record_path(images)}, and run again: the batch is made anew") from error

    def values(self, measure: str, batches: Sequence[range]) -> Tensor:
        """The values that a measure gives for all batches, in order: (images · frames, d)."""
        return torch.from_numpy(np.concatenate([load_array(self.value_path(measure, images)) for images in batches]))

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


def load_array(path: Path) -> np.ndarray[Any, Any]:
    """Read an array that `store_array` wrote.

    Raises:
        InputsInvalid: the file is broken.
    """
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputsInvalid(f"cannot read {path}: {error}; delete it, and run again: it is made anew") from error


def read_image(path: Path) -> Tensor:
    """Read an image as RGB pixels, uint8 (3, H, W).

    Raises:
        InputsInvalid: the image cannot be read.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputsInvalid(f"cannot read the image {path}: {error}") from error
