"""Sparsity with and without scores in int8, at equal counted FLOPs of attention, on the bundled DiT.

    python benchmarks/precision.py

One calibration, solved for each budget with and without int8 among the choices. Plans are judged on seeds and labels that the
calibration has not seen, by the error of the final latents and of their detail. A score in int8 counts as half of one
(`plans/flops.py`), as on int8 tensor cores. On the CPU int8 is emulated; the time that this takes is noted.
"""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from tqdm import tqdm

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.plans.cells import FULL, Attend, Full
from arrowhead.searches.budget.config import Granularity
from arrowhead.searches.budget.validation import errors_of, measured_seconds
from arrowhead.versions import versions

BUDGETS = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2)
GRANULARITIES: tuple[Granularity, ...] = ("head", "step")
COMMON = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
CALIBRATION = {"class_labels": [0, 3, 5, 8], "seed": 10_000}
HELD_OUT = [{"class_labels": [1, 2, 6, 9], "seed": 1}, {"class_labels": [4, 7, 0, 5], "seed": 2}]
ROUNDS = 5

HERE = Path(__file__).parent


def inputs(of: dict[str, Any]) -> dict[str, Any]:
    """Of a call, with a generator of its own."""
    return {**COMMON, "class_labels": of["class_labels"], "generator": torch.Generator().manual_seed(of["seed"])}


def judged(pipe: Any, plan: ah.Plan, raw: list[torch.Tensor]) -> dict[str, Any]:
    """What a plan leaves and does on held-out inputs: norms of changes over norms, the mean over the batches."""
    with ah.applied(pipe, plan):
        found = [errors_of(driver_of(pipe, inputs(of)).final_latents(), own) for of, own in zip(HELD_OUT, raw, strict=True)]
    heads = plan.count_heads()
    return {
        "attention_flops": plan.flops().attention,
        "error": mean(each.error for each in found),
        "detail": mean(each.detail for each in found),
        "heads": {name: count / heads.total() for name, count in heads.most_common()},
    }


def main() -> None:
    """Calibrate, solve, generate; write the table."""
    torch.set_num_threads(1)
    pipe = ah.tiny.load("dit")
    pipe.set_progress_bar_config(disable=True)
    raw = [driver_of(pipe, inputs(of)).final_latents() for of in HELD_OUT]
    table = ah.calibrate(pipe, inputs(CALIBRATION), extent=ah.Extent(precisions=("int8",), kinds=("self_attention",)))
    sites = len(table.target.sites)
    plans = {
        name: ah.Plan(((cell,) * sites,) * table.steps, table.target, table.tokens, table.branches.guided)
        for name, cell in {"full": FULL, "full-int8": Attend(Full("int8"))}.items()
    }
    results: dict[str, Any] = {"all in int8": judged(pipe, plans["full-int8"], raw)}
    for granularity in GRANULARITIES:
        for left in tqdm(BUDGETS, desc=granularity):
            budget = ah.Budget(attention_flops=left, granularity=granularity)
            for name, own in {"with int8": budget, "alone": replace(budget, precision=False)}.items():
                found = judged(pipe, ah.solve(table, own), raw)
                results.setdefault(f"by {granularity}", {}).setdefault(f"{left:.0%}", {})[f"sparsity {name}"] = found
    ratios = []
    for _ in range(ROUNDS):
        native, emulated = measured_seconds(driver_of(pipe, inputs(HELD_OUT[0])), plans["full-int8"])
        ratios.append(emulated / native)
    about = {
        "command": "python benchmarks/precision.py",
        "date": datetime.now(UTC).date().isoformat(),
        "model": "tiny:dit",
        "device": "cpu, float32, one thread",
        **COMMON,
        "calibration": CALIBRATION,
        "held_out": HELD_OUT,
        "counted": "a multiply-add of int8 as half of one; emulated here, and not faster",
        "transformer_seconds_in_int8_by_native": median(ratios),
        "versions": versions(),
    }
    path = HERE / "results/precision_dit.json"
    path.write_text(json.dumps(about | results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
