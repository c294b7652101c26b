"""Shared by the evidence_*.py: plans, tables and pictures that are stored and not made twice, and the comparison of pictures.

They are stored in a work folder, by model, weights and part, so that every command can be interrupted. One thread; seconds are
process time. LPIPS needs a folder with `perceptual.py`, see README.md.
"""

import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import budget
import torch
import typer
from shards import load_images, make_images
from torch import Tensor

import arrowhead as ah
from arrowhead.metrics.images import psnr
from arrowhead.versions import versions

HERE = Path(__file__).parent
FIGURES = HERE.parent / "docs/figures/results"
BATCH = 10
Tools = Annotated[Path, typer.Option(help="folder of perceptual.py")]


@dataclass(frozen=True)
class Run:
    """What is generated: labels or prompts, the seed of the first picture, steps, guidance, and the negative prompt."""

    asked: tuple[Any, ...]
    steps: int
    guidance: float
    seed: int = 0
    negative: str | None = None


class Bench:
    """A bundled model, and what was made with it for one part of the evidence."""

    def __init__(self, name: budget.Name, part: str) -> None:
        torch.set_num_threads(1)
        self.pipe, self.case = ah.tiny.load(name), budget.CASES[name]
        made = budget.work_of(name)
        self.work = made.with_name(f"evidence-{made.name}") / part
        self.work.mkdir(parents=True, exist_ok=True)

    def call(self, run: Run, generator: Any, part: slice = slice(None)) -> dict[str, Any]:
        """The arguments of the pipeline's call, for a part of the pictures."""
        common = {"num_inference_steps": run.steps, "guidance_scale": run.guidance, "output_type": "pt"}
        steered = {} if run.negative is None else {"negative_prompt": run.negative}
        return {**common, **steered, self.case.asks: list(run.asked[part]), "generator": generator}

    def calibration(self, run: Run) -> dict[str, Any]:
        """The arguments of a search's run: one generator for all pictures."""
        return self.call(run, torch.Generator().manual_seed(run.seed))

    def raw_seconds(self, run: Run) -> float:
        """What it takes to generate a calibration's inputs raw, once."""
        path = self.work / f"raw seconds of {len(run.asked)} in {run.steps} steps.json"
        if not path.exists():
            started = time.process_time()
            self.pipe(**self.calibration(run))
            path.write_text(json.dumps(time.process_time() - started))
        return float(json.loads(path.read_text()))

    def table(self, name: str, run: Run) -> ah.Table:
        """A calibration; what it took stands beside it."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            started = time.process_time()
            ah.calibrate(self.pipe, self.calibration(run), progress=False).save(path)
            path.with_suffix(".seconds").write_text(f"{time.process_time() - started:.2f}")
        return ah.Table.load(path)

    def plan(self, name: str, run: Run, table: str | None = None, **how: Any) -> ah.Plan:
        """What `search` finds for a run; for budgets, from the table of this name. What it took stands in its `about`."""
        path = self.work / f"{name}.json"
        if not path.exists():
            asked, before = how, 0.0
            if table is not None:
                asked = {**how, "table": self.table(table, run)}
                before = float((self.work / f"{table}.seconds").read_text())
            started = time.process_time()
            found = ah.search(self.pipe, self.calibration(run), progress=False, **asked)
            seconds = before + time.process_time() - started
            replace(found, about={**found.about, "cpu_seconds": round(seconds, 2)}).save(path)
            typer.echo(f"{name}: found in {seconds:.0f} s, {found.flops().module:.1%} of module FLOPs left")
        return ah.Plan.load(path)

    def pictures(self, name: str, run: Run, plan: ah.Plan | None = None) -> Tensor:
        """Picture i has input i and seed `run.seed` + i: (n, 3, H, W) in [0, 1]."""

        def make(start: int) -> Tensor:
            part = slice(start, min(start + BATCH, len(run.asked)))
            generators = [torch.Generator().manual_seed(run.seed + i) for i in range(start, part.stop)]
            return self.pipe(**self.call(run, generators, part)).images

        with nullcontext() if plan is None else ah.applied(self.pipe, plan):
            make_images(self.work / name, range(0, len(run.asked), BATCH), make)
        return load_images(self.work / name)


class Judge:
    """How far pictures are from others, by LPIPS with its standard error over the pictures, and PSNR."""

    def __init__(self, tools: Path) -> None:
        sys.path[:0] = [str(tools), str(HERE.parent / "training")]
        self.lpips = importlib.import_module("perceptual").LPIPS()

    def __call__(self, images: Tensor, raw: Tensor) -> dict[str, Any]:
        """Of images (n, 3, H, W) in [0, 1]."""
        each = self.lpips(images * 2 - 1, raw * 2 - 1)  # (n,)
        found = {"lpips": float(each.mean()), "lpips_standard_error": float(each.std() / len(each) ** 0.5)}
        return found | {"psnr": None if torch.equal(images, raw) else psnr(images, raw)}


def right_class(images: Tensor, labels: Sequence[int]) -> float:
    """How often a CIFAR-10 classifier sees the class that was asked for; after a `Judge` has said where it is."""
    classifier = importlib.import_module("perceptual").CifarResNet56()
    return float((classifier(images)[0].argmax(-1) == torch.tensor(labels)).float().mean())


def left(plan: ah.Plan) -> dict[str, Any]:
    """What a plan leaves of the FLOPs, what it does, and what its search took."""
    flops, passes = plan.flops(), plan.about["search"].get("transformer_passes")
    told = {"attention_flops": flops.attention, "module_flops": flops.module, "cells": dict(plan.count())}
    return told | {"search_cpu_seconds": plan.about["cpu_seconds"], "search_transformer_passes": passes}


def write(part: str, models: Mapping[str, Any], result: Mapping[str, Any], **about: Any) -> None:
    """Write a result with its settings: the runs of calibrations and pictures, by name."""
    told = {
        "command": f"see the head of benchmarks/{Path(sys.argv[0]).name}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": "cpu, float32, one thread, beside other loads",
        "versions": versions(),
        "runs": {name: asdict(run) for name, run in models.items()},
        **about,
    }
    path = HERE / f"results/evidence_{part}.json"
    path.write_text(json.dumps({**told, **result}, indent=1, allow_nan=False) + "\n")
