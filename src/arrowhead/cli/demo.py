"""`arrowhead demo`: on both bundled models, calibrate, solve for two budgets, generate, and compare."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from arrowhead import tiny
from arrowhead.analysis import draw
from arrowhead.analysis.palette import COLOURS, MEANINGS
from arrowhead.evaluation.side_by_side import Evaluation, Score, evaluate
from arrowhead.plans.atomic_write import require_writable, write
from arrowhead.searches.budget.api import calibrate
from arrowhead.searches.budget.config import Budget
from arrowhead.searches.budget.solver.solution import solve

BUDGETS = {
    "half": Budget(transformer_flops=0.5, granularity="step"),
    "a third": Budget(transformer_flops=0.33, granularity="step"),
}
"""Fractions of the transformer's FLOPs. All sites do the same in a step, which has the least error on both models (LOG.md)."""


@dataclass(frozen=True)
class Demo:
    """The demo of one bundled model.

    `common` are arguments of all its calls. `argument` is the name of the argument that says what to draw: `calibration` holds
    the values for the calibration run, and `drawn` those for the compared images, which are labelled with `titles`.
    """

    model: str
    about: str
    common: Mapping[str, Any]
    argument: str
    calibration: tuple[Any, ...]
    drawn: tuple[Any, ...]
    titles: tuple[str, ...]
    seeds: tuple[int, ...]

    def inputs(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The arguments of a call that draws these values."""
        return {**self.common, self.argument: list(values)}


EMOJI = ("red heart", "hatching chick", "broccoli", "sailboat", "fire engine", "grinning face")
DEMOS = (
    Demo(
        "dit",
        "a DiT that draws the ten classes of CIFAR-10, 32 × 32 pixels, 256 tokens",
        {"num_inference_steps": 20, "guidance_scale": 3.0},
        "class_labels",
        (0, 3, 5, 8),
        tuple(range(10)),
        tiny.CIFAR10,
        seeds=(0, 1),
    ),
    Demo(
        "mmdit",
        "an SD3 transformer that draws emoji from a prompt, 64 × 64 pixels, 1024 tokens of the image and 16 of text",
        {"num_inference_steps": 16, "guidance_scale": 4.0},
        "prompt",
        ("a noto of a tomato", "a twemoji of a ghost"),
        tuple(f"a {style} of a {name}" for name, style in zip(EMOJI, ("twemoji", "noto", "fluent") * 2, strict=True)),
        EMOJI,
        seeds=(3,),
    ),
)


def run(out: Path, console: Console) -> None:
    """Run both demos. Each writes plan.json, plan.png, images.png and results.json to its folder in `out`."""
    console.print(
        Text(
            "You are looking at two small diffusion transformers that are bundled with arrowhead, drawing the same pictures in "
            "full and with two plans that skip, repeat or extrapolate part of their work, on this machine.",
            style="bold",
        )
    )
    for demo in DEMOS:
        run_one(demo, out / demo.model, console)
    console.print(
        "\nPSNR and SSIM compare with the raw images of the same seeds. A cell is one module in one step: attention, "
        f"feed-forward or a whole block. Written to {out}/*/: plan.json ({[*BUDGETS][-1]}), plan.png, images.png, results.json"
    )


def run_one(demo: Demo, out: Path, console: Console) -> None:
    """Run the demo of one model and print its table."""
    console.print(Text.assemble("\n", (demo.model, "bold"), f", {demo.about}"))
    require_writable(out / "results.json")
    pipe = tiny.load(demo.model)
    table = calibrate(pipe, {**demo.inputs(demo.calibration), "generator": torch.Generator().manual_seed(1234)})
    plans = {name: solve(table, budget) for name, budget in BUDGETS.items()}
    result = evaluate(pipe, plans, demo.inputs(demo.drawn), seeds=demo.seeds)
    plans[[*BUDGETS][-1]].save(out / "plan.json")
    draw.plan_map(plans, out / "plan.png")
    count = len(demo.drawn)
    rows = {"raw": result.raw[:count]} | {score.name: score.images[:count] for score in result.scores}
    draw.image_grid(rows, [*demo.titles], out / "images.png")
    write(out / "results.json", (json.dumps(result.as_dict(), indent=1, allow_nan=False) + "\n").encode())
    console.print(scores(demo, result))


def scores(demo: Demo, result: Evaluation) -> Table:
    """The table of scores: a row for each quantity, a column for each setting."""
    steps, guidance = demo.common["num_inference_steps"], demo.common["guidance_scale"]
    table = Table(title=f"{demo.model}: {len(result.raw)} images, {steps} steps, guidance {guidance:g}")
    for head in ("", "raw", *(score.name for score in result.scores)):
        table.add_column(head, justify="right" if head else "left")
    cells = result.scores[0].summary.cells.total()
    rows: dict[str, tuple[str, Callable[[Score], str]]] = {
        "FLOPs left of the transformer's": ("100 %", lambda s: f"{s.plan.about['search']['transformer_flops']:.1%}"),
        "… of attention's matmuls": ("100 %", lambda s: f"{s.summary.flops.attention:.1%}"),
    }
    for kind in COLOURS:
        if any(score.summary.cells[kind] for score in result.scores):
            whole = str(cells) if kind == "full" else "0"
            rows[f"cells {MEANINGS[kind]}"] = (whole, lambda s, kind=kind: str(s.summary.cells[kind]))  # type: ignore[misc]
    rows |= {
        "peak cache": ("0", lambda s: f"{s.summary.peak_cache_bytes / 2**20:.1f} MiB"),
        "time, by raw's side by side": (f"{result.raw_seconds:.2f} s", lambda s: f"{s.time_ratio:.2f} ×"),
        "PSNR to raw": ("∞", lambda s: f"{s.metrics['psnr']:.1f} dB"),
        "SSIM to raw": ("1", lambda s: f"{s.metrics['ssim']:.3f}"),
    }
    for name, (raw, of) in rows.items():
        table.add_row(name, raw, *map(of, result.scores))
    return table
