"""`arrowhead evaluate`: a model and plans to one table, of as many images as asked for, with whatever networks there are."""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from arrowhead.cli.inputs import Device, Dtype, Inputs, ModelName, Seed, Seeds, by_name, load, parse
from arrowhead.errors import InputsInvalid

if TYPE_CHECKING:  # torchmetrics
    from arrowhead.evaluation.figures import Figure
    from arrowhead.evaluation.table import Measured, Row

console = Console()
Plans = Annotated[
    list[Path] | None,
    typer.Option("--plan", exists=True, dir_okay=False, help="a plan that search wrote; repeat, or leave out"),
]
Captions = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="prompts: a text file, one a line, or a COCO-format JSON")
]
Images = Annotated[
    int | None, typer.Option(help="how many; image i has seed i and input i mod n; without it, seeds × n", min=1)
]
Work = Annotated[Path | None, typer.Option(help="folder where all is kept; a run that was interrupted goes on from there")]
Real = Annotated[
    str | None, typer.Option(help="real images, for FID and KID: a folder, FILE.npz:ARRAY, or FILE.npz with mu and sigma")
]
RealImages = Annotated[int | None, typer.Option(help="the first so many of them", min=1)]
Inception = Annotated[str | None, typer.Option(help="the network of FID, KID and IS: TorchScript, torch-fidelity's .pth, …")]
Resize = Annotated[str, typer.Option(help="how images come to its size: tf1, as in the original FID, bilinear or antialiased")]
Lpips = Annotated[str | None, typer.Option(help="LPIPS: TorchScript, FILE.py:NAME or module:NAME")]
Clip = Annotated[Path | None, typer.Option(help="a CLIP's folder")]
Classifier = Annotated[
    str | None, typer.Option(help="a classifier of images in [0, 1]: TorchScript, FILE.py:NAME or module:NAME")
]
Reward = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=MODULE:FUNCTION", help="hpsv2, image_reward, …: a function of images and prompts; repeat"),
]
OwnShard = Annotated[str | None, typer.Option("--shard", help="which of how many processes, as 0/4; a call without it merges")]
Batch = Annotated[int, typer.Option(help="images of one call", min=1)]


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
    shard: OwnShard = None,
    batch: Batch = 4,
    out: Annotated[Path | None, typer.Option(help="JSON file for the table", dir_okay=False)] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Compare plans with the untouched pipeline: FLOPs, time, memory, and quality by whatever networks are given."""
    from arrowhead.evaluation.measurement import measure  # noqa: PLC0415
    from arrowhead.evaluation.request import Request, Shard
    from arrowhead.evaluation.request import captions as read_captions  # noqa: PLC0415
    from arrowhead.evaluation.suite import Networks
    from arrowhead.report.page import require_writable  # noqa: PLC0415  # torchmetrics

    call = parse(inputs)
    if captions is not None:
        if "prompt" in call:
            raise InputsInvalid("got --captions and --input prompt=…, wanted one of them; leave one out")
        call["prompt"] = read_captions(captions)
    own = Shard.launched(os.environ) if shard is None else Shard.parse(shard)
    if work is None and own.count > 1:
        raise InputsInvalid("several processes have to keep their work in one folder; add --work FOLDER")
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
            shard=own,
            progress=own.index == 0 or not own.waits,
        )
    if found is None:
        if not own.waits:
            console.print(
                f"shard {own.index} of {own.count} is done; when all are, the same command without --shard merges them"
            )
        return
    show(found)
    if out is not None:
        out.write_text(json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n")


def _reward(text: str) -> tuple[str, str]:
    name, equals, where = text.partition("=")
    if not (name and equals and where):
        raise InputsInvalid(f"got --reward {text!r}, wanted NAME=MODULE:FUNCTION, such as hpsv2=rewards.py:hps")
    return name, where


SAID = {
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
NETWORKS = {"inception": "FID, KID, IS", "lpips": "LPIPS", "clip": "CLIP score"}
SCALES = {"kid": 1000.0}


def show(found: "Measured") -> None:
    """The table for people, a row for each quantity and a column for each setting, and how it was measured."""
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
    names = {name: None for row in settings for name in row.figures}
    for name in [*(known for known in SAID if known in names), *(other for other in names if other not in SAID)]:
        table.add_row(SAID.get(name, name), *(_figure(row.figures.get(name), SCALES.get(name, 1)) for row in settings))
    console.print(table)
    for line in notes(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def notes(found: "Measured") -> list[str]:
    """How it was measured, and what was not."""
    setting = found.setting
    seeds, level = setting["seeds"], setting["intervals"]["level"]
    lines = [
        f"{found.images} images, in batches of {setting['batch']}, seeds {seeds['first']} to {seeds['last']}, the same for "
        f"all; {found.raw.cost.seconds_per_image:.2f} s an image untouched, {setting['device']}, {setting['dtype']}",
        f"[…]: {level:.0%} of {setting['intervals']['resamples']} times that images were drawn again; Δ: of the difference to "
        "raw, in pairs; of FID by the {setting['fid_intervals']}, where there are enough images; ±: of KID's subsets",
        f"memory: {setting['peak_memory']}",
    ]
    if "real" in setting:
        lines.append(f"FID and KID against {setting['real']}")
    if "kid_subsets" in setting:
        lines.append(f"KID: {setting['kid_subsets']}")
    lines += [f"{NETWORKS.get(name, name)}: {about}" for name, about in setting["measures"].items()]
    return lines + [f"not measured: {name}. {why}" for name, why in found.not_measured.items()]


def _figure(figure: "Figure | None", scale: float) -> str:
    if figure is None:
        return "—"
    said = _number(figure.value * scale)
    if figure.deviation is not None:
        said += f" ± {_number(figure.deviation * scale)}"
    for mark, bounds in (("", figure.interval), ("Δ ", figure.change)):
        if bounds is not None:
            said += f"\n{mark}\\[{_number(bounds[0] * scale)}, {_number(bounds[1] * scale)}]"
    return said


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
