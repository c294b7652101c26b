"""Bands of the sequence and boxes in the grid, at equal counted FLOPs of attention, on the bundled DiT (16 × 16 tokens).

    python benchmarks/grid_bands.py

One calibration with two radii of each kind, which keep nearly as many pairs; solved for each budget with the bands, with the
boxes, and with both among the choices. Plans are judged on seeds and labels that the calibration has not seen, by the error of
the final latents and of their detail: once with arrows alone, once with all cells that a plan may have.
"""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.plans import masks
from arrowhead.plans.cells import Radius
from arrowhead.searches.budget.validation import measured_errors
from arrowhead.versions import versions

BUDGETS = (0.7, 0.5, 0.35)
BANDS = (32, 8)
BOXES = (ah.Box(rows=2, columns=4), ah.Box(rows=1, columns=2))
CHOICES: dict[str, tuple[Radius, ...]] = {"bands": BANDS, "boxes": BOXES, "both": (*BANDS, *BOXES)}
MAY: dict[str, dict[str, Any]] = {"arrows alone": {"reuse": False, "share_cfg": False}, "all": {}}
COMMON = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}
CALIBRATION = {"class_labels": [0, 3, 5, 8], "seed": 10_000}
HELD_OUT = {"class_labels": [1, 2, 6, 9], "seed": 1}

HERE = Path(__file__).parent


def inputs(of: dict[str, Any]) -> dict[str, Any]:
    """Of a call, with a generator of its own."""
    return {**COMMON, "class_labels": of["class_labels"], "generator": torch.Generator().manual_seed(of["seed"])}


def among(table: ah.Table, radii: tuple[Radius, ...]) -> ah.Table:
    """The table, with fewer radii to choose from."""
    kept = [place for place, radius in enumerate(table.radii) if radius in radii]
    return replace(table, radii=tuple(table.radii[place] for place in kept), residuals=table.residuals[:, :, kept])


def main() -> None:
    """Calibrate, solve, generate; write the table."""
    torch.set_num_threads(1)
    pipe = ah.tiny.load("dit")
    pipe.set_progress_bar_config(disable=True)
    driver = driver_of(pipe, inputs(HELD_OUT))
    raw = driver.final_latents()
    table = ah.calibrate(pipe, inputs(CALIBRATION), extent=ah.Extent(radii=CHOICES["both"], kinds=("self_attention",)))
    about = {
        "command": "python benchmarks/grid_bands.py",
        "date": datetime.now(UTC).date().isoformat(),
        "model": "tiny:dit",
        "device": "cpu, float32, one thread",
        **COMMON,
        "calibration": CALIBRATION,
        "held_out": HELD_OUT,
        "pairs_kept": {str(radius): masks.pairs(table.tokens, radius) / table.tokens.total**2 for radius in table.radii},
        "versions": versions(),
    }
    path = HERE / "results/grid_bands_dit.json"
    results: dict[str, Any] = {}
    for name, may in MAY.items():
        for left in tqdm(BUDGETS, desc=name):
            for choice, radii in CHOICES.items():
                plan = ah.solve(among(table, radii), ah.Budget(attention_flops=left, granularity="head", **may))
                errors, heads = measured_errors(driver, plan, raw), plan.count_heads()
                results.setdefault(name, {}).setdefault(f"{left:.0%}", {})[choice] = {
                    "attention_flops": plan.flops().attention,
                    "error": errors.error,
                    "detail": errors.detail,
                    "heads": {what: count / heads.total() for what, count in heads.most_common()},
                }
        path.write_text(json.dumps(about | results, indent=1, allow_nan=False) + "\n")  # written after each budget


if __name__ == "__main__":
    main()
