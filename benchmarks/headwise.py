"""Head-wise plans on the bundled MMDiTs: thresholds, ablations, the greedy search in comparison, and the cost of a search.

    python benchmarks/headwise.py search mmdit32
    python benchmarks/headwise.py generate mmdit32
    python benchmarks/headwise.py cost mmdit32
    python benchmarks/headwise.py measure mmdit32 --tools TOOLS
    python benchmarks/headwise.py memory mmdit

and the same for `mmdit`, four times the tokens and six times the work, of which `--only` takes a part.

`search` finds the plans, `generate` makes 64 images for each setting with paired seeds, both into a work folder. Files that
exist are not made again, so both can be interrupted, and shards (`--shard 0/2` and `--shard 1/2`) can run at the same time.
`cost` times searches against generating their calibration batch, in turn; `memory` compares what both take. `measure` needs
LPIPS: a folder with `perceptual.py`; see benchmarks/README.md.
"""

import importlib
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from shards import load_images, make_images, own_share
from torch import Tensor

import arrowhead as ah
from arrowhead.analysis import draw
from arrowhead.metrics.images import psnr, ssim
from arrowhead.searches.api import THRESHOLDS as GREEDY
from arrowhead.versions import versions

HERE = Path(__file__).parent
STEPS, GUIDANCE, BATCH = 28, 4.0, 4
NAMES = ("hatching chick", "red heart", "sailboat", "broccoli", "grinning face", "locked", "fire engine", "maple leaf")
STYLES = ("noto", "twemoji", "fluent")
PROMPTS = [f"a {STYLES[(i + i // 8) % 3]} of a {NAMES[i % 8]}" for i in range(64)]
CALIBRATION = [
    f"a {STYLES[i % 3]} of a {name}"
    for i, name in enumerate(("owl", "tomato", "bus", "key", "rose", "ghost", "drum", "cactus"))
]
CALIBRATION_SEED = 10_000
THRESHOLDS, MIDDLE = (0.2, 0.4, 0.6, 0.8, 1.0), 0.6
ABLATIONS = {
    "arrows alone": ah.Headwise(caching=False),
    "arrows + caching": ah.Headwise(),
    "… + share_cfg": ah.Headwise(share_cfg=True),
    "… + residual": ah.Headwise(residual=True),
    "… + both": ah.Headwise(share_cfg=True, residual=True),
    "no prefilter": ah.Headwise(prefilter=None),
    "prefilter 1": ah.Headwise(prefilter=1.0),
    "prefilter 2": ah.Headwise(prefilter=2.0),
}
PLAIN = "arrows + caching"
"""What every δ is searched with; in the table of ablations it is the row of δ = 0.6."""
SETTINGS: dict[str, tuple[Any, float]] = {
    **{f"δ = {threshold}": (ABLATIONS[PLAIN], threshold) for threshold in THRESHOLDS},
    **{name: (settings, MIDDLE) for name, settings in ABLATIONS.items() if name != PLAIN},
    **{f"greedy {name}": ("greedy", threshold) for name, threshold in GREEDY.items()},
}

app = typer.Typer(add_completion=False)
Model = Annotated[str, typer.Argument(help="mmdit32 or mmdit")]
Shard = Annotated[str, typer.Option(help="which of how many processes, e.g. 0/2")]
Only = Annotated[list[str] | None, typer.Option(help="settings to take; all when there is none")]


def work_of(model: str) -> Path:
    """A folder for plans and images: other weights, other pictures."""
    weights = HERE.parent / f"src/arrowhead/tiny/{model}/transformer/diffusion_pytorch_model.safetensors"
    return Path("checkpoints/headwise") / f"{model}-{sha256(weights.read_bytes()).hexdigest()[:12]}"


def calibration() -> dict[str, Any]:
    """The arguments of a search's run."""
    common = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    return {**common, "prompt": CALIBRATION, "generator": torch.Generator().manual_seed(CALIBRATION_SEED)}


@app.command()
def search(model: Model, shard: Shard = "0/1", only: Only = None) -> None:
    """Find every setting's plan, each on eight prompts and one seed."""
    index, count = own_share(shard)
    pipe, work = ah.tiny.load(model), work_of(model)
    work.mkdir(parents=True, exist_ok=True)
    for name in (only or [*SETTINGS])[index::count]:
        path, (strategy, threshold) = work / f"{name}.json", SETTINGS[name]
        if not path.exists():
            ah.search(pipe, calibration(), strategy=strategy, threshold=threshold).save(path)


@app.command()
def generate(model: Model, shard: Shard = "0/1", only: Only = None) -> None:
    """Make the images; image i has prompt i and seed i in every setting."""
    index, count = own_share(shard)
    pipe, work = ah.tiny.load(model), work_of(model)
    for name in only or ["raw", *SETTINGS]:

        def make(start: int) -> Tensor:
            generators = [torch.Generator().manual_seed(i) for i in range(start, start + BATCH)]
            return pipe(PROMPTS[start : start + BATCH], None, GUIDANCE, generators, STEPS, output_type="pt").images

        with nullcontext() if name == "raw" else ah.applied(pipe, ah.Plan.load(work / f"{name}.json")):
            make_images(work / name, range(0, len(PROMPTS), BATCH)[index::count], make)


@app.command()
def cost(model: Model, rounds: int = 3) -> None:
    """Time searches by generating their calibration batch raw, in turn, one thread."""
    torch.set_num_threads(1)
    pipe = ah.tiny.load(model)
    searches: dict[str, tuple[Any, float]] = {
        "headwise": (ah.Headwise(), MIDDLE),
        "headwise, all options": (ABLATIONS["… + both"], MIDDLE),
        "greedy D4": ("greedy", 0.1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("raw", *searches)}
    counted: dict[str, Any] = {}
    for _ in range(rounds):
        for name, spent in seconds.items():
            started = time.perf_counter()
            if name == "raw":
                pipe(**calibration())
            else:
                strategy, threshold = searches[name]
                plan = ah.search(pipe, calibration(), strategy=strategy, threshold=threshold, progress=False)
                counted[name] = {key: plan.about["search"][key] for key in ("transformer_passes", "attention_flops_by_raw")}
            spent.append(time.perf_counter() - started)
    table = {
        name: {"seconds_by_raw": median(a / b for a, b in zip(seconds[name], seconds["raw"], strict=True)), **counted[name]}
        for name in searches
    }
    write(
        HERE / f"results/headwise_{model}_cost.json",
        model,
        {"rounds": rounds, "raw_seconds": median(seconds["raw"]), "searches": table},
    )


@app.command()
def memory(model: Model) -> None:
    """The most memory that a search takes by what generating its calibration batch takes, each in a process of its own."""
    kinds = ("loaded", "raw", "headwise", "headwise, all options")
    command = [sys.executable, __file__, "resident", model]
    most = {kind: int(subprocess.check_output([*command, kind], text=True)) for kind in kinds}
    above = {kind: most[kind] - most["loaded"] for kind in kinds[1:]}
    result = {"steps": 4, "bytes_above_the_loaded_model": above}
    ratios = {f"{kind}, by raw": above[kind] / above["raw"] for kind in kinds[2:]}
    write(HERE / f"results/headwise_{model}_memory.json", model, result | ratios)


@app.command(hidden=True)
def resident(model: Model, kind: str) -> None:
    """Print the most bytes that this process had resident."""
    torch.set_num_threads(1)
    pipe, inputs = ah.tiny.load(model), {**calibration(), "num_inference_steps": 4}
    if kind == "raw":
        pipe(**inputs)
    elif kind != "loaded":
        settings = ABLATIONS[PLAIN if kind == "headwise" else "… + both"]
        ah.search(pipe, inputs, strategy=settings, threshold=MIDDLE, progress=False)
    typer.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@app.command()
def measure(model: Model, tools: Annotated[Path, typer.Option(help="folder of perceptual.py")]) -> None:
    """Compare with the raw images those of every setting that was generated."""
    sys.path.insert(0, str(tools))
    lpips = importlib.import_module("perceptual").LPIPS()
    work, out = work_of(model), HERE / "results"
    raw = load_images(work / "raw")
    table, pictures = {}, {"raw": raw[:8]}
    plans = {name: ah.Plan.load(work / f"{name}.json") for name in SETTINGS if (work / name).exists()}
    for name, plan in plans.items():
        images, left, heads = load_images(work / name), plan.flops(), plan.count_heads()
        table[name] = {
            "attention_flops": left.attention,
            "module_flops": left.module,
            "heads": {method: number / heads.total() for method, number in heads.items()},
            "search": plan.about["search"],
            "lpips": float(lpips(images * 2 - 1, raw * 2 - 1).mean()),
            "ssim": ssim(images, raw),
            "psnr": psnr(images, raw),
        }
        pictures[name] = images[:8]
    drawn = out / f"headwise_{model}.png"
    shown = ("raw", f"δ = {THRESHOLDS[0]}", f"δ = {MIDDLE}", f"δ = {THRESHOLDS[-1]}")
    write(
        out / f"headwise_{model}.json",
        model,
        {"images": len(raw), "settings": table, "at_greedy_budgets": at_greedy_budgets(table)},
    )
    draw.image_grid(
        {name: pictures[name] for name in shown}, [f"{n}\n{p.split()[1]}" for n, p in zip(NAMES, PROMPTS, strict=False)], drawn
    )
    middle = plans[f"δ = {MIDDLE}"]
    draw.head_map(middle, len(middle.target.sites) // 2, out / f"headwise_{model}_heads.png")


def at_greedy_budgets(table: dict[str, Any]) -> dict[str, Any]:
    """Head-wise LPIPS, interpolated linearly between thresholds at the module FLOPs of each greedy plan within their range."""
    points = sorted((table[name]["module_flops"], table[name]["lpips"]) for name in table if name.startswith("δ"))
    budgets, values = zip(*points, strict=True)
    return {
        name: {
            "module_flops": row["module_flops"],
            "greedy": row["lpips"],
            "headwise": float(np.interp(row["module_flops"], budgets, values)),
        }
        for name, row in table.items()
        if name.startswith("greedy") and budgets[0] <= row["module_flops"] <= budgets[-1]
    }


def write(path: Path, model: str, result: dict[str, Any]) -> None:
    """Write a result with its settings and versions."""
    about = {
        "command": "see the head of benchmarks/headwise.py",
        "date": datetime.now(UTC).date().isoformat(),
        "model": f"tiny:{model}",
        "device": "cpu, float32",
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "calibration": {"prompts": CALIBRATION, "seed": CALIBRATION_SEED},
        "ablations": {name: asdict(settings) for name, settings in ABLATIONS.items()},
        "versions": versions(),
    }
    path.write_text(json.dumps(about | result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    app()
