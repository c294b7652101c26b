"""Plans of the budget search and other accelerations that need no training, at equal FLOPs and at equal seconds.

    python benchmarks/peers.py generate mmdit32
    python benchmarks/peers.py time mmdit32
    python benchmarks/peers.py measure mmdit32 --tools TOOLS

Peers are diffusers' own caches, cache-dit, tomesd (see peers_hooks.py), and fewer steps of the sampler. Every setting draws the
same pictures from the same seeds as `raw`. `generate` stores the FLOPs that PyTorch counted in each batch, and makes
nothing twice. A peer that raises is left out, and its reason noted. `time` needs an otherwise idle machine: it runs all
settings in turn, round by round, each with `raw`. `measure` needs LPIPS: see benchmarks/README.md. `dit` may stand in place of
`mmdit32`.
"""

import importlib
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import budget
import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from diffusers import CacheMixin
from matplotlib.axes import Axes
from peers_hooks import PEERS
from shards import load_images, make_images, own_share
from torch import Tensor

import arrowhead as ah
from arrowhead.metrics.images import psnr, ssim
from arrowhead.searches.budget.sensitivity.outside_flops import flop_counter
from arrowhead.versions import versions

IMAGES = 64
BUDGETS = (0.7, 0.55, 0.4, 0.3, 0.2)
OWN = {
    **{f"budget {b:.0%}": ah.Budget(transformer_flops=b) for b in BUDGETS},
    **{f"speedup {s}": ah.Budget(speedup=s) for s in (1.5, 2, 3)},
}
FEWER = {f"fewer steps {b:.0%}": b for b in BUDGETS}
SETTINGS = (*OWN, *FEWER, *PEERS)
ADAPTIVE = ("FirstBlockCache", "SeaCache", "DBCache", "DBCache + TaylorSeer")
"""Kinds whose FLOPs depend on the pictures and are counted in every batch; for others a first one shows them."""
COLORS = (
    "0.45",
    *(f"tab:{c}" for c in ("blue", "cyan", "orange", "green", "purple", "brown", "pink", "olive")),
    "gold",
    "navy",
)
LABELS = {"budget": "arrowhead, for FLOPs", "speedup": "arrowhead, for seconds"}
OWN_COLORS = {"budget": "black", "speedup": "tab:red"}
REFUSED, RATIOS = "refused.txt", "seconds.json"

HERE = Path(__file__).parent

app = typer.Typer(add_completion=False)


class DoesNothing(Exception):
    """A peer that was applied without complaint and left every picture as it was."""


def work_of(name: budget.Name) -> Path:
    """Beside the work of budget.py, whose pictures are of attention's FLOPs."""
    found = budget.work_of(name)
    return found.with_name(f"peers-{found.name}")


@cache
def plan_of(name: budget.Name, setting: str) -> ah.Plan:
    """Found once, from the one table that all budgets share."""
    file = work_of(name) / f"{setting}.json"
    if not file.exists():
        inputs, table = budget.calibration(budget.CASES[name]), table_of(name)
        ah.search(ah.tiny.load(name), inputs, budget=OWN[setting], table=table).save(file)
    return ah.Plan.load(file)


@cache
def table_of(name: budget.Name) -> ah.Table:
    """Calibrated once."""
    work = work_of(name)
    work.mkdir(parents=True, exist_ok=True)
    if not (file := work / "table.safetensors").exists():
        ah.calibrate(ah.tiny.load(name), budget.calibration(budget.CASES[name])).save(file)
    return ah.Table.load(file)


def kind_of(setting: str) -> str:
    """A setting's name without its value."""
    return setting.rpartition(" ")[0]


@contextmanager
def ready(name: budget.Name, setting: str) -> Iterator[Any]:
    """A fresh pipeline with a setting applied: no state is left from one generation to the next."""
    pipe = ah.tiny.load(name)
    if setting in PEERS:
        PEERS[setting](pipe, name)
    applied = ah.applied(pipe, plan_of(name, setting)) if setting in OWN else nullcontext()
    with applied, CacheMixin.cache_context(pipe.transformer, "cond_uncond"):
        yield pipe


def inputs_of(case: budget.Case, setting: str, start: int, stop: int) -> dict[str, Any]:
    """Arguments for the images from `start` to `stop`; image i has input i and seed i in every setting."""
    return {
        **case.common,
        case.asks: case.images[start:stop],
        "num_inference_steps": round(case.common["num_inference_steps"] * FEWER.get(setting, 1.0)),
        "generator": [torch.Generator().manual_seed(i) for i in range(start, stop)],
    }


@app.command()
def generate(name: budget.Name, shard: budget.Shard = "0/1", only: budget.Only = None, images: int = IMAGES) -> None:
    """Make the images of every setting, and note why where a peer refuses."""
    index, count = own_share(shard)
    work, starts = work_of(name), range(0, images, budget.CASES[name].batch)[index::count]
    for setting in only or ["raw", *SETTINGS]:
        if (refused := work / setting / REFUSED).exists():
            continue
        try:
            make_images(work / setting, starts, partial(images_of, name, setting))
        except Exception as error:
            if setting not in PEERS:
                raise
            reason = str(error) if isinstance(error, DoesNothing) else f"{type(error).__name__}: {error}"
            refused.write_text(reason)
            typer.echo(f"{setting}: {reason}")


def images_of(name: budget.Name, setting: str, start: int) -> Tensor:
    """A batch of a setting, (n, 3, H, W); the FLOPs of its generation are written beside it."""
    case, folder, counts = budget.CASES[name], work_of(name) / setting, start == 0 or kind_of(setting) in ADAPTIVE
    with ready(name, setting) as pipe, flop_counter() if counts else nullcontext() as counter:
        images: Tensor = pipe(**inputs_of(case, setting, start, min(start + case.batch, IMAGES))).images
    if counter is not None:
        flops = counter.get_total_flops()
        (folder / f"{start:05}.flops").write_text(str(flops))
        if setting in PEERS and start == 0 and np.array_equal(images, np.load(folder.parent / "raw/00000.npy")):
            left = flops / float((folder.parent / "raw/00000.flops").read_text())
            raise DoesNothing(f"silently does nothing: the first images are the raw ones, for {left:.1%} of the FLOPs")
    return images


@app.command(name="time")
def time_all(name: budget.Name, rounds: int = 5, images: int = 4, only: budget.Only = None) -> None:
    """Time beside `raw` all settings that were generated, in turn, one thread, each round in another order.

    `only` some of them, in a run of their own, in which the others keep what they had; the result says which.
    """
    torch.set_num_threads(1)
    work, order = work_of(name), random.Random(0)
    before = json.loads((work / RATIOS).read_text()) if (work / RATIOS).exists() and only else {"ratios": {}, "spread": {}}
    settings = ["raw", *(setting for setting in only or SETTINGS if made(work / setting))]
    seconds_of(name, "raw", images)  # a warm-up
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        order.shuffle(settings)
        found.append({setting: seconds_of(name, setting, images) for setting in settings})
        timing = {"images": images, "clock": "CPU time", **summary(found), **({"in_a_run_of_their_own": only} if only else {})}
        merged = {key: before[key] | timing[key] for key in ("ratios", "spread")}
        (work / RATIOS).write_text(json.dumps(timing | merged, indent=1))
        typer.echo(f"round {len(found)} of {rounds}: raw {found[-1]['raw']:.2f} s")


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of each round's ratios to its own `raw`, with the least and the most."""
    ratios = {setting: [each[setting] / each["raw"] for each in rounds] for setting in rounds[0] if setting != "raw"}
    return {
        "rounds": len(rounds),
        "raw_seconds": median(each["raw"] for each in rounds),
        "ratios": {setting: median(values) for setting, values in ratios.items()},
        "spread": {setting: [min(values), max(values)] for setting, values in ratios.items()},
    }


def seconds_of(name: budget.Name, setting: str, images: int) -> float:
    """The CPU's for one generation on one thread: a free core's clock shows the same. Loading and applying are not counted."""
    with ready(name, setting) as pipe:
        inputs = inputs_of(budget.CASES[name], setting, 0, images)
        started = time.process_time()
        pipe(**inputs)
        return time.process_time() - started


def made(folder: Path) -> bool:
    """Whether there are as many batches as of `raw`, and none was refused."""
    count = len([*folder.glob("?????.npy")])
    return count == len([*(folder.parent / "raw").glob("?????.npy")]) and not (folder / REFUSED).exists()


@app.command()
def measure(name: budget.Name, tools: Annotated[Path, typer.Option(help="folder of perceptual.py")]) -> None:
    """Compare with the raw images those of every setting that was generated, and draw the fronts.

    A setting whose images are not here keeps its point, with its date.
    """
    sys.path.insert(0, str(tools))
    lpips, work = importlib.import_module("perceptual").LPIPS(), work_of(name)
    timing = json.loads((work / RATIOS).read_text()) if (work / RATIOS).exists() else {"ratios": {}}
    raw, whole = load_images(work / "raw"), spent(work / "raw")
    points: dict[str, dict[str, Any]] = {}
    refused = {setting: file.read_text() for setting in PEERS if (file := work / setting / REFUSED).exists()}
    path = HERE / f"results/peers_{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"points": {}, "refused": {}}
    for setting in SETTINGS:
        if not made(work / setting):
            if setting in before["points"] and setting not in refused:
                points[setting] = {"date": before["date"], **before["points"][setting]}
            continue
        images = load_images(work / setting)
        points[setting] = {
            "flops": spent(work / setting) / whole,
            **({"seconds": timing["ratios"][setting]} if setting in timing["ratios"] else {}),
            "lpips": float(lpips(images * 2 - 1, raw * 2 - 1).mean()),
            "ssim": ssim(images, raw),
            "psnr": psnr(images, raw),
        }
    result = {
        "command": "see the head of benchmarks/peers.py",
        "versions": versions() | peer_versions(),
        "images": len(raw),
        "timing": {key: value for key, value in timing.items() if key != "ratios"},
        "points": points,
        "refused": before["refused"] | refused,
    }
    budget.write(path, name, result)
    fronts(points, HERE / f"results/peers_{name}.png")


def peer_versions() -> dict[str, str]:
    """Of the peers that are packages of their own, where they are installed."""
    found = {}
    for package in ("cache_dit", "tomesd"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")
    return found


def spent(folder: Path) -> float:
    """FLOPs of an image, from all batches of a folder that were counted."""
    counted = [*folder.glob("*.flops")]
    images = sum(len(np.load(path.with_suffix(".npy"))) for path in counted)
    return sum(float(path.read_text()) for path in counted) / images


def fronts(points: dict[str, dict[str, float]], path: Path) -> None:
    """LPIPS over FLOPs and over seconds, a line for each kind of setting, with one legend for both."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    front(left, points, "flops")
    front(right, points, "seconds")
    left.set(xlabel="FLOPs of a generation left, % of raw", ylabel="LPIPS to raw, less is better", yscale="log")
    right.set(xlabel="seconds of a generation left, % of raw")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def front(axis: Axes, points: dict[str, dict[str, float]], over: str) -> None:
    """One panel: our lines thick and in front, the peers' thin, each with a mark of its own."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for setting, point in points.items():
        if over in point:
            lines.setdefault(kind_of(setting), []).append((100 * point[over], point["lpips"]))
    kinds = [*dict.fromkeys(map(kind_of, (*FEWER, *PEERS)))]
    for kind, line in lines.items():
        costs, values = zip(*sorted(line), strict=True)
        if kind in LABELS:
            look: dict[str, Any] = {"color": OWN_COLORS[kind], "lw": 3.2, "ms": 8, "marker": "o", "zorder": 3}
        else:
            number = kinds.index(kind)
            look = {"color": COLORS[number], "lw": 1.3, "ms": 6, "marker": "xsD^vP*Xh<>"[number]}
        axis.plot(costs, values, label=LABELS.get(kind, kind), **look)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    app()
