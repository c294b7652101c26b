"""`arrowhead profile`: watch one generation; `arrowhead solve`: find a plan from what was seen, without the model."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

import arrowhead as ah
from arrowhead.cli.console import console
from arrowhead.cli.inputs import Device, Dtype, Inputs, ModelName, Seed, budget_of, load, parse
from arrowhead.cli.plan_map import show_plan
from arrowhead.plans.atomic_write import require_writable
from arrowhead.plans.plan import Plan

PROFILE = "a profile: a file that profile wrote, or a repository on the Hub, such as org/name"


def profile(
    model: ModelName,
    inputs: Inputs,
    out: Annotated[Path, typer.Option("--out", "-o", help="the profile's file")] = Path("profile.safetensors"),
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Watch one generation in full, and save what skipping steps would change; solve finds plans from that."""
    require_writable(out)
    call = parse(inputs) | {"generator": torch.Generator().manual_seed(seed)}
    known = ah.profile(load(model, device, dtype), call)
    known.save(out)
    head, *rows = known.card("").tables["Budgets"]
    table = Table(*head, title=f"{known.target.transformer}, {known.steps} steps")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"written to {out}")


def solve(
    path: Annotated[str, typer.Argument(metavar="PROFILE", help=PROFILE)],
    budget: Annotated[
        str, typer.Option(help="transformer_flops=F, error=E or speedup=X; or light, balanced, strong")
    ] = "balanced",
    steps: Annotated[int | None, typer.Option(help="number of steps of the plan; default: the profile's", min=1)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="the plan's file")] = Path("plan.json"),
) -> None:
    """Find a plan for a budget from a profile, without the model."""
    require_writable(out)
    asked, known = budget_of(budget), ah.Profile.from_pretrained(path)
    plan: Plan = ah.solve(known if steps is None else known.resample(steps=steps), asked)
    plan.save(out)
    show_plan(plan)
    console.print(f"written to {out}")
