"""DiTFastAttn's thresholds D1–D6 on the bundled model: FLOPs left and quality of the pictures.

    python benchmarks/quality.py search
    python benchmarks/quality.py generate
    python benchmarks/quality.py features --tools TOOLS --inception inception.pt --data cifar10.npz
    python benchmarks/quality.py measure --tools TOOLS

`search` finds the plans, `generate` makes 500 images for each setting with paired seeds, `features` takes their Inception
features, all into a work folder. Files that exist are not made again, so each can be interrupted, and shards (`--shard 0/2`
and `--shard 1/2`) can run at the same time. `features` and `measure` need networks and data that are not part of the project: a
folder with `perceptual.py` (LPIPS, CIFAR-10 classifier) and `fid_inception.py`, the Inception network, and CIFAR-10's test set;
see benchmarks/README.md.
"""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from shards import load_images, make_images, own_share
from torch import Tensor
from torchmetrics.image.kid import poly_mmd
from tqdm import tqdm

import arrowhead as ah
from arrowhead.analysis import draw
from arrowhead.metrics.images import psnr, ssim
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import FULL, Arrow, Attend, Cell, wa_rs
from arrowhead.plans.layout import Tokens
from arrowhead.searches.api import THRESHOLDS
from arrowhead.versions import versions

HERE = Path(__file__).parent
STEPS, GUIDANCE, IMAGES, BATCH = 50, 3.0, 500, 10
CALIBRATION_LABELS, CALIBRATION_SEED = [0, 1, 2, 3, 5, 7, 8, 9], 10_000
FULL_EVERY = 5
KID_SUBSETS, KID_SUBSET_SIZE, KID_REAL, KID_LEAST = 100, 250, 2000, 500

app = typer.Typer(add_completion=False)
Work = Annotated[Path, typer.Option(help="folder for plans and images")]
Tools = Annotated[Path, typer.Option(help="folder of perceptual.py and fid_inception.py")]
Shard = Annotated[str, typer.Option(help="which of how many processes, e.g. 0/2")]
WEIGHTS = sha256((HERE.parent / "src/arrowhead/tiny/dit/transformer/diffusion_pytorch_model.safetensors").read_bytes())
WORK = Path("checkpoints/quality") / WEIGHTS.hexdigest()[:12]  # other weights, other pictures
WINDOWS = ("WA-RS", "WA")
NAMES = ["raw", *THRESHOLDS, *WINDOWS]


def periodic_plan(pipe: Any, cell: Cell, every: int) -> ah.Plan:
    """Full attention in every `every`-th step, `cell` in the others, at all sites."""
    target, tokens = target_of(find(pipe)), Tokens(256)
    rows = [tuple([FULL if step % every == 0 else cell] * len(target.sites)) for step in range(STEPS)]
    return ah.Plan(tuple(rows), target, tokens, guided=True)


def windows_at_equal_flops(pipe: Any) -> dict[str, ah.Plan]:
    """WA-RS of N/8 on each side, and a window without residual, widened until it costs no less than WA-RS and its residuals."""
    tokens = Tokens(256)
    shared = periodic_plan(pipe, wa_rs(tokens.visual // 8), FULL_EVERY)
    radius = tokens.visual // 8
    while (alone := periodic_plan(pipe, Attend(Arrow(radius)), FULL_EVERY)).flops().attention < shared.flops().attention:
        radius += 1
    return dict(zip(WINDOWS, (shared, alone), strict=True))


def plan_of(pipe: Any, work: Path, name: str) -> ah.Plan | None:
    """The plan of a setting: none, periodic, or as `search` left it."""
    if name == "raw":
        return None
    return windows_at_equal_flops(pipe)[name] if name in WINDOWS else ah.Plan.load(work / f"{name}.json")


@app.command()
def search(work: Work = WORK, shard: Shard = "0/1") -> None:
    """Find the plans D1–D6, each on eight labels and one seed."""
    index, count = own_share(shard)
    pipe = ah.tiny.load("dit")
    work.mkdir(parents=True, exist_ok=True)
    inputs: dict[str, Any] = {"class_labels": CALIBRATION_LABELS, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    for name in [*THRESHOLDS][index::count]:
        path = work / f"{name}.json"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(CALIBRATION_SEED)
        started = time.perf_counter()
        plan = ah.search(pipe, {**inputs, "generator": generator}, threshold=name)
        (work / f"{name}.seconds").write_text(f"{time.perf_counter() - started:.1f}")
        plan.save(path)


@app.command()
def generate(
    work: Work = WORK,
    shard: Shard = "0/1",
    images: int = IMAGES,
    only: Annotated[list[str] | None, typer.Option(help="settings to make; all when there is none")] = None,
) -> None:
    """Make the images; image i has label i mod 10 and seed i in every setting."""
    index, count = own_share(shard)
    pipe = ah.tiny.load("dit")
    for name in only or NAMES:
        plan = plan_of(pipe, work, name)

        def make(start: int) -> Tensor:
            generators = [torch.Generator().manual_seed(i) for i in range(start, start + BATCH)]
            labels = [i % 10 for i in range(start, start + BATCH)]
            return pipe(labels, GUIDANCE, generators, STEPS, output_type="pt").images  # (BATCH, 3, 32, 32)

        with nullcontext() if plan is None else ah.applied(pipe, plan):
            make_images(work / name, range(0, images, BATCH)[index::count], make)


def in_batches(images: Tensor, size: int = 100) -> Iterator[Tensor]:
    yield from images.split(size)  # type: ignore[no-untyped-call]


def kid(real: Tensor, made: Tensor) -> dict[str, float]:
    """Unbiased polynomial MMD of Inception features, mean and standard deviation over random subsets."""
    rng = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(KID_SUBSETS):
        a = real[torch.randperm(len(real), generator=rng)[:KID_SUBSET_SIZE]]
        b = made[torch.randperm(len(made), generator=rng)[:KID_SUBSET_SIZE]]
        draws.append(poly_mmd(a, b).item())
    return {"kid": float(np.mean(draws)), "kid_std": float(np.std(draws))}


@app.command()
def features(
    tools: Tools,
    inception: Annotated[Path, typer.Option(help="the FID Inception network, TorchScript")],
    data: Annotated[Path, typer.Option(help="npz with x_test")],
    work: Work = WORK,
    shard: Shard = "0/1",
) -> None:
    """Inception features, (n, 2048), of the first test images and of every setting's images where there are enough for KID."""
    index, count = own_share(shard)
    sys.path.insert(0, str(tools))
    fid = importlib.import_module("fid_inception")
    network = fid.load(inception)
    made = [name for name in NAMES if (work / name).is_dir()]
    for name in ["real", *made][index::count]:
        if name == "real":
            pixels = np.load(data)["x_test"][:KID_REAL]  # (n, 32, 32, 3)
        else:
            pixels = (load_images(work / name) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        path = features_of(work, name, len(pixels))
        if not path.exists() and len(pixels) >= KID_LEAST:
            np.save(path, fid.features(network, pixels))


def features_of(work: Path, name: str, images: int) -> Path:
    return work / f"{name}_{images}_features.npy"


@app.command()
def measure(
    tools: Tools,
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="folder for quality.json and its pictures")] = HERE / "results",
) -> None:
    """Compare every setting's images with the raw ones and with the test set."""
    sys.path.insert(0, str(tools))
    perceptual = importlib.import_module("perceptual")
    classifier, lpips = perceptual.CifarResNet56(), perceptual.LPIPS()

    def kept_features(name: str, images: int) -> Tensor:
        return torch.from_numpy(np.load(features_of(work, name, images))).double()

    real = kept_features("real", KID_REAL)
    pipe = ah.tiny.load("dit")
    all_raw = load_images(work / "raw")
    table, plans, pictures = {}, {}, {}
    made = [name for name in NAMES if (work / name).is_dir()]
    typer.echo(f"measured: {', '.join(made)}; not generated, so left out: {', '.join(set(NAMES) - {*made}) or 'none'}")
    for name in tqdm(made, desc="measure"):
        images = load_images(work / name)
        raw, labels = all_raw[: len(images)], torch.arange(len(images)) % 10
        plan = plan_of(pipe, work, name)
        right = torch.cat([classifier(batch)[0].argmax(-1) for batch in in_batches(images)]) == labels
        distances = torch.cat([lpips(a * 2 - 1, b * 2 - 1) for a, b in zip(in_batches(images), in_batches(raw), strict=True)])
        left = plan.flops() if plan else None
        seconds = work / f"{name}.seconds"
        table[name] = {
            "images": len(images),
            "attention_flops": left.attention if left else 1.0,
            "module_flops": left.module if left else 1.0,
            "cells": dict(plan.count()) if plan else {},
            "search_transformer_passes": plan.about["search"]["transformer_passes"] if seconds.exists() and plan else None,
            "search_seconds_one_thread": float(seconds.read_text()) if seconds.exists() else None,
            "accuracy": right.float().mean().item(),
            **(kid(real, kept_features(name, len(images))) if len(images) >= KID_LEAST else {}),
            "lpips": distances.mean().item(),
            "ssim": ssim(images, raw),
            "psnr": psnr(images, raw) if plan else None,
        }
        pictures[name] = images[:10]
        if plan:
            plans[name] = plan
    result = {
        "command": "see the head of benchmarks/quality.py",
        "date": datetime.now(UTC).date().isoformat(),
        "model": "tiny:dit",
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "dtype": "float32, CPU",
        "seeds": "image i: label i mod 10, seed i, in every setting",
        "calibration": {"labels": CALIBRATION_LABELS, "seed": CALIBRATION_SEED},
        "kid": f"{KID_SUBSETS} subsets of {KID_SUBSET_SIZE}, against the first {KID_REAL} test images, TF1 bilinear resize",
        "windows": f"full attention every {FULL_EVERY} steps, WA-RS of radius 32 else; WA widened to equal FLOPs",
        "versions": versions(),
        "settings": table,
    }
    (out / "quality.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    draw.plan_map({name: plan for name, plan in plans.items() if name in THRESHOLDS}, out / "quality_plans.png")
    draw.image_grid(pictures, list(ah.tiny.CIFAR10), out / "quality_images.png")


if __name__ == "__main__":
    app()
