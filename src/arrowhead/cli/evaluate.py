"""`arrowhead evaluate`: one table of a model and its plans, over any number of images, with the metric networks given."""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from arrowhead.cli.console import console
from arrowhead.cli.inputs import Device, Dtype, Inputs, ModelName, Seed, Seeds, by_name, load, parse
from arrowhead.errors import InputsInvalid
from arrowhead.plans.atomic_write import require_writable, write

if TYPE_CHECKING:  # torchmetrics
    from arrowhead.evaluation.estimates import Estimate
    from arrowhead.evaluation.results import Results, Row

Plans = Annotated[
    list[Path] | None,
    typer.Option("--plan", exists=True, dir_okay=False, help="a plan that search wrote; repeat, or leave out"),
]
Captions = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="prompts: a text file, one a line, or a COCO-format JSON")
]
Images = Annotated[
    int | None,
    typer.Option(help="number of images for each setting; image i has seed i and input i mod n; default: seeds × n", min=1),
]
Work = Annotated[Path | None, typer.Option(help="folder for images and values; an interrupted run is resumed from it")]
Real = Annotated[
    str | None, typer.Option(help="real images, for FID and KID: a folder, FILE.npz:ARRAY, or FILE.npz with mu and sigma")
]
RealImages = Annotated[int | None, typer.Option(help="use only so many of the real images", min=1)]
Inception = Annotated[
    str | None,
    typer.Option(help="the network of FID, KID and IS: TorchScript, torch-fidelity's .pth, FILE.py:NAME or module:NAME"),
]
Resize = Annotated[
    str, typer.Option(help="how images are resized for it: tf1 (as in the original FID), bilinear or antialiased")
]
Lpips = Annotated[str | None, typer.Option(help="the network of LPIPS: TorchScript, FILE.py:NAME or module:NAME")]
Clip = Annotated[Path | None, typer.Option(help="a folder with a CLIP, for the CLIP score")]
Classifier = Annotated[
    str | None, typer.Option(help="a classifier of images in [0, 1]: TorchScript, FILE.py:NAME or module:NAME")
]
Reward = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=MODULE:FUNCTION", help="a reward such as hpsv2: a function of images and prompts; repeat"),
]
ShardOption = Annotated[
    str | None, typer.Option("--shard", help="this process's share, such as 0/4; a call without it merges all shares")
]
Batch = Annotated[int, typer.Option(help="images in one call of the pipeline", min=1)]


def evaluate(
    model: ModelName,
    inputs: Inputs,
    plans: Plans = None,
    captions: Captions = None,
    images: Images = None,
    seeds: Seeds = 3,
    work: Work = None,
    real: Real = None,
    real_images: RealImages = None,
    inception: Inception = None,
    resize: Resize = "tf1",
    lpips: Lpips = None,
    clip: Clip = None,
    classifier: Classifier = None,
    reward: Reward = None,
    shard: ShardOption = None,
    batch: Batch = 4,
    out: Annotated[Path | None, typer.Option(help="JSON file for the table", dir_okay=False)] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Compare plans with the untouched pipeline: FLOPs, time, memory, and quality by the metric networks given."""
    from arrowhead.evaluation.metric_networks import Networks  # noqa: PLC0415  # these import torchmetrics
    from arrowhead.evaluation.request import Request, Shard  # noqa: PLC0415
    from arrowhead.evaluation.request import captions as read_captions  # noqa: PLC0415
    from arrowhead.evaluation.resumable import measure  # noqa: PLC0415

    call = parse(inputs)
    if captions is not None:
        if "prompt" in call:
            raise InputsInvalid("got --captions and --input prompt=…, wanted one of them; leave one out")
        call["prompt"] = read_captions(captions)
    share = Shard.from_environment(os.environ) if shard is None else Shard.parse(shard)
    if work is None and share.count > 1:
        raise InputsInvalid("several processes have to store their work in one folder; add --work FOLDER")
    if out is not None:
        require_writable(out)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    count = images or seeds * Request.of(call, 1, seed=seed, batch=batch).inputs
    networks = Networks(inception, lpips, clip, classifier, dict(map(_reward, reward or ())), resize)
    loaded = by_name(plans or [])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) if work is None else work
        found = measure(
            load(model, device, dtype),
            loaded,
            call,
            images=count,
            work=folder,
            seed=seed,
            batch=batch,
            networks=networks,
            real=real,
            real_images=real_images,
            shard=share,
            progress=share.index == 0 or not share.waits,
        )
    if found is None:
        if not share.waits:
            console.print(
                f"shard {share.index} of {share.count} is done; when all are, the same command without --shard merges them"
            )
        return
    show(found)
    if out is not None:
        write(out, (json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n").encode())


def _reward(text: str) -> tuple[str, str]:
    name, equals, where = text.partition("=")
    if not (name and equals and where):
        raise InputsInvalid(f"got --reward {text!r}, wanted NAME=MODULE:FUNCTION, such as hpsv2=rewards.py:hps")
    return name, where


LABELS = {
    "fid": "FID",
    "kid": "KID × 1000",
    "is": "IS",
    "clip": "CLIP score",
    "lpips": "LPIPS to raw",
    "ssim": "SSIM to raw",
    "psnr": "PSNR to raw, dB",
    "hpsv2": "HPSv2",
    "image_reward": "ImageReward",
}
"""Names of figures for people, in the order of the table's rows."""
NETWORKS = {"inception": "FID, KID, IS", "lpips": "LPIPS", "clip": "CLIP score"}
"""What each network measures, for the notes."""
SCALES = {"kid": 1000.0}
"""Factors by which a figure is multiplied when it is shown."""


def show(found: "Results") -> None:
    """Print the table, with a row for each quantity and a column for each setting, and how it was measured."""
    settings = [found.raw, *found.rows]
    table = Table("", *(row.name for row in settings))
    mebibytes = "{:.1f} MiB".format
    costs: dict[str, Callable[[Row], str]] = {
        "attention FLOPs": lambda row: f"{row.cost.attention_flops:.1%}",
        "module FLOPs": lambda row: f"{row.cost.module_flops:.1%}",
        "time by raw's": lambda row: "—" if row.cost.time_ratio is None else f"{row.cost.time_ratio:.2f} ×",
        "peak memory": lambda row: "—" if row.cost.peak_memory_bytes is None else mebibytes(row.cost.peak_memory_bytes / 2**20),
        "peak cache": lambda row: mebibytes(row.cost.peak_cache_bytes / 2**20),
    }
    for name, of in costs.items():
        table.add_row(name, *map(of, settings))
    names = {name: None for row in settings for name in row.estimates}
    for name in [*(known for known in LABELS if known in names), *(other for other in names if other not in LABELS)]:
        table.add_row(LABELS.get(name, name), *(_estimate(row.estimates.get(name), SCALES.get(name, 1)) for row in settings))
    console.print(table)
    for line in notes(found):
        console.print(line, soft_wrap=True)


def notes(found: "Results") -> list[str]:
    """Lines that say how the table was measured, and what was not measured and why."""
    setting = found.setting
    seeds, level = setting["seeds"], setting["intervals"]["level"]
    lines = [
        f"{found.images} images, in batches of {setting['batch']}, seeds {seeds['first']} to {seeds['last']}, the same for "
        f"all; {found.raw.cost.seconds_per_image:.2f} s an image untouched, {setting['device']}, {setting['dtype']}",
        f"[…]: {level:.0%} of {setting['intervals']['resamples']} times that images were drawn again; Δ: of the difference to "
        f"raw, in pairs; of FID by the {setting['fid_intervals']}, where there are enough images; ±: of KID's subsets",
        f"memory: {setting['peak_memory']}",
    ]
    if "real" in setting:
        lines.append(f"FID and KID against {setting['real']}")
    if "kid_subsets" in setting:
        lines.append(f"KID: {setting['kid_subsets']}")
    lines += [f"{NETWORKS.get(name, name)}: {about}" for name, about in setting["measures"].items()]
    return lines + [f"not measured: {name}. {why}" for name, why in found.not_measured.items()]


def _estimate(estimate: "Estimate | None", scale: float) -> str:
    if estimate is None:
        return "—"
    text = _number(estimate.value * scale)
    if estimate.deviation is not None:
        text += f" ± {_number(estimate.deviation * scale)}"
    for mark, bounds in (("", estimate.interval), ("Δ ", estimate.change)):
        if bounds is not None:
            text += f"\n{mark}[{_number(bounds[0] * scale)}, {_number(bounds[1] * scale)}]"
    return text


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
