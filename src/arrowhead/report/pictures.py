"""Pictures as a page holds them: files within its text, each with what it shows and how far it is from raw."""

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
    """One picture, raw and under each plan: data URIs, and the plans' PSNR to raw in dB, infinite where nothing changed."""

    caption: str
    raw: str
    plans: tuple[str, ...]
    psnr: tuple[float, ...]


def pictures(evaluation: Evaluation, room: int) -> tuple[Picture, ...]:
    """The first pictures of an evaluation, as many as fit into so many bytes, but one at least."""
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
    """A picture, (C, H, W) in [0, 1] with one channel or three, as WebP without loss: what differs is the plan's doing."""
    pixels = (image.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)  # (H, W, 3)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "webp", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def captions(setting: Mapping[str, Any], count: int) -> list[str]:
    """What each of `count` pictures was asked for, in words: the inputs that differ within a call, and the seed.

    A call's pictures come in the order of its prompts or labels, as many of each in a row as the call asks for.
    """
    seeds, inputs = setting["seeds"], setting["inputs"]
    in_a_call = count // len(seeds)
    asked = [
        (name, value) for name, value in inputs.items() if isinstance(value, list) and value and in_a_call % len(value) == 0
    ]
    same = [("prompt", inputs["prompt"])] if isinstance(inputs.get("prompt"), str) else []
    said = []
    for i in range(count):
        seed, place = divmod(i, in_a_call)
        own = [(name, value[place * len(value) // in_a_call]) for name, value in asked]
        words = [
            f"{value}" if name == "prompt" else f"{name.removesuffix('s').replace('_', ' ')} {value}"
            for name, value in same + own
        ]
        said.append(", ".join([*words, f"seed {seeds[seed]}"]))
    return said
