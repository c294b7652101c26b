"""Measures of images. Each turns a batch into values, which are stored; estimates are computed from them later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.networks import HOW_TO_GET, NetworkSource, fingerprint, load_network, name_of
from arrowhead.evaluation.request import digest
from arrowhead.metrics.images import squared_errors, ssim_each
from arrowhead.metrics.resize import DESCRIPTIONS, MODES

INCEPTION_SIDE = 299
"""Pixels on a side of the images that Inception takes."""


@dataclass(frozen=True)
class Batch:
    """Images to measure: `pixels` and `raw` are uint8 (n, 3, H, W).

    `raw` are the untouched pipeline's images of the same seeds, which paired measures need. Captions and labels are there if
    the inputs have them.
    """

    pixels: Tensor
    raw: Tensor | None = None
    captions: Sequence[str] | None = None
    labels: Sequence[int] | None = None


@dataclass(frozen=True)
class Measure:
    """One measure of images.

    `compute` gives floating values (n, d) or (n,) for a batch. `key` identifies the measure and the weights of its network, and
    names the folder of its values. A `paired` measure compares with the untouched pipeline's images. If the values are features
    of a network, `features` is their number, and `logits` the number of logits behind them. `about` describes the network.
    """

    name: str
    key: str
    compute: Callable[[Batch], Tensor]
    paired: bool = False
    about: str = ""
    features: int = 0
    logits: int = 0

    def values(self, batch: Batch) -> Tensor:
        """The values for a batch, (n, d) on the CPU.

        Raises:
            InputsInvalid: `compute` gave another shape or dtype, or values that are not finite.
        """
        with torch.no_grad():
            computed = self.compute(batch)
        values = computed if isinstance(computed, Tensor) else torch.tensor(computed)
        count = len(batch.pixels)
        if values.numel() == count:
            values = values.reshape(count, 1)
        if values.ndim != 2 or len(values) != count or not values.is_floating_point() or not values.isfinite().all():
            raise InputsInvalid(
                f"{self.name} gave values of shape {tuple(values.shape)} and dtype {values.dtype} for {count} images, wanted "
                f"({count},), finite and floating; check what it gives for pixels of shape {tuple(batch.pixels.shape)}"
            )
        return values.cpu()


def unit(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Pixels in uint8 as float32 in [0, 1]."""
    return pixels.to(device).float() / 255


def psnr() -> Measure:
    """The mean squared error of each image, from which PSNR is computed."""
    return Measure("psnr", "psnr", lambda batch: squared_errors(unit(batch.pixels), unit(_raw(batch))), paired=True)


def ssim() -> Measure:
    """The SSIM of each image."""
    return Measure("ssim", "ssim", lambda batch: ssim_each(unit(batch.pixels), unit(_raw(batch))), paired=True)


def lpips(source: NetworkSource, device: torch.device | str = "cpu") -> Measure:
    """LPIPS, by a network that takes two batches of images in [-1, 1] and gives a distance for each pair."""
    found = load_network(source, "lpips", device)

    def compute(batch: Batch) -> Tensor:
        return found(unit(batch.pixels, device) * 2 - 1, unit(_raw(batch), device) * 2 - 1)

    return Measure("lpips", _key("lpips", found), compute, paired=True, about=name_of(found))


def inception(source: NetworkSource, resize: str = "tf1", device: torch.device | str = "cpu") -> Measure:
    """Features (n, d) of a network that takes images (n, 3, 299, 299) in [-1, 1], and its logits behind them if it gives any.

    Raises:
        InputsInvalid: there is no such resize mode, or the network gives other shapes.
    """
    if resize not in MODES:
        raise InputsInvalid(f"got resize {resize!r}, wanted one of {', '.join(MODES)}; the original FID has tf1")
    found = load_network(source, "inception", device)

    def parts(pixels: Tensor) -> tuple[Tensor, ...]:
        made = found((MODES[resize](pixels.to(device).float(), INCEPTION_SIDE) - 128) / 128)
        return tuple(made) if isinstance(made, tuple | list) else (made,)

    with torch.no_grad():
        tried = parts(torch.zeros(2, 3, INCEPTION_SIDE, INCEPTION_SIDE, dtype=torch.uint8))
    shapes = [tuple(part.shape) for part in tried]
    if len(shapes) > 2 or any(len(shape) != 2 or shape[0] != 2 for shape in shapes):
        raise InputsInvalid(
            f"the network for FID gave {shapes} for 2 images, wanted features (2, d), or those and logits (2, classes); wrap it"
        )
    return Measure(
        "inception",
        _key(f"inception-{resize}", found),
        lambda batch: torch.cat(parts(batch.pixels), -1),
        about=f"{name_of(found)}, {shapes[0][1]} features, images resized to {INCEPTION_SIDE} × {INCEPTION_SIDE} by "
        f"{DESCRIPTIONS[resize]}",
        features=shapes[0][1],
        logits=shapes[1][1] if len(shapes) > 1 else 0,
    )


def clip(source: str | Path, device: torch.device | str = "cpu") -> Measure:
    """CLIP score: 100 · max(0, cos) of a CLIP's embeddings of an image and its caption (Hessel et al., arXiv:2104.08718).

    `source` is a folder that transformers can load.
    """
    folder = Path(source)
    try:
        from transformers import AutoTokenizer, CLIPModel  # noqa: PLC0415  # takes seconds

        try:
            from transformers import CLIPImageProcessorPil as Processor  # noqa: PLC0415  # needs no torchvision
        except ImportError:
            from transformers import CLIPImageProcessor as Processor  # noqa: PLC0415
        if not folder.is_dir():
            raise FileNotFoundError("there is no such folder")
        model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = Processor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputsInvalid(f"cannot load a CLIP from {folder}: {error}; get it by: {HOW_TO_GET['clip']}") from error

    def compute(batch: Batch) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        text = tokenizer(
            _captions(batch, "CLIP score"), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        pictures = processor(images=[*batch.pixels.permute(0, 2, 3, 1).numpy()], return_tensors="pt")
        made = model(
            input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pictures["pixel_values"].to(device)
        )
        one, other = (torch.nn.functional.normalize(part, dim=-1) for part in (made.image_embeds, made.text_embeds))
        return 100 * (one * other).sum(-1).clamp(min=0)

    about = f"{folder.name}, images resized by its own processor to {dict(processor.size)}"
    return Measure("clip", _key(f"clip-{digest(processor.to_dict())[:6]}", model), compute, about=about)


def accuracy(source: NetworkSource, device: torch.device | str = "cpu") -> Measure:
    """Accuracy: whether a classifier of images in [0, 1] predicts the label that the image was generated for."""
    found = load_network(source, "classifier", device)

    def compute(batch: Batch) -> Tensor:
        made = found(unit(batch.pixels, device))
        logits: Tensor = made[0] if isinstance(made, tuple | list) else made
        labels = torch.tensor(_labels(batch), device=logits.device)
        if logits.ndim != 2 or logits.shape[1] <= int(labels.max()):
            raise InputsInvalid(
                f"the classifier gave {tuple(logits.shape)}, wanted logits of labels up to {int(labels.max())}: "
                f"({len(labels)}, classes)"
            )
        return (logits.argmax(-1) == labels).float()

    return Measure("accuracy", _key("accuracy", found), compute, about=name_of(found))


def reward(name: str, source: NetworkSource, device: torch.device | str = "cpu") -> Measure:
    """A reward such as HPSv2 or ImageReward: a function of images (n, 3, H, W) in [0, 1] and n captions that gives n scores."""
    found = load_network(source, name, device)

    def compute(batch: Batch) -> Tensor:
        scores = found(unit(batch.pixels, device), _captions(batch, name))
        return torch.as_tensor(scores, dtype=torch.float32) if not isinstance(scores, Tensor) else scores.float()

    return Measure(name, _key(name, found), compute, about=name_of(found))


def _key(name: str, found: Any) -> str:
    return f"{name}-{fingerprint(found)}"


def _raw(batch: Batch) -> Tensor:
    assert batch.raw is not None
    return batch.raw


def _captions(batch: Batch, what: str) -> list[str]:
    if batch.captions is None:
        raise InputsInvalid(f"{what} compares images with their captions, and there is no prompt among the inputs; wanted one")
    return [*batch.captions]


def _labels(batch: Batch) -> list[int]:
    if batch.labels is None:
        raise InputsInvalid("accuracy compares with labels, and there are no class_labels among the inputs; wanted them")
    return [*batch.labels]
