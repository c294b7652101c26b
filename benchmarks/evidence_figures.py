"""The figures of docs/results.md, from results/*.json alone; grids of pictures and maps of plans from the work folders, too.

    python benchmarks/evidence_figures.py charts
    python benchmarks/evidence_figures.py pictures

`charts` needs only files of the repository. `pictures` needs the work folders of the evidence_*.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import typer
from evidence import FIGURES, HERE
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from arrowhead.analysis.palette import COLOURS

MODELS = {"dit": "DiT on CIFAR-10, 32 × 32", "mmdit32": "MMDiT on emoji, 32 × 32"}
SEARCH = {"all": "#c8553d", "greedy": "#c8553d", "headwise": "#d98e04", "budget": "#1f3a5f"}
TECHNIQUES = {
    "all": ("all together (DiTFastAttn)", "#c8553d", "o-"),
    "all, no residual": ("all together, windows without residual", "#e8a598", "o--"),
    "AST": ("AST alone: outputs of an earlier step", "#d98e04", "s-"),
    "ASC": ("ASC alone: one CFG branch for both", COLOURS["ASC"], "^-"),
    "WA-RS": ("WA-RS alone: windows with residual", COLOURS["WA-RS"], "D-"),
    "WA": ("WA alone: windows without residual", COLOURS["WA"], "D--"),
}
# DiT-XL/2-512, DiTFastAttn, Table 1: raw and D1 … D6, what is left of module FLOPs, IS
REPORTED = {"flops": (1.0, 0.85, 0.69, 0.59, 0.49, 0.41, 0.34), "is": (408.16, 412.24, 412.18, 411.74, 391.80, 370.07, 352.20)}

app = typer.Typer(add_completion=False)


def read(name: str) -> Any:
    return json.loads((HERE / f"results/{name}.json").read_text())


def models_of(part: str) -> dict[str, str]:
    """The bundled models that there are results of."""
    found = {model: title for model, title in MODELS.items() if (HERE / f"results/evidence_{part}_{model}.json").exists()}
    if not found:
        raise FileNotFoundError(2, "no results", f"evidence_{part}_*.json")
    return found


def tidy(axis: Axes, title: str, x: str, y: str) -> None:
    """What every chart has."""
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_axisbelow(True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def logged(axis: Axes) -> None:
    """A logarithmic axis upwards, with numbers that can be read."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Any, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=130)
    plt.close(figure)


def curve(axis: Axes, rows: Sequence[Any], label: str, colour: str, style: str = "o-") -> None:
    """LPIPS, with its standard error, over what is left of the module FLOPs, in percent."""
    at = [100 * row["module_flops"] for row in rows]
    values, errors = [row["lpips"] for row in rows], [row["lpips_standard_error"] for row in rows]
    axis.errorbar(at, values, errors, fmt=style, color=colour, label=label, markersize=5, capsize=2, linewidth=1.4)


def of_kind(settings: Any, kind: str) -> list[Any]:
    """The rows of one search or technique, whose names are its own and a threshold or a budget."""
    return [row for name, row in settings.items() if name.rpartition(" ")[0] == kind]


FLOPS, LPIPS = "attention modules' FLOPs left, %", "LPIPS to raw pictures (less is better)"


def table_one() -> None:
    """What thresholds keep of a model's own score, beside what the paper reports."""
    ours = read("quality")["settings"]
    rows = [ours[name] for name in ("raw", "D1", "D2", "D3", "D4", "D5", "D6")]
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    at, kept = [100 * f for f in REPORTED["flops"]], [100 * v / REPORTED["is"][0] for v in REPORTED["is"]]
    axis.plot(at, kept, "s--", color="#777777", label="DiT-XL/2-512 (reported): Inception Score")
    at, kept = [100 * r["module_flops"] for r in rows], [100 * r["accuracy"] / rows[0]["accuracy"] for r in rows]
    axis.plot(at, kept, "o-", color=SEARCH["greedy"], label="DiT on CIFAR-10 (measured): classifier's accuracy")
    for x, y, name in zip(at, kept, ("raw", "D1", "D2", "D3", "D4", "D5", "D6"), strict=True):
        axis.annotate(name, (x, y), textcoords="offset points", xytext=(-16, -11), fontsize=8)
    tidy(axis, "DiTFastAttn's thresholds: how much of the score is kept", FLOPS, "share of the raw model's score, %")
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    save(figure, "thresholds")


def techniques() -> None:
    """Each technique alone and all together, on both models."""
    models = models_of("techniques")
    size = (5.5 * len(models), 4.6)
    figure, (axes,) = plt.subplots(1, len(models), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, (model, title) in zip(axes, models.items(), strict=True):
        settings = read(f"evidence_techniques_{model}")["settings"]
        for kind, (label, colour, style) in TECHNIQUES.items():
            curve(axis, of_kind(settings, kind), label, colour, style)
        logged(axis)
        tidy(axis, f"{title}: thresholds D2, D4, D6", FLOPS, LPIPS if axis is axes[0] else "")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3 if len(models) > 1 else 2,
        frameon=False,
        fontsize=8,
    )
    save(figure, "techniques")


def searches() -> None:
    """Quality over FLOPs for the three searches, and what each takes."""
    models = models_of("techniques")
    size = (11, 3.5 * len(models))
    figure, axes = plt.subplots(len(models), 2, figsize=size, layout="constrained", width_ratios=(3, 2), squeeze=False)
    names = {"all": "greedy (DiTFastAttn)", "headwise": "head by head (DiTFastAttnV2)", "budget": "one budget (arrowhead)"}
    for (left, right), (model, title) in zip(axes, models.items(), strict=True):
        result = read(f"evidence_techniques_{model}")
        settings, raw = result["settings"], result["raw_cpu_seconds"]
        for kind, label in names.items():
            curve(left, of_kind(settings, kind), label, SEARCH[kind])
        logged(left)
        tidy(left, f"{title}: quality", FLOPS, LPIPS)
        left.legend(frameon=False, fontsize=8)
        taken = {n: row["search_cpu_seconds"] / raw for n, row in settings.items() if n.rpartition(" ")[0] in names}
        labels = [name.replace("all", "greedy") for name in taken]
        right.barh(labels, list(taken.values()), color=[SEARCH[name.rpartition(" ")[0]] for name in taken])
        right.bar_label(right.containers[0], fmt="%.1f", fontsize=8, padding=2)
        right.invert_yaxis()
        tidy(right, f"{title.partition(' ')[0]}: what the search takes", "CPU time, in raw generations of its own inputs", "")
    save(figure, "searches")


def steps() -> None:
    """The same threshold at few and many steps, and a budget of the same FLOPs."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {"dit": "o-", "mmdit32": "s--"}
    for model, title in models_of("steps").items():
        read_in = read(f"evidence_steps_{model}")
        result, threshold = read_in["steps"], read_in["threshold"]
        at = [int(number) for number in result]
        left = [100 * row["greedy"]["module_flops"] for row in result.values()]
        axes[0].plot(at, left, styles[model], color=SEARCH["greedy"], label=title)
        for kind, said in (("greedy", f"greedy {threshold}"), ("budget", "a budget of as many FLOPs")):
            rows = [row[kind] for row in result.values()]
            values, errors = [row["lpips"] for row in rows], [row["lpips_standard_error"] for row in rows]
            label = f"{title.partition(' ')[0]}, {said}"
            axes[1].errorbar(at, values, errors, fmt=styles[model], color=SEARCH[kind], label=label, capsize=2, markersize=5)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks([14, 20, 28, 50, 100, 200], [14, 20, 28, 50, 100, 200])
        axis.minorticks_off()
    logged(axes[1])
    axes[0].set_ylim(0, 100)
    tidy(axes[0], f"What threshold {threshold} leaves", "denoising steps", FLOPS)
    tidy(axes[1], "What it costs", "denoising steps", "LPIPS to raw pictures of as many steps")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    save(figure, "steps")


def negative() -> None:
    """How far the negative prompt moves pictures, raw and by plans."""
    result = read("evidence_negative")
    settings = result["settings"]
    kinds = [name.partition(",")[0] for name in settings if name.endswith("without")]
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    raw = settings["raw"]["effect"]["lpips"]
    axis.axhline(raw, color="#555555", linestyle="--", linewidth=1.2, label="the move without compression")
    bars = (
        ("found without", "effect", "the move, plan found without the negative prompt", "#8fc9a8"),
        ("found with", "effect", "the move, plan found with it", "#2e8b6f"),
        ("found without", "error with", "error with the negative prompt, plan found without it", "#e8a598"),
        ("found with", "error with", "error with it, plan found with it", "#c8553d"),
    )
    for i, (which, what, label, colour) in enumerate(bars):
        of_kinds = {k: settings[name][what] for k, kind in enumerate(kinds) if (name := f"{kind}, {which}") in settings}
        values, errors = ([row[key] for row in of_kinds.values()] for key in ("lpips", "lpips_standard_error"))
        at = [k + (i - 1.5) * 0.2 for k in of_kinds]
        axis.bar(at, values, 0.2, yerr=errors, color=colour, label=label, error_kw={"linewidth": 0.8})
    names = []
    for kind in kinds:
        lefts = [settings[n]["module_flops"] for which in ("without", "with") if (n := f"{kind}, found {which}") in settings]
        names.append(f"{kind}\n" + ", found with it: ".join(f"{share:.0%} of FLOPs left" for share in lefts))
    axis.set_xticks(range(len(kinds)), names)
    tidy(axis, f"MMDiT: what the negative prompt “{result['negative_prompt']}” does to pictures", "", "LPIPS")
    axis.set_xlabel("move: LPIPS between pictures with and without it; error: between compressed and raw pictures", fontsize=9)
    axis.grid(visible=False, axis="x")
    axis.set_ylim(0, 1.75 * max(raw, *(row["error with"]["lpips"] for name, row in settings.items() if name != "raw")))
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    save(figure, "negative")


def transfer() -> None:
    """Plans on what they were not found for, and plans that were."""
    models = models_of("transfer")
    figure, (axes,) = plt.subplots(1, len(models), figsize=(6 * len(models), 4.4), layout="constrained", squeeze=False)
    for axis, (model, title) in zip(axes, models.items(), strict=True):
        kinds = read(f"evidence_transfer_{model}")["pictures"]
        searches = [name.partition(",")[0] for name in kinds["home"]]
        for s, search in enumerate(searches):
            for which, shade in (("home", 0.45), ("own", 1.0)):
                rows = [of[f"{search}, found for {kind if which == 'own' else 'home'}"] for kind, of in kinds.items()]
                at = [k + (s - 0.5) * 0.36 + (0.08 if which == "own" else -0.08) for k in range(len(kinds))]
                values, errors = [row["lpips"] for row in rows], [row["lpips_standard_error"] for row in rows]
                colour = SEARCH[search.partition(" ")[0]]
                label = f"{search}, found {'for these pictures' if which == 'own' else 'at home'}"
                axis.errorbar(at, values, errors, fmt="o", color=colour, alpha=shade, label=label, capsize=2, markersize=6)
                for x, value, row in zip(at, values, rows, strict=True):
                    where = {"textcoords": "offset points", "xytext": (4, 5), "fontsize": 6, "color": "#555555"}
                    axis.annotate(f"{row['module_flops']:.0%}", (x, value), **where)
        logged(axis)
        axis.set_xticks(range(len(kinds)), list(kinds))
        tidy(axis, title, "pictures of (small: module FLOPs left)", "LPIPS to raw pictures of the same seeds")
        axis.legend(frameon=False, fontsize=7, loc="best")
    save(figure, "transfer")


CHARTS = (table_one, techniques, searches, steps, negative, transfer)


@app.command()
def charts() -> None:
    """Draw what the results are there for."""
    for chart in CHARTS:
        try:
            chart()
        except FileNotFoundError as missing:
            typer.echo(f"{chart.__name__}: {Path(missing.filename).name} is not there, left out")


@app.command()
def pictures() -> None:
    """Draw the grids of pictures and the maps of plans."""
    from evidence_grids import draw_all  # noqa: PLC0415  needs torch and the models

    draw_all()


if __name__ == "__main__":
    app()
