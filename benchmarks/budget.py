"""Plans of the budget search, of both papers' searches, and even reuse, compared at equal FLOPs on a bundled model.

    python benchmarks/budget.py search dit
    python benchmarks/budget.py generate dit
    python benchmarks/budget.py cost dit
    python benchmarks/budget.py measure dit --tools TOOLS

`search` finds the plans, `generate` makes the images with paired seeds, both into a work folder. Files that exist are
not made again, so both can be interrupted, and shards (`--shard 0/2` and `--shard 1/2`) can run at the same time. `cost` times
a calibration against generating its inputs, in turn. `measure` needs LPIPS and, for `dit`, a classifier: a folder with
`perceptual.py`; see benchmarks/README.md. `mmdit32` may stand in place of `dit`.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import headwise
import numpy as np
import recognition
import torch
import typer
from shards import load_images, make_images, own_share
from torch import Tensor

import arrowhead as ah
from arrowhead.metrics.images import psnr, ssim
from arrowhead.plans.cells import AST, EXTRAPOLATE, FULL, Cell
from arrowhead.searches.api import THRESHOLDS
from arrowhead.versions import versions

HERE = Path(__file__).parent
BUDGETS = (0.7, 0.55, 0.4, 0.25, 0.2)
SEED = 10_000


class Name(StrEnum):
    """The bundled models of 256 tokens."""

    DIT = "dit"
    MMDIT32 = "mmdit32"


@dataclass(frozen=True)
class Case:
    """How a model is called: common arguments, the calibration's prompts or labels and those of the images, and batches."""

    common: dict[str, Any]
    asks: str
    calibration: list[Any]
    images: list[Any]
    batch: int


CASES = {
    Name.DIT: Case(
        {"num_inference_steps": 50, "guidance_scale": 3.0, "output_type": "pt"},
        "class_labels",
        [0, 3, 5, 8, 1, 6, 7, 9],
        [i % 10 for i in range(100)],
        10,
    ),
    Name.MMDIT32: Case(
        {"num_inference_steps": headwise.STEPS, "guidance_scale": headwise.GUIDANCE, "output_type": "pt"},
        "prompt",
        headwise.CALIBRATION,
        headwise.PROMPTS,
        headwise.BATCH,
    ),
}
FOUND: dict[str, dict[str, Any]] = {
    **{f"budget {b:.0%}": {"budget": ah.Budget(module_flops=b)} for b in BUDGETS},
    **{f"budget {b:.0%}, no forecasts": {"budget": ah.Budget(module_flops=b, extrapolate=False)} for b in BUDGETS},
    **{f"headwise {t}": {"strategy": "headwise", "threshold": t} for t in headwise.THRESHOLDS},
    **{f"greedy {name}": {"strategy": "greedy", "threshold": name} for name in THRESHOLDS},
}
UNIFORM: dict[str, tuple[float, Cell]] = {
    **{f"uniform {b:.0%}": (b, AST) for b in BUDGETS},
    **{f"uniform {b:.0%}, forecasts": (b, EXTRAPOLATE) for b in BUDGETS},
}

app = typer.Typer(add_completion=False)
Shard = Annotated[str, typer.Option(help="which of how many processes, e.g. 0/2")]
Only = Annotated[list[str] | None, typer.Option(help="settings to make; all when there is none")]


def work_of(name: Name) -> Path:
    """The work folder, by the hash of the weights."""
    weights = HERE.parent / f"src/arrowhead/tiny/{name}/transformer/diffusion_pytorch_model.safetensors"
    return Path("checkpoints/budget") / f"{name}-{sha256(weights.read_bytes()).hexdigest()[:12]}"


def calibration(case: Case) -> dict[str, Any]:
    """The arguments of a search's run."""
    return {**case.common, case.asks: case.calibration, "generator": torch.Generator().manual_seed(SEED)}


def uniform(like: ah.Plan, left: float, else_: Cell) -> ah.Plan:
    """Full attention in this fraction of the steps, the first (two) and evenly after that; `else_` in the other steps."""
    first = 2 if else_ == EXTRAPOLATE else 1
    spread = (round(left * like.steps) - first) / (like.steps - first)  # of the other settings
    due = [step < first or int((step - first + 1) * spread) > int((step - first) * spread) for step in range(like.steps)]
    rows = tuple((FULL if full else else_,) * len(like.target.sites) for full in due)
    return ah.Plan(rows, like.target, like.tokens, like.guided)


@app.command()
def search(name: Name, shard: Shard = "0/1", only: Only = None) -> None:
    """Find every setting's plan, each on eight inputs and one seed; budgets from one table."""
    index, count = own_share(shard)
    case, work, pipe = CASES[name], work_of(name), ah.tiny.load(name)
    work.mkdir(parents=True, exist_ok=True)
    for setting in (only or [*FOUND])[index::count]:
        path, asked = work / f"{setting}.json", FOUND[setting]
        if path.exists():
            continue
        if "budget" in asked:
            file = work / "table.safetensors"
            if not file.exists():
                ah.calibrate(pipe, calibration(case)).save(file)
            asked = {**asked, "table": ah.Table.load(file)}
        ah.search(pipe, calibration(case), **asked).save(path)


@app.command()
def generate(name: Name, shard: Shard = "0/1", only: Only = None) -> None:
    """Make the images; image i has input i and seed i in every setting. Settings without a plan are left out."""
    index, count = own_share(shard)
    case, work, pipe = CASES[name], work_of(name), ah.tiny.load(name)
    like = ah.Plan.load(work / f"budget {BUDGETS[0]:.0%}.json")
    plans = {setting: uniform(like, *how) for setting, how in UNIFORM.items()}
    plans |= {setting: ah.Plan.load(path) for setting in FOUND if (path := work / f"{setting}.json").exists()}
    for setting in only or ["raw", *plans]:

        def make(start: int) -> Tensor:
            stop = min(start + case.batch, len(case.images))
            generators = [torch.Generator().manual_seed(i) for i in range(start, stop)]
            return pipe(**case.common, **{case.asks: case.images[start:stop]}, generator=generators).images

        with nullcontext() if setting == "raw" else ah.applied(pipe, plans[setting]):
            make_images(work / setting, range(0, len(case.images), case.batch)[index::count], make)


@app.command()
def cost(name: Name, rounds: int = 3) -> None:
    """Time a calibration by generating its inputs raw, in turn, one thread, by the CPU's clock."""
    torch.set_num_threads(1)
    case, pipe = CASES[name], ah.tiny.load(name)
    raw, calibrated = [], []
    for _ in range(rounds):
        started = time.process_time()
        pipe(**calibration(case))
        raw.append(time.process_time() - started)
        started = time.process_time()
        table = ah.calibrate(pipe, calibration(case), progress=False)
        calibrated.append(time.process_time() - started)
    started = time.process_time()
    ah.solve(table, ah.Budget(module_flops=0.4))
    solved = time.process_time() - started
    ratio = median(a / b for a, b in zip(calibrated, raw, strict=True))
    result = {"rounds": rounds, "raw_seconds": median(raw), "calibration_by_raw": ratio, "solving_seconds": solved}
    write(HERE / f"results/budget_{name}_cost.json", name, result)


@app.command()
def measure(
    name: Name,
    tools: Annotated[Path, typer.Option(help="folder of perceptual.py")],
    data: Annotated[Path | None, typer.Option(help="for an MMDiT, the emoji: whether pictures bear the prompt's name")] = None,
) -> None:
    """Compare every setting's images with the raw ones. A setting without images here keeps its row and date."""
    sys.path[:0] = [str(tools), str(HERE.parent / "training")]
    lpips, accuracy = importlib.import_module("perceptual").LPIPS(), accuracy_of(name, data)
    work = work_of(name)
    raw, table = load_images(work / "raw"), {}

    def scores(images: Tensor) -> dict[str, Any]:
        found = {
            "lpips": float(lpips(images * 2 - 1, raw * 2 - 1).mean()),
            "ssim": ssim(images, raw),
            "psnr": psnr(images, raw),
        }
        return found if accuracy is None else found | {"accuracy": accuracy(images)}

    like = ah.Plan.load(work / f"budget {BUDGETS[0]:.0%}.json")
    path = HERE / f"results/budget_{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    for setting in [*FOUND, *UNIFORM]:
        if len(images := load_images(work / setting) if (work / setting).is_dir() else raw[:0]) < len(raw):
            if kept := before["settings"].get(setting):
                table[setting] = {"date": before["date"], **kept}
            typer.echo(f"{setting}: {len(images)} images of {len(raw)}, {'kept as it was' if kept else 'left out'}")
            continue
        plan = uniform(like, *UNIFORM[setting]) if setting in UNIFORM else ah.Plan.load(work / f"{setting}.json")
        left = plan.flops()
        flops = {"attention_flops": left.attention, "module_flops": left.module}
        table[setting] = {**flops, "cells": dict(plan.count()), "search": plan.about.get("search", {}), **scores(images)}
    if accuracy is not None:
        table = {"raw": {"accuracy": scores(raw)["accuracy"]}, **table}
    write(path, name, {"images": len(raw), "settings": table, "at_budgets": at_budgets(table)})


def accuracy_of(name: Name, data: Path | None) -> Callable[[Tensor], float] | None:
    """How often a picture is of the class that was asked for, or, of an MMDiT, bears the prompt's name, see recognition.py."""
    if name is Name.DIT:
        classifier, labels = importlib.import_module("perceptual").CifarResNet56(), torch.tensor(CASES[name].images)
        return lambda images: float((classifier(images)[0].argmax(-1) == labels).float().mean())
    if data is None:
        return None
    emoji = importlib.import_module("captions").Emoji.read(data)
    return partial(recognition.named, emoji, [prompt.partition(" of a ")[2] for prompt in CASES[name].images])


def at_budgets(table: dict[str, Any]) -> dict[str, dict[str, float]]:
    """LPIPS of every family of settings at each budget, its logarithm interpolated over module FLOPs within their range."""
    found: dict[str, dict[str, float]] = {}
    for family in ("greedy", "headwise"):
        rows = sorted((row["module_flops"], row["lpips"]) for name, row in table.items() if name.startswith(family))
        for budget in BUDGETS:
            if rows and rows[0][0] <= budget <= rows[-1][0]:
                value = float(np.exp(np.interp(budget, [f for f, _ in rows], np.log([v for _, v in rows]))))
                found.setdefault(f"{budget:.0%}", {})[family] = value
    for budget in BUDGETS:
        for kind in ("budget", "budget, no forecasts", "uniform", "uniform, forecasts"):
            if row := table.get(kind.replace(",", f" {budget:.0%},") if "," in kind else f"{kind} {budget:.0%}"):
                found.setdefault(f"{budget:.0%}", {})[kind] = row["lpips"]
    return found


def write(path: Path, name: Name, result: dict[str, Any]) -> None:
    """Write a result with its settings and versions."""
    case = CASES[name]
    about = {
        "command": "see the head of benchmarks/budget.py",
        "date": datetime.now(UTC).date().isoformat(),
        "model": f"tiny:{name}",
        "device": "cpu, float32",
        **case.common,
        "calibration": {case.asks: case.calibration, "seed": SEED},
        "versions": versions(),
    }
    path.write_text(json.dumps(about | result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    app()
