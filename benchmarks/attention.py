"""Time of attention and of the whole generation under each method, divided by the untouched pipeline's, on the CPU.

    python benchmarks/attention.py

Two models: the bundled one at its 256 tokens, and a DiT of 4096 tokens with random weights. One thread, process time; every
round runs all settings one after the other; a figure is the median over the rounds of its ratio to the same round's raw.
Plans run the first step in full and every later step under one method.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import DiTTransformer2DModel
from tqdm import tqdm

import arrowhead as ah
from arrowhead.kernels import dispatch
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import ASC, AST, FULL, Cell, wa_rs
from arrowhead.plans.layout import Tokens
from arrowhead.tiny.pipeline import TinyDiTPipeline
from arrowhead.versions import versions

HERE = Path(__file__).parent


def large_pipeline() -> TinyDiTPipeline:
    """4096 tokens, 4 blocks, 4 heads of 64, random weights."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=4, num_layers=4, sample_size=128, patch_size=2
    )
    pipe = TinyDiTPipeline(transformer.eval(), ah.tiny.load("dit").scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def uniform_plan(pipe: Any, tokens: int, steps: int, cell: Cell) -> ah.Plan:
    """A plan with full attention in the first step and the same cell everywhere after it."""
    target = target_of(find(pipe))
    sites = len(target.sites)
    return ah.Plan(((FULL,) * sites, *[(cell,) * sites] * (steps - 1)), target, Tokens(tokens), guided=True)


@contextmanager
def timed_attention(pipe: Any) -> Iterator[Callable[[], float]]:
    """Process seconds spent inside the attention modules since the block began."""
    spent, started = 0.0, 0.0

    def begin(*_: Any) -> None:
        nonlocal started
        started = time.process_time()

    def end(*_: Any) -> None:
        nonlocal spent
        spent += time.process_time() - started

    modules = find(pipe).modules.values()
    hooks = [h for m in modules for h in (m.register_forward_pre_hook(begin), m.register_forward_hook(end))]
    try:
        yield lambda: spent
    finally:
        for hook in hooks:
            hook.remove()


def measure_pipeline(pipe: Any, tokens: int, images: int, steps: int, rounds: int) -> dict[str, Any]:
    windows = {"WA-RS": wa_rs(tokens // 8), "WA-RS+ASC": wa_rs(tokens // 8, share_cfg=True)}
    cells: dict[str, Cell] = {"ASC": ASC, **windows, "AST": AST}
    plans: dict[str, ah.Plan | None] = {"raw": None, "full": uniform_plan(pipe, tokens, steps, FULL)}
    plans |= {name: uniform_plan(pipe, tokens, steps, cell) for name, cell in cells.items()}
    inputs: dict[str, Any] = {"class_labels": list(range(images)), "num_inference_steps": steps, "output_type": "pt"}
    attention: dict[str, list[float]] = {name: [] for name in plans}
    whole: dict[str, list[float]] = {name: [] for name in plans}
    for _ in tqdm(range(rounds), desc=f"{tokens} tokens"):
        for name, plan in plans.items():
            with nullcontext() if plan is None else ah.applied(pipe, plan), timed_attention(pipe) as spent:
                started = time.process_time()
                pipe(**inputs, generator=torch.Generator().manual_seed(0))
                whole[name].append(time.process_time() - started)
                attention[name].append(spent())
    ratio = {
        kind: {n: median(x / r for x, r in zip(seconds[n], seconds["raw"], strict=True)) for n in plans}
        for kind, seconds in (("attention", attention), ("whole", whole))
    }
    flops = {name: plan.flops() if plan else None for name, plan in plans.items()}
    return {
        "tokens": tokens,
        "images": images,
        "steps": steps,
        "rounds": rounds,
        "raw_seconds": {"attention_modules": median(attention["raw"]), "whole": median(whole["raw"])},
        "settings": {
            name: {
                "module_time": ratio["attention"][name],
                "whole_time": ratio["whole"][name],
                "attention_flops": f.attention if (f := flops[name]) else 1.0,
                "module_flops": f.module if f else 1.0,
            }
            for name in plans
        },
    }


def measure_kernel(tokens: int, batch: int, heads: int, head_dim: int, rounds: int) -> dict[str, Any]:
    """Time of a band of N/8 on each side divided by dense attention's, for the attention call only."""
    q, k, v = (torch.randn(batch, heads, tokens, head_dim) for _ in range(3))
    layout, radius = Tokens(tokens), tokens // 8
    calls = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "chunked": lambda: dispatch.arrow(q, k, v, layout, radius, kernel="chunked"),
    }
    ratios = []
    for round_ in range(rounds + 1):
        seconds = {}
        for name, call in calls.items():
            started = time.process_time()
            call()  # type: ignore[no-untyped-call]
            seconds[name] = time.process_time() - started
        if round_:  # the first round warms up
            ratios.append(seconds["chunked"] / seconds["dense"])
    density = (tokens * (2 * radius + 1) - radius * (radius + 1)) / tokens**2
    shape = {"tokens": tokens, "batch": batch, "heads": heads, "head_dim": head_dim, "radius": radius}
    return shape | {"density": density, "time": median(ratios), "rounds": rounds}


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the results")] = HERE / "results/attention_cpu.json",
    rounds: Annotated[int, typer.Option(help="rounds of the pipelines; the kernel gets four times as many")] = 7,
) -> None:
    """Measure, and write the results."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = ((256, 20, 4, 32), (1024, 8, 4, 64), (4096, 2, 4, 64))
    result = {
        "command": "python benchmarks/attention.py",
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"CPU {platform.machine()}, one thread of {os.cpu_count()} cores, float32, process time",
        "baseline": "the untouched pipeline, torch's own CPU attention",
        "versions": versions(),
        "kernel": [measure_kernel(*shape, rounds=4 * rounds) for shape in shapes],
        "pipelines": [
            measure_pipeline(ah.tiny.load("dit"), 256, images=8, steps=10, rounds=rounds),
            measure_pipeline(large_pipeline(), 4096, images=1, steps=5, rounds=rounds),
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(result["pipelines"], indent=1))


if __name__ == "__main__":
    typer.run(main)
