"""The command line: thin commands over the library. Only this package prints."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

import arrowhead as ah
from arrowhead.analysis.palette import COLOURS, MEANINGS, ink
from arrowhead.cli.analyze import analyze
from arrowhead.cli.console import TRACEBACK, console, run
from arrowhead.cli.evaluate import evaluate
from arrowhead.cli.inputs import Device, Dtype, Inputs, ModelName, Seed, Seeds, by_name, load, parse
from arrowhead.errors import InputsInvalid
from arrowhead.models.find import find
from arrowhead.plans.atomic_write import replacing, require_writable, write
from arrowhead.plans.cells import paper_name
from arrowhead.plans.file_format import SYMBOLS
from arrowhead.plans.foreign_text import visible
from arrowhead.plans.plan import Plan
from arrowhead.searches.api import THRESHOLDS
from arrowhead.searches.budget.config import ASKED

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Diffusion transformers that generate faster.")
app.command()(analyze)
app.command()(evaluate)
Plans = Annotated[list[Path], typer.Option("--plan", exists=True, dir_okay=False, help="a plan that search wrote; repeat")]


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="with an error, show where it was raised, rather than one line")
    ] = False,
) -> None:
    """Diffusion transformers that generate faster."""


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for plans, figures and results")] = Path("demo")) -> None:
    """Compress the bundled models, offline, and show what is saved and what it costs in quality."""
    from arrowhead.cli.demo import run as run_demo  # noqa: PLC0415  # other commands need no matplotlib and torchmetrics

    run_demo(out, console)


@app.command()
def families(
    markdown: Annotated[bool, typer.Option(help="print a Markdown table, as in docs/families.md")] = False,
) -> None:
    """List the supported families, and how far they are tested."""
    columns = ["family", "pipelines", "compressed", "left alone", "CFG", "tests"]
    rows = [
        (
            f"{s.family} ({s.transformer})",
            ", ".join(s.pipelines),
            ", ".join(kind.replace("_", "-") for kind in s.compressed),
            s.left_alone,
            s.cfg,
            s.tested,
        )
        for s in ah.supported()
    ]
    if markdown:
        typer.echo("\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)))
        return
    table = Table(title="families", show_lines=True)
    for column in columns:
        table.add_column(column, no_wrap=column == "family", overflow="fold")
    for family, row in zip(ah.supported(), rows, strict=True):
        table.add_row(family.family, *row[1:])
    console.print(table)


@app.command()
def search(
    model: ModelName,
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="the plan's file")] = Path("plan.json"),
    budget: Annotated[
        str | None,
        typer.Option(
            help="transformer_flops=F, module_flops=F, attention_flops=F, speedup=X or error=E; or light, balanced, strong"
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="greedy (DiTFastAttn), headwise (DiTFastAttnV2), stack (all blocks at once) or budget (single sites); "
            "default: greedy with a threshold, else stack where that can be"
        ),
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help=f"greedy: a number, or one of {', '.join(THRESHOLDS)} (D4); headwise: a number (0.6)")
    ] = None,
    loss: Annotated[str, typer.Option(help="greedy: paper or signed")] = "paper",
    share_cfg: Annotated[bool, typer.Option(help="headwise: sites may compute only the conditional branch")] = False,
    residual: Annotated[bool, typer.Option(help="headwise: arrows add the residual of their last full step")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Search for a plan on one calibration run, and save it."""
    require_writable(out)
    pipe = load(model, device, dtype)
    call = parse(inputs) | {"generator": torch.Generator().manual_seed(seed)}
    how = ah.Headwise(share_cfg=share_cfg, residual=residual) if strategy == "headwise" else strategy
    if how == strategy and (share_cfg or residual):
        raise InputsInvalid(
            f"got --share-cfg or --residual with strategy {strategy}, wanted them with headwise; leave them out"
        )
    settings: Any = {"strategy": how, "budget": _budget(budget), "threshold": _number(threshold), "loss": loss}
    plan = ah.search(pipe, call, **settings)  # checks the settings
    plan.save(out)
    show_plan(plan)
    console.print(f"written to {out}")


@app.command()
def sweep(
    model: ModelName,
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="folder for the table, the plans and the figure")] = Path("sweep"),
    measure: Annotated[str, typer.Option(help="attention_flops, module_flops or transformer_flops")] = "module_flops",
    points: Annotated[int, typer.Option(help="how many budgets", min=2)] = 20,
    least: Annotated[float, typer.Option(help="the smallest budget, a fraction")] = 0.15,
    table: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="a table that sweep wrote, to solve it again without the model"),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Find plans for many budgets on one calibration run."""
    from arrowhead.analysis.draw import sweep_curve  # noqa: PLC0415  # matplotlib

    steps = (points - 1) / (1 - least)
    budgets = [ah.Budget(**{measure: round(least + i / steps, 4)}) for i in range(points)]  # type: ignore[arg-type]
    require_writable(out / "sweep.png")
    if table is not None:
        found = ah.Table.load(table)
        console.print(f"{table} was made on {found.about.get('model', 'a model without a name')}")
    else:
        pipe = load(model, device, dtype)
        found = ah.calibrate(pipe, parse(inputs) | {"generator": torch.Generator().manual_seed(seed)})
        found.save(out / "table.safetensors")
    plans = dict(zip((f"{budget.asked[1]:.3f}" for budget in budgets), ah.sweep(found, budgets), strict=True))
    for name, plan in plans.items():
        plan.save(out / f"{name}.json")
    sweep_curve(plans, measure, out / "sweep.png")
    console.print(f"{len(plans)} plans, their table and sweep.png written to {out}/")


@app.command()
def generate(
    model: ModelName,
    inputs: Inputs,
    plan: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="a plan that search wrote; without one, full attention")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("images"),
    kernel: Annotated[str, typer.Option(help="auto, chunked, flex, fused or reference")] = "auto",
    cache_dtype: Annotated[str, typer.Option(help="dtype of the caches: native, int8 or fp8")] = "native",
    cache_device: Annotated[str | None, typer.Option(help="device of the caches, such as cpu; default: the model's")] = None,
    changes: Annotated[
        str, typer.Option(help="where steps, size or schedule are not the plan's: adapt carries the plan over, refuse stops")
    ] = "adapt",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Generate images, with a plan or without."""
    require_writable(out / "000.png")
    pipe = load(model, device, dtype)
    call = parse(inputs) | {"generator": torch.Generator().manual_seed(seed), "output_type": "pil"}
    find(pipe).call_arguments((), call)
    if plan is None:
        images = pipe(**call).images
    else:
        settings: Any = {"cache_dtype": cache_dtype, "cache_device": cache_device, "changes": changes}  # apply checks them
        with ah.applied(pipe, Plan.load(plan), kernel=kernel, **settings) as run:
            images = pipe(**call).images
        console.print(str(run.summary()))
    for i, image in enumerate(images):
        with replacing(out / f"{i:03}.png") as file:
            image.save(file, "png")
    console.print(f"{len(images)} images written to {out}/")


@app.command()
def compare(
    model: ModelName,
    inputs: Inputs,
    plans: Plans,
    out: Annotated[Path, typer.Option(help="the page's file", dir_okay=False)] = Path("compare.html"),
    seeds: Seeds = 3,
    room: Annotated[
        int, typer.Option(help="MiB for pictures; metrics are over all pictures, also over those that do not fit", min=1)
    ] = 32,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Write one HTML page that compares the pictures of plans. It opens from its file and needs no network."""
    from arrowhead.evaluation.side_by_side import evaluate as measure  # noqa: PLC0415
    from arrowhead.report.page import compare as compare_pictures  # noqa: PLC0415  # torchmetrics

    loaded = by_name(plans)
    require_writable(out)
    result = measure(load(model, device, dtype), loaded, parse(inputs), seeds=range(seeds))
    text = compare_pictures(result, title=model, command=shlex.join(["arrowhead", *sys.argv[1:]]), room=room * 2**20)
    write(out, text.encode(errors="replace"))  # a command line may hold what is no UTF-8
    console.print(f"{len(result.raw)} pictures compared; {out.stat().st_size / 2**20:.1f} MiB written to {out}")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a plan that search wrote")],
    png: Annotated[Path | None, typer.Option(help="also draw the plan into this file")] = None,
    site: Annotated[str | None, typer.Option(help="draw the heads of this site instead, by path or number")] = None,
) -> None:
    """Print a plan as a coloured map of steps and sites."""
    plan = Plan.load(path)
    show_plan(plan)
    if png is not None:
        from arrowhead.analysis.draw import head_map, plan_map  # noqa: PLC0415  # matplotlib

        if site is None:
            plan_map({path.stem: plan}, png)
        else:
            head_map(plan, _site_number(plan, site), png)
        console.print(f"drawn into {png}")
    elif site is not None:
        raise InputsInvalid(f"got --site {site} without a file to draw into; wanted --png FILE as well")


@app.command()
def resample(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a plan that search wrote")],
    steps: Annotated[int, typer.Option(help="number of steps of the derived plan", min=1)],
    out: Annotated[Path, typer.Option(help="the derived plan's file")] = Path("resampled.json"),
) -> None:
    """Derive a plan for another number of steps, without a search."""
    plan = Plan.load(path).resample(steps=steps)
    plan.save(out)
    show_plan(plan)
    console.print(f"written to {out}")


def _budget(text: str | None) -> ah.Budget | str | None:
    """Parse --budget: the name of a preset, or NAME=VALUE."""
    name, equals, value = (text or "").partition("=")
    if not equals:
        return text
    if name not in ASKED or not isinstance(number := _number(value), float):
        raise InputsInvalid(
            f"got --budget {text}, wanted a name, or one of {', '.join(ASKED)} with a number, as in module_flops=0.4"
        )
    return ah.Budget(**{name: number})  # type: ignore[arg-type]


def _number(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _site_number(plan: Plan, site: str) -> int:
    paths = [s.path for s in plan.target.sites]
    if site in paths:
        return paths.index(site)
    if site.isdecimal() and int(site) < len(paths):
        return int(site)
    raise InputsInvalid(f"got site {site!r}, wanted a number from 0 to {len(paths) - 1}, or a path such as {paths[0]}")


def show_plan(plan: Plan) -> None:
    """Print a plan as a map, steps downwards and sites to the right, with legend, provenance and cost."""
    for step, row in enumerate(plan.cells):
        line = Text(f"step {step:>3}  ")
        for name in map(paper_name, row):
            line.append(f"{SYMBOLS[name]} ", style=_style(name))
        console.print(line, no_wrap=True, overflow="ellipsis")
    total, count = plan.steps * len(plan.target.sites), plan.count()
    for name in [name for name in COLOURS if count[name]]:
        console.print(
            Text.assemble((f" {SYMBOLS[name]} ", _style(name)), f" {name}: {MEANINGS[name]}, {count[name] / total:.0%}")
        )
    if any("head-wise" in name for name in count):
        heads = plan.count_heads()
        shares = ", ".join(f"{name} {n / heads.total():.0%}" for name, n in heads.most_common())
        console.print(f"heads: {shares}")
    left, peak = plan.flops(), max(plan.cache_bytes())
    if searched := plan.about.get("search"):
        provenance = ", ".join(
            f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in searched.items()
        )
        console.print(visible(provenance.replace("_", " ")))
    for change in plan.about.get("derived", ()):
        console.print(visible(f"derived: {', '.join(f'{name} {what}' for name, what in change.items())}"))
    console.print(
        f"{visible(plan.target.transformer)}, {plan.steps} steps × {len(plan.target.sites)} sites, "
        f"{plan.tokens.visual} visual tokens"
        f"{'' if plan.switch is None else f', a second transformer from step {plan.switch} on'}\n"
        f"FLOPs left: {left.attention:.1%} of attention's matmuls, {left.module:.1%} with projections; caches of at most "
        f"{peak / 2**20:.1f} MiB an image in 16 bits",
        highlight=False,
    )


def _style(name: str) -> str:
    """The colour of a kind of cell as background, with a readable text colour."""
    return f"{ink(name)} on {COLOURS[name]}"


def main() -> None:
    """Run the command line. An error is printed as one line, see `run`."""
    run(app)
