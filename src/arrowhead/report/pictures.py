"""The pictures of a page, as data URIs, with captions and PSNR to raw."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image
from torch import Tensor

from arrowhead.evaluation.side_by_side import Evaluation
from arrowhead.metrics.images import psnr


@dataclass(frozen=True)
class Picture:
    """One picture, raw and with each plan, as data URIs, and each plan's PSNR to raw in dB, infinite if they are equal."""

    caption: str
    raw: str
    plans: tuple[str, ...]
    psnr: tuple[float, ...]


def pictures(evaluation: Evaluation, room: int) -> tuple[Picture, ...]:
    """The first pictures of an evaluation that fit into `room` bytes, at least one."""
    shown: list[Picture] = []
    for i, caption in enumerate(captions(evaluation.setting, len(evaluation.raw))):
        raw, *plans = (data_uri(images[i]) for images in (evaluation.raw, *(score.images for score in evaluation.scores)))
        room -= len(raw) + sum(map(len, plans))
        if shown and room < 0:
            break
        distances = tuple(psnr(score.images[i, None], evaluation.raw[i, None]) for score in evaluation.scores)
        shown.append(Picture(caption, raw, tuple(plans), distances))
    return tuple(shown)


def data_uri(image: Tensor) -> str:
    """Encode a picture (C, H, W) in [0, 1], with 1 or 3 channels, as lossless WebP, so that differences come from the plan."""
    pixels = (image.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)  # (H, W, 3)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "webp", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def captions(setting: Mapping[str, Any], count: int) -> list[str]:
    """Captions of `count` pictures: the inputs that differ within a call, and the seed.

    The pictures of a call are in the order of its prompts or labels, with the same number of pictures for each.
    """
    seeds, inputs = setting["seeds"], setting["inputs"]
    in_a_call = count // len(seeds)
    varied = [
        (name, value) for name, value in inputs.items() if isinstance(value, list) and value and in_a_call % len(value) == 0
    ]
    same = [("prompt", inputs["prompt"])] if isinstance(inputs.get("prompt"), str) else []
    found = []
    for i in range(count):
        seed, place = divmod(i, in_a_call)
        values = [(name, value[place * len(value) // in_a_call]) for name, value in varied]
        words = [
            f"{value}" if name == "prompt" else f"{name.removesuffix('s').replace('_', ' ')} {value}"
            for name, value in same + values
        ]
        found.append(", ".join([*words, f"seed {seeds[seed]}"]))
    return found
