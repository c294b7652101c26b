"""The predicted and the measured error of the final latents, over random plans.

    python benchmarks/predicted.py dit

There are fifty plans in which sites are independent, and twenty-five in which all sites do the same in a step. `mmdit32` may
stand in place of `dit`.
"""

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import budget
import matplotlib.pyplot as plt
import torch
import typer
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from tqdm import tqdm

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.plans.cells import ASC, AST, EXTRAPOLATE, FULL, Cell
from arrowhead.searches.budget.sensitivity.site_outputs import site_outputs_of
from arrowhead.searches.budget.validation import measured_errors
from arrowhead.versions import versions

STEPS, IMAGES, PLANS = 12, 4, 50
KINDS = {"every site by itself": PLANS, "all sites in step": PLANS // 2}

HERE = Path(__file__).parent


def column(draw: random.Random) -> tuple[Cell, ...]:
    """At random, with more or less that is not computed; nothing reads what is not there."""
    rate, cells, computed = draw.uniform(0.1, 0.6), list[Cell](), 0
    for _ in range(STEPS):
        choices: list[Cell] = [ASC, *[AST] * (computed > 0), *[EXTRAPOLATE] * (computed > 1)]
        cells.append(draw.choice(choices) if computed and draw.random() < rate else FULL)
        computed += cells[-1] in (FULL, ASC)
    return tuple(cells)


def plans(table: ah.Table) -> Iterator[tuple[str, ah.Plan]]:
    """Each with its kind."""
    draw, sites = random.Random(0), len(table.target.sites)
    for kind, count in KINDS.items():
        for _ in range(count):
            columns = [column(draw)] * sites if kind == "all sites in step" else [column(draw) for _ in range(sites)]
            yield kind, ah.Plan(tuple(zip(*columns, strict=True)), table.target, table.tokens, table.branches.guided)


def predicted_error(table: ah.Table, plan: ah.Plan, kind: str) -> float:
    """The predicted squared error; changes of sites that do the same are added, as in the search."""
    if kind != "all sites in step":
        return float(table.predicted_error(plan.columns).sum())
    outputs = site_outputs_of(plan.columns[0])
    errors = table.predicted_errors([range(table.outputs.shape[1])], outputs)[:, :, 0]
    return float(errors.diagonal().sum())


def main(name: budget.Name) -> None:
    """Calibrate, predict, generate, and write results/predicted_NAME.json and .png."""
    torch.set_num_threads(1)
    case, pipe = budget.CASES[name], ah.tiny.load(name)
    pipe.set_progress_bar_config(disable=True)
    inputs = budget.calibration(case)
    inputs |= {"num_inference_steps": STEPS, case.asks: case.calibration[:IMAGES]}
    driver = driver_of(pipe, inputs)
    table, raw = ah.calibrate(pipe, inputs), driver.final_latents()
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for kind, plan in tqdm([*plans(table)], mininterval=10):
        found[kind].append((predicted_error(table, plan, kind) ** 0.5, measured_errors(driver, plan, raw).error))
    correlations = {kind: float(spearmanr(*zip(*pairs, strict=True)).statistic) for kind, pairs in found.items()}
    about = {
        "command": "see the head of benchmarks/predicted.py",
        "date": datetime.now(UTC).date().isoformat(),
        "model": f"tiny:{name}",
        "device": "cpu, float32",
    }
    setting = {"steps": STEPS, "images": IMAGES, "versions": versions()}
    result = {**about, **setting, "rank_correlation": correlations, "predicted_and_measured": found}
    (HERE / f"results/predicted_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    figure, axis = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    for kind, pairs in found.items():
        predicted, measured = zip(*pairs, strict=True)
        axis.scatter(predicted, measured, s=18, label=f"{kind}: rank correlation {correlations[kind]:.2f}")
    axis.axline((0.1, 0.1), slope=1, color="0.6", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="predicted error of the final latents", ylabel="measured")
    axis.legend(frameon=False)
    figure.savefig(HERE / f"results/predicted_{name}.png", dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
