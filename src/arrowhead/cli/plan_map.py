"""A plan as a coloured map in the terminal, with its legend, provenance and cost."""

from rich.text import Text

from arrowhead.analysis.palette import COLOURS, MEANINGS, ink
from arrowhead.cli.console import console
from arrowhead.plans.cells import paper_name
from arrowhead.plans.file_format import SYMBOLS
from arrowhead.plans.foreign_text import visible
from arrowhead.plans.plan import Plan


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
