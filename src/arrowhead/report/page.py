"""One HTML page for a model and its plans: everything is in the file, and it asks for nothing else."""

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
from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.side_by_side import Evaluation, Score
from arrowhead.plans.file_format import SYMBOLS
from arrowhead.report.chart import Chart, chart
from arrowhead.report.maps import CELL, head_maps, site_map
from arrowhead.report.pictures import pictures

HERE = Path(__file__).parent
METRICS = {"psnr": ("PSNR", " dB"), "ssim": ("SSIM", ""), "lpips": ("LPIPS", "")}
"""How people write a metric and its unit, where that is not its name alone."""


def compare(evaluation: Evaluation, *, title: str, command: str | None = None, room: int = 32 * 2**20) -> str:
    """The page's text, to be written as UTF-8.

    `title` names the model, `command` is what made the evaluation, as one would type it. Pictures are stored without loss, the
    first ones, as many as fit into `room` bytes, but one at least; all figures are those of all pictures.
    """
    scores = evaluation.scores
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    own = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; {own}"
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
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "figure": _figure, "data_uri": _data_uri, "spelt": _spelt, "ink": ink}
    return environment


def require_writable(path: Path) -> None:
    """Make a file's folder, and try whether the file can be written, before it is worked for; what is there stays as it is.

    Raises:
        InputsInvalid: it cannot.
    """
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InputsInvalid(f"cannot write {path}: {error.strerror}; wanted a file in a folder that can be written") from error
    if new:
        path.unlink()


def _comparable(scores: tuple[Score, ...]) -> bool:
    """Whether module FLOPs of all plans are fractions of the same whole."""
    return len({score.plan.target.sites for score in scores}) == 1


def _charts(scores: tuple[Score, ...]) -> list[Chart]:
    """Each metric over what is left of the FLOPs, and of the time."""
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


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", "\N{NO-BREAK SPACE}%")


def _figure(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "∞" if value > 0 else str(value)


def _data_uri(text: str) -> str:
    return f"data:application/json;base64,{base64.b64encode(text.encode()).decode()}"


def _spelt(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _hash(text: str) -> str:
    """By which a browser knows the page's own style and script; it takes no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


__all__ = ["compare", "require_writable"]
