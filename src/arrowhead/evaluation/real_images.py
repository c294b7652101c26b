"""Reads the real images to compare with: a folder, an array in an npz, or precomputed moments of features."""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.work_folder import read_image
from arrowhead.metrics.distributions import Moments

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
BATCH = 32


@dataclass(frozen=True)
class RealImages:
    """`count` images. `read(i)` gives one, uint8 (3, H, W). `key` identifies them, and `about` describes them for people."""

    count: int
    read: Callable[[int], Tensor]
    key: str
    about: str

    @property
    def batches(self) -> list[range]:
        """The indices of the images that are measured together."""
        return [range(at, min(at + BATCH, self.count)) for at in range(0, self.count, BATCH)]

    def first(self, count: int) -> "RealImages":
        """The first images, at most `count`. The key stays: stored values are those of whole batches of all images."""
        return self if count >= self.count else RealImages(count, self.read, self.key, f"the first {count} of {self.about}")


def read_real_images(given: str | Path) -> RealImages | Moments:
    """Read images from a folder or from `FILE.npz:ARRAY` (n, H, W, 3) in uint8, or moments from `FILE.npz` with mu and sigma.

    Every image file is opened once, so that a broken one is reported before anything is generated.

    Raises:
        InputsInvalid: there are no images, one cannot be opened, or the moments are malformed.
    """
    text = str(given)
    if Path(text).is_dir():
        return _folder(Path(text))
    file, colon, name = text.rpartition(":") if ".npz:" in text else (text, "", "")
    try:
        with np.load(file) as arrays:
            if colon:
                return _array(arrays[name], text)
            if {"mu", "sigma"} <= {*arrays}:
                return _statistics(arrays)
            raise ValueError(f"it has arrays {sorted(arrays)}, and neither mu and sigma nor a name after a colon")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputsInvalid(
            f"cannot take real images from {text}: {error}; wanted a folder of images, FILE.npz:ARRAY with images (n, H, W, 3) "
            "in bytes, or FILE.npz with mu (d,) and sigma (d, d)"
        ) from error


def _folder(folder: Path) -> RealImages:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputsInvalid(f"got no images in {folder}, wanted files ending in {', '.join(sorted(SUFFIXES))}")
    broken, known = [], hashlib.sha256()
    for path in paths:
        known.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode())
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception as error:  # Pillow's readers raise errors of many types
            broken.append(f"{path} ({error})")
    if broken:
        raise InputsInvalid(
            f"got {len(broken)} of {len(paths)} images in {folder} that cannot be opened: {', '.join(broken[:3])}; wanted "
            "images that can be read; remove the others"
        )
    return RealImages(len(paths), lambda i: read_image(paths[i]), known.hexdigest()[:12], f"{len(paths)} images of {folder}")


def _array(images: np.ndarray[Any, Any], name: str) -> RealImages:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"got {images.shape} of {images.dtype}")
    known = hashlib.sha256(f"{images.shape}".encode())
    known.update(np.ascontiguousarray(images.reshape(len(images), -1)[:, :64]).tobytes())
    pixels = torch.from_numpy(images)
    return RealImages(
        len(images), lambda i: pixels[i].permute(2, 0, 1), known.hexdigest()[:12], f"{len(images)} images of {name}"
    )


def _statistics(arrays: Any) -> Moments:
    mean, covariance = (torch.from_numpy(np.asarray(arrays[key], np.float64)) for key in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not covariance.isfinite().all():
        raise ValueError(f"got mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, wanted (d,) and (d, d), finite")
    if not torch.allclose(covariance, covariance.T, atol=1e-6 * float(covariance.abs().max())):
        raise ValueError("got a sigma that is not symmetric")
    return Moments(int(arrays["count"]) if "count" in arrays else 0, mean, covariance)
