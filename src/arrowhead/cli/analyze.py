"""`arrowhead analyze`: draws an analysis of a model's attention, or the saved arrays of an earlier one, and prints medians."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import arrowhead as ah
from arrowhead.analysis.measure import PARTS
from arrowhead.cli.console import console
from arrowhead.cli.inputs import INPUT, Device, Dtype, Seed, load, parse
from arrowhead.errors import InputsInvalid
from arrowhead.plans.atomic_write import require_writable, write

Source = Annotated[str, typer.Argument(help="a model as for other commands; or an npz that analyze wrote, to draw it again")]
Only = Annotated[list[str] | None, typer.Option(help=f"part of the analysis: {', '.join(PARTS)}; repeat; default: all parts")]
SiteOfMap = Annotated[str | None, typer.Option(help="site of the attention map, by path or number; default: the middle one")]
HeadOfMap = Annotated[list[int] | None, typer.Option(help="head of the attention map; repeat; default: 0")]
StepOfMap = Annotated[int | None, typer.Option(help="step of the attention map, from 0; default: the middle one")]
Radius = Annotated[
    int | None, typer.Option(help="radius of the window, in tokens on each side; default: an eighth of the tokens")
]
DrawnPlans = Annotated[list[Path] | None, typer.Option(exists=True, dir_okay=False, help="a plan to draw as well; repeat")]


def analyze(
    model: Source,
    inputs: Annotated[list[str] | None, INPUT] = None,
    out: Annotated[Path, typer.Option(help="folder for arrays and figures")] = Path("analysis"),
    only: Only = None,
    site: SiteOfMap = None,
    head: HeadOfMap = None,
    step: StepOfMap = None,
    radius: Radius = None,
    plan: DrawnPlans = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Draw where attention repeats itself and how local it is, as in the papers' figures, from one run."""
    from arrowhead.analysis.draw import plan_map  # noqa: PLC0415  # matplotlib
    from arrowhead.analysis.draw_attention import draw  # noqa: PLC0415

    require_writable(out / "analysis.json")
    plans = {path.stem: ah.Plan.load(path) for path in plan or ()}
    number = int(site) if site is not None and site.isdecimal() else site
    settings: dict[str, Any] = {"only": only, "site": number, "heads": head, "step": step, "radius": radius}
    settings = {name: value for name, value in settings.items() if value is not None}
    if model.endswith(".npz"):
        if inputs or settings:
            raise InputsInvalid(
                f"got {', '.join([*(['input'] if inputs else []), *settings])} with {model}, which is only drawn; wanted a "
                "model to run; or leave them out"
            )
        found = ah.Analysis.load(model)
    else:
        pipe = load(model, device, dtype)
        found = ah.analyze(pipe, parse(inputs or []) | {"generator": torch.Generator().manual_seed(seed)}, **settings)
    if not model.endswith(".npz"):
        found.save(out / "analysis.npz")
    write(out / "analysis.json", (json.dumps(found.as_dict(), allow_nan=False) + "\n").encode())
    files = draw(found, out)
    for ending in ("png", "svg") if plans else ():
        files.append(out / f"plans.{ending}")
        plan_map(plans, files[-1])
    for line in findings(found):
        console.print(line)
    names = ", ".join(sorted({f"{file.stem}.png, .svg" for file in files}))
    console.print(f"arrays in analysis.npz, their medians in analysis.json; {names} written to {out}/")


def findings(found: ah.Analysis) -> list[str]:
    """Medians of the arrays, in a line each."""
    lines, similarities = [], {"to the other CFG branch's": found.branch_similarity}
    if found.step_similarity is not None:
        similarities["to that of the step before"] = found.to_step_before
    for what, values in similarities.items():
        if values is not None:
            lines.append(f"a site's output, {what}: similarity {np.nanmedian(values):.3f}, least {np.nanmin(values):.3f}")
    if found.reuse_errors is not None:
        output, window, residual, none = np.nanmedian(found.reuse_errors, (1, 2))  # in the order of `REUSED`
        lines.append(
            f"a head's error with the output of the step before: {output:.2g}, with its window {window:.2g}, with its residual "
            f"{residual:.2g}, without any residual {none:.2g}"
        )
    if found.band_mass is not None and found.text_mass is not None:
        within, on_text = found.band_mass + found.text_mass, ", or on text" if found.tokens.text else ""
        lines.append(
            f"the image's attention within {found.radius} tokens on each side{on_text}: {np.median(within):.0%}, by head and "
            f"step from {within.min():.0%} to {within.max():.0%}"
        )
    if lines:
        lines.insert(0, "Medians over sites or heads, and steps:")
    if not found.guided:
        lines.append("There is no guidance, so there is one branch only, and no similarity of branches.")
    return lines
