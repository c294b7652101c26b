"""`ah.compare`: one self-contained HTML page that compares the pictures of several plans."""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from arrowhead.analysis.palette import COLOURS, MEANINGS, ink
from arrowhead.evaluation.side_by_side import Evaluation, Score
from arrowhead.plans.file_format import SYMBOLS
from arrowhead.plans.foreign_text import visible
from arrowhead.report.chart import Chart, chart
from arrowhead.report.maps import CELL, head_maps, site_map
from arrowhead.report.pictures import pictures

HERE = Path(__file__).parent
METRICS = {"psnr": ("PSNR", " dB"), "ssim": ("SSIM", ""), "lpips": ("LPIPS", "")}
"""The label and unit of a metric. Other metrics are labelled with their names."""


def compare(evaluation: Evaluation, *, title: str, command: str | None = None, room: int = 32 * 2**20) -> str:
    """Make an HTML page of an evaluation: pictures beside raw, maps of the plans, and quality over FLOPs and time.

    The page needs no network: everything is in the text, and its content security policy allows nothing else. The function
    needs jinja2 (`pip install arrowhead[cli]`).

    Args:
        evaluation: what `evaluate` returned.
        title: the name of the model.
        command: the command line that made the evaluation, to be shown on the page.
        room: bytes for the pictures, which are stored without loss. The first pictures that fit are shown, at least one. All
            figures are over all pictures.

    Returns:
        The text of the page, to be written to a file as UTF-8.

    Example:
        >>> found = ah.evaluate(pipe, {"half": plan}, dict(class_labels=[1, 7]), seeds=[0])
        >>> Path("page.html").write_text(ah.compare(found, title="DiT"), encoding="utf-8")
    """
    scores = evaluation.scores
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    hashes = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; {hashes}"
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            command=command,
            evaluation=evaluation,
            setting=evaluation.setting,
            scores=scores,
            metrics={name: METRICS.get(name, (name, "")) for name in scores[0].metrics},
            pictures=pictures(evaluation, room),
            charts=_charts(scores),
            comparable=_comparable(scores),
            maps=[(score, site_map(score.plan), head_maps(score.plan)) for score in scores],
            cell=CELL,
            colours=COLOURS,
            meanings=MEANINGS,
            symbols=SYMBOLS,
            policy=policy,
            style=Markup(style),
            script=Markup(script),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printed,
    )
    environment.filters |= {"percent": _percent, "figure": _figure, "data_uri": _data_uri, "as_text": _as_text, "ink": ink}
    return environment


def _comparable(scores: tuple[Score, ...]) -> bool:
    """Whether all plans have the same sites, so that their module FLOPs are fractions of the same total."""
    return len({score.plan.target.sites for score in scores}) == 1


def _charts(scores: tuple[Score, ...]) -> list[Chart]:
    """Charts of each metric over the fraction of FLOPs and of time that is left."""
    modules, attention = ("modules’ FLOPs left", _module_flops), ("attention’s FLOPs left", _attention_flops)
    costs: Mapping[str, Callable[[Score], float]] = dict(
        [modules if _comparable(scores) else attention, ("share of raw’s time", lambda score: score.time_ratio)]
    )
    return [
        chart(cost, METRICS.get(metric, (metric, "")), {score.name: (of(score), score.metrics[metric]) for score in scores})
        for metric in scores[0].metrics
        for cost, of in costs.items()
    ]


def _module_flops(score: Score) -> float:
    return score.summary.flops.module


def _attention_flops(score: Score) -> float:
    return score.summary.flops.attention


def _printed(value: object) -> object:
    """What an expression of the template prints: control characters of a text as escapes. Markup is the page's own."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", "\N{NO-BREAK SPACE}%")


def _figure(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "∞" if value > 0 else str(value)


def _data_uri(text: str) -> str:
    return f"data:application/json;base64,{base64.b64encode(text.encode()).decode()}"


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _hash(text: str) -> str:
    """The hash of a style or script in the content security policy, which lets a browser use no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


__all__ = ["compare"]
