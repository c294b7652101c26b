"""Plans under a budget beside other accelerations that need no training, by the FLOPs that were really multiplied.

    python benchmarks/peers.py generate mmdit32
    python benchmarks/peers.py measure mmdit32 --tools TOOLS

Peers are diffusers' own hooks with their default settings, but for those that are named, and fewer steps of the sampler. Every
setting draws the same pictures from the same seeds as `raw`. `generate` notes, batch by batch, what PyTorch's counter saw, and
makes nothing twice; `measure` needs LPIPS: see benchmarks/README.md. What follows the name of the command may be `dit` as well.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import budget
import matplotlib.pyplot as plt
import torch
import typer
from diffusers import CacheMixin, hooks
from shards import load_images, make_images, own_share
from torch import Tensor

import arrowhead as ah
from arrowhead.metrics.images import psnr, ssim
from arrowhead.search.budget.recorder import flop_counter

Peer = Callable[[Any], None]
"""Hooks a pipeline, which serves for one generation."""
BUDGETS = (0.7, 0.55, 0.4, 0.3, 0.2)
FEATURES = [r"transformer_blocks\.\d+\.(attn|attn1|ff|ff_context)"]
"""The modules whose outputs TaylorSeer forecasts: attention and feed-forwards."""

HERE = Path(__file__).parent

app = typer.Typer(add_completion=False)


def first_block(threshold: float) -> Peer:
    """FirstBlockCache."""
    return lambda pipe: hooks.apply_first_block_cache(pipe.transformer, hooks.FirstBlockCacheConfig(threshold))


def taylor_seer(interval: int) -> Peer:
    """TaylorSeer of the first order, in the transformer's own dtype."""
    config = hooks.TaylorSeerCacheConfig(interval, max_order=1, taylor_factors_dtype=torch.float32, cache_identifiers=FEATURES)
    return lambda pipe: hooks.apply_taylorseer_cache(pipe.transformer, config)


def broadcast(skip: int) -> Peer:
    """PyramidAttentionBroadcast, between the timesteps 100 and 800, its default."""

    def apply(pipe: Any) -> None:
        seen = [1000.0]

        def note(_module: Any, args: Any, kwargs: Any) -> None:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[3]  # SD3's fourth; DiT's is named
            seen[0] = float(timestep.flatten()[0])

        pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
        config = hooks.PyramidAttentionBroadcastConfig(skip, current_timestep_callback=lambda: seen[0])
        hooks.apply_pyramid_attention_broadcast(pipe.transformer, config)

    return apply


PEERS: dict[str, Peer] = {
    **{f"FirstBlockCache {t}": first_block(t) for t in (0.05, 0.1, 0.2, 0.3)},
    **{f"TaylorSeer {i}": taylor_seer(i) for i in (2, 3, 5)},
    **{f"PyramidAttentionBroadcast {s}": broadcast(s) for s in (2, 3, 5)},
}
FEWER = {f"fewer steps {b:.0%}": b for b in BUDGETS}
OWN = {f"budget {b:.0%}": b for b in BUDGETS}


def work_of(name: budget.Name) -> Path:
    """Beside the work of budget.py, whose pictures are of attention's FLOPs."""
    found = budget.work_of(name)
    return found.with_name(f"peers-{found.name}")


def plan_of(pipe: Any, name: budget.Name, left: float) -> ah.Plan:
    """For whole sites, feed-forwards among them; from a table that is calibrated once."""
    work = work_of(name)
    work.mkdir(parents=True, exist_ok=True)
    if not (file := work / "table.safetensors").exists():
        ah.calibrate(pipe, budget.calibration(budget.CASES[name])).save(file)
    return ah.solve(ah.Table.load(file), ah.Budget(transformer_flops=left, granularity="site"))


@app.command()
def generate(name: budget.Name, shard: budget.Shard = "0/1", only: budget.Only = None) -> None:
    """Make the images; image i has input i and seed i in every setting."""
    index, count = own_share(shard)
    case, work = budget.CASES[name], work_of(name)
    for setting in only or ["raw", *OWN, *FEWER, *PEERS]:
        make = partial(images_of, name, setting)
        make_images(work / setting, range(0, len(case.images), case.batch)[index::count], make)


def images_of(name: budget.Name, setting: str, start: int) -> Tensor:
    """A batch of a setting, (n, 3, H, W); the FLOPs of its generation are written beside it."""
    case, pipe = budget.CASES[name], ah.tiny.load(name)
    plan = plan_of(pipe, name, OWN[setting]) if setting in OWN else None
    if setting in PEERS:
        PEERS[setting](pipe)
    stop = min(start + case.batch, len(case.images))
    inputs = {
        **case.common,
        case.asks: case.images[start:stop],
        "num_inference_steps": round(case.common["num_inference_steps"] * FEWER.get(setting, 1.0)),
        "generator": [torch.Generator().manual_seed(i) for i in range(start, stop)],
    }
    applied = nullcontext() if plan is None else ah.applied(pipe, plan)
    with applied, CacheMixin.cache_context(pipe.transformer, "cond_uncond"), flop_counter() as counter:
        images: Tensor = pipe(**inputs).images
    (work_of(name) / setting / f"{start:05}.flops").write_text(str(counter.get_total_flops()))
    return images


@app.command()
def measure(name: budget.Name, tools: Annotated[Path, typer.Option(help="folder of perceptual.py")]) -> None:
    """Compare with the raw images those of every setting that was generated, and draw the front."""
    sys.path.insert(0, str(tools))
    lpips, work = importlib.import_module("perceptual").LPIPS(), work_of(name)
    raw, whole, points = load_images(work / "raw"), spent(work / "raw"), {}
    for setting in (*OWN, *FEWER, *PEERS):
        if not (work / setting).exists() or len(images := load_images(work / setting)) < len(raw):
            typer.echo(f"{setting}: not all there, left out")
            continue
        points[setting] = {
            "flops": spent(work / setting) / whole,
            "lpips": float(lpips(images * 2 - 1, raw * 2 - 1).mean()),
            "ssim": ssim(images, raw),
            "psnr": psnr(images, raw),
        }
    budget.write(HERE / f"results/peers_{name}.json", name, {"images": len(raw), "points": points})
    front(points, HERE / f"results/peers_{name}.png")


def spent(folder: Path) -> float:
    """FLOPs of all that is in a folder."""
    return sum(float(path.read_text()) for path in folder.glob("*.flops"))


def front(points: dict[str, dict[str, float]], path: Path) -> None:
    """LPIPS over FLOPs, a line for each kind of setting."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for setting, point in points.items():
        kind = setting.rpartition(" ")[0].replace("budget", "arrowhead, transformer_flops")
        lines.setdefault(kind, []).append((point["flops"], point["lpips"]))
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for kind, line in lines.items():
        flops, values = zip(*sorted(line), strict=True)
        axis.plot([100 * f for f in flops], values, marker="o", lw=2.5 if "arrowhead" in kind else 1.2, label=kind)
    axis.set(xlabel="FLOPs of a generation left, %", ylabel="LPIPS to raw, less is better", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    app()
