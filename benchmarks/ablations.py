"""What each part of the budget search contributes: plans found without it, judged on inputs and seeds not used by the search.

    python benchmarks/ablations.py generate dit
    python benchmarks/ablations.py measure dit --tools TOOLS

Plans come from tables alone, without corrections, for 40 and 20 % of the attention modules' FLOPs: all sites in step, and for
some settings single heads. Settings about feed-forwards have 70 % of the transformer's FLOPs. Files that exist are not made
again. `measure` needs LPIPS: see README.md. `mmdit32` may stand in place of `dit`.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import budget
import torch
import typer
from shards import load_images, make_images
from torch import Tensor

import arrowhead as ah
from arrowhead.errors import InputsInvalid
from arrowhead.metrics.images import psnr
from arrowhead.searches.budget.sensitivity.probes import SiteProbes

IMAGES, BUDGETS = 20, (0.4, 0.2)
HERE = Path(__file__).parent

app = typer.Typer(add_completion=False)
Calibrated = Callable[[Any, budget.Case], ah.Table]


def calibrated(inputs: int = 8, **extent: Any) -> Calibrated:
    """A calibration on this many inputs, with this extent."""

    def table(pipe: Any, case: budget.Case) -> ah.Table:
        arguments = budget.calibration(case)
        asked = (arguments[case.asks] * 2)[:inputs]
        return ah.calibrate(pipe, arguments | {case.asks: asked}, extent=ah.Extent(**extent), progress=False)

    return table


def local(pipe: Any, case: budget.Case) -> ah.Table:
    """The table with the same weight for every site and step, as in the papers' searches."""
    own = SiteProbes.fitted
    SiteProbes.fitted = lambda self, steps: torch.ones(steps, self._sites)  # type: ignore[method-assign]
    try:
        table = calibrated(gradients=False)(pipe, case)
    finally:
        SiteProbes.fitted = own  # type: ignore[method-assign]
    return replace(table, sampler_gains=(1.0,) * table.steps)


TABLES: dict[str, Calibrated] = {
    "default": calibrated(),
    "ages 4": calibrated(ages=4),
    "ages 1": calibrated(ages=1),
    "without gradients": calibrated(gradients=False),
    "plain local errors": local,
    "the sampler's gains alone": calibrated(feedback=0),
    "one region": calibrated(regions=1),
    **{f"{n} inputs": calibrated(n) for n in (1, 2, 4, 16)},
    **{f"{n} vectors": calibrated(vectors=n) for n in (2, 4)},
}
HEADS_TOO = ("default", "ages 1", "without gradients", "plain local errors")
KINDS = {"attention and feed-forwards": None, "attention alone": ("self_attention",), "whole blocks": ("block",)}
TRANSFORMER = 0.7


def plans(pipe: Any, case: budget.Case, work: Path) -> dict[str, Path]:
    """The files of all plans; missing plans are searched for."""
    found: dict[str, Path] = {}
    asked = {name: [ah.Budget(module_flops=b, granularity="step") for b in BUDGETS] for name in TABLES}
    for name in HEADS_TOO:
        asked[name] += [ah.Budget(module_flops=b, granularity="head") for b in BUDGETS]
    asked["default"] += [ah.Budget(module_flops=b, granularity="site") for b in BUDGETS]
    asked["default"] += [ah.Budget(module_flops=b, granularity="step", extrapolate=False) for b in BUDGETS]
    tables = TABLES | {name: calibrated(kinds=kinds) for name, kinds in KINDS.items()}
    asked |= {name: [ah.Budget(transformer_flops=TRANSFORMER, granularity="step")] for name in KINDS}
    for name, budgets in asked.items():
        table = None
        for each in budgets:
            _, left = each.asked
            what = f"{name}, {each.granularity}{'' if each.extrapolate else ', no forecasts'} @ {left:.0%}"
            file, refused = work / f"{what}.json", work / f"{what}.txt"
            if not file.exists() and not refused.exists():
                table = table or tables[name](pipe, case)
                try:
                    ah.solve(table, each).save(file)
                except InputsInvalid as infeasible:  # these choices cannot reach so few FLOPs
                    refused.write_text(str(infeasible))
            if file.exists():
                found[what] = file
    return found


@app.command()
def generate(name: budget.Name) -> None:
    """Find the plans and make the images; image i has input i and seed i in every setting."""
    case, pipe, work = budget.CASES[name], ah.tiny.load(name), work_of(name)
    work.mkdir(parents=True, exist_ok=True)

    def make(start: int) -> Tensor:
        stop = min(start + case.batch, IMAGES)
        generators = [torch.Generator().manual_seed(i) for i in range(start, stop)]
        return pipe(**case.common, **{case.asks: case.images[start:stop]}, generator=generators).images

    for setting, file in {"raw": None, **plans(pipe, case, work)}.items():
        with nullcontext() if file is None else ah.applied(pipe, ah.Plan.load(file)):
            make_images(work / setting, range(0, IMAGES, case.batch), make)


def work_of(name: budget.Name) -> Path:
    """Beside the work of budget.py."""
    found = budget.work_of(name)
    return found.with_name(f"ablations-{found.name}")


@app.command()
def measure(name: budget.Name, tools: Annotated[Path, typer.Option(help="folder of perceptual.py")]) -> None:
    """Compare every setting's images with the raw ones."""
    sys.path.insert(0, str(tools))
    lpips, work = importlib.import_module("perceptual").LPIPS(), work_of(name)
    raw, table = load_images(work / "raw"), {}
    for file in sorted(work.glob("*.json")):
        if not (work / file.stem).is_dir() or len(images := load_images(work / file.stem)) < len(raw):
            typer.echo(f"{file.stem}: not all there, left out")
            continue
        plan = ah.Plan.load(file)
        predicted = plan.about["search"]["predicted_error"]
        scores = {"lpips": float(lpips(images * 2 - 1, raw * 2 - 1).mean()), "psnr": psnr(images, raw)}
        table[file.stem] = {"module_flops": plan.flops().module, "predicted_error": predicted, **scores}
    infeasible = {file.stem: file.read_text() for file in sorted(work.glob("*.txt"))}
    command = "see the head of benchmarks/ablations.py"
    result = {"command": command, "images": len(raw), "settings": table, "infeasible": infeasible}
    budget.write(HERE / f"results/ablations_{name}.json", name, result)


if __name__ == "__main__":
    app()
