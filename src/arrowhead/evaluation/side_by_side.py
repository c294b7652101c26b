"""Quality, cost and time of plans, each against the untouched pipeline with the same seeds, side by side in one run."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from arrowhead.engine.compile_boundary import force_eager
from arrowhead.engine.install import applied
from arrowhead.engine.stats import Summary
from arrowhead.errors import InputsInvalid
from arrowhead.metrics.images import psnr, ssim
from arrowhead.models.model import transformers_of
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import to_json_value
from arrowhead.versions import versions

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

Metric = Callable[[Tensor, Tensor], float]
"""Of images and of the raw images with the same seeds, both (n, C, H, W) in [0, 1]."""
METRICS: Mapping[str, Metric] = {"psnr": psnr, "ssim": ssim}


@dataclass(frozen=True)
class Score:
    """What one plan gave.

    `time_ratio` is the median over the seeds of its time by the untouched pipeline's, both measured in this run, one after
    the other; `metrics` compare `images` with the raw ones.
    """

    name: str
    plan: Plan
    summary: Summary
    time_ratio: float
    metrics: Mapping[str, float]
    images: Tensor

    def as_dict(self) -> dict[str, Any]:
        """All but the images, for JSON: what is infinite becomes None."""
        values = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        counted = {**vars(self.summary), "flops": vars(self.summary.flops)}
        return {"search": self.plan.about.get("search"), **counted, "time_ratio": self.time_ratio, **values}


@dataclass(frozen=True)
class Evaluation:
    """Scores of plans, the untouched pipeline's images (n, C, H, W) and median seconds for a seed, and how it was measured.

    Of videos every frame is an image.
    """

    raw: Tensor
    raw_seconds: float
    scores: tuple[Score, ...]
    setting: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """All but the images, for JSON."""
        scores = {score.name: score.as_dict() for score in self.scores}
        return {**self.setting, "images": len(self.raw), "raw_seconds_per_seed": self.raw_seconds, "plans": scores}


def evaluate(
    pipe: "DiffusionPipeline",
    plans: Mapping[str, Plan],
    inputs: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    metrics: Mapping[str, Metric] = METRICS,
    progress: bool = True,
) -> Evaluation:
    """Generate `inputs` once for each seed, untouched and with every plan in turn, and compare.

    Whether the plans fit is known before anything is generated. The first seed is generated beforehand, untimed, untouched and
    with the first plan. Nothing of `inputs` may be a generator: `seeds` says them.

    Raises:
        InputsInvalid: there is no seed or no plan, one is something else, or the inputs bring a generator.
        PlanMismatch: a plan was made for something else.
    """
    _check_types(plans, inputs, seeds, metrics)
    if not seeds or not plans or "raw" in plans or "generator" in inputs:
        raise InputsInvalid(
            f"got {len(seeds)} seeds, plans {sorted(plans)} and inputs {sorted(inputs)}; wanted at least one seed, one plan, "
            "none of them named raw, and no generator among the inputs"
        )
    for fitting in plans.values():
        require_fit(pipe, fitting, inputs, seeds[0])
    settings: dict[str, Plan | None] = {"raw": None, **plans}
    images: dict[str, list[Tensor]] = {name: [] for name in settings}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    summaries: dict[str, Summary] = {}
    for plan in (None, next(iter(plans.values()))):
        with nullcontext() if plan is None else applied(pipe, plan):
            generate(pipe, inputs, seeds[0])
    for seed in tqdm(seeds, desc="evaluate", unit="seed", disable=not progress):
        for name, plan in settings.items():
            with nullcontext() if plan is None else applied(pipe, plan) as run:
                started = time.perf_counter()
                images[name].append(generate(pipe, inputs, seed))
                seconds[name].append(time.perf_counter() - started)
                if run is not None:
                    summaries[name] = run.summary()
    raw = torch.cat(images["raw"])
    scores = []
    for name, plan in plans.items():
        ratios = [mine / whole for mine, whole in zip(seconds[name], seconds["raw"], strict=True)]
        made = torch.cat(images[name])
        values = {metric: measure(made, raw) for metric, measure in metrics.items()}
        scores.append(Score(name, plan, summaries[name], median(ratios), values, made))
    transformer, *_ = transformers_of(pipe)
    setting = {
        "inputs": {name: to_json_value(value) for name, value in inputs.items()},
        "seeds": list(seeds),
        "device": str(transformer.device),
        "dtype": str(transformer.dtype),
        "versions": versions(),
        "baseline": "the untouched pipeline, each seed in turn with the plans",
    }
    return Evaluation(raw, median(seconds["raw"]), tuple(scores), setting)


def _check_types(plans: Any, inputs: Any, seeds: Any, metrics: Any) -> None:
    if not isinstance(plans, Mapping) or not all(isinstance(plan, Plan) for plan in plans.values()):
        raise InputsInvalid(f"got plans {plans!r:.200}, wanted a mapping of names to what search gives, or Plan.load(path)")
    if not isinstance(inputs, Mapping) or not all(isinstance(name, str) for name in (*inputs, *plans)):
        raise InputsInvalid(f"got inputs {inputs!r:.200}, wanted a mapping of the pipeline call's keyword arguments")
    if not isinstance(seeds, Sequence) or not all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds):
        raise InputsInvalid(f"got seeds {seeds!r:.200}, wanted a list of whole numbers from 0 to 2**64 - 1")
    if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
        raise InputsInvalid(f"got metrics {metrics!r:.200}, wanted a mapping of names to functions of two batches of images")


class _Begun(Exception):
    """The transformer is about to run."""


def require_fit(pipe: "DiffusionPipeline", plan: Plan, inputs: Mapping[str, Any], seed: int) -> None:
    """Check a plan against a call of the pipeline, which is stopped where it would run the transformer first.

    Raises:
        PlanMismatch: the plan was made for something else.
    """

    def stop(*_: Any) -> None:
        raise _Begun

    with applied(pipe, plan), force_eager(), suppress(_Begun), ExitStack() as hooks:
        for transformer in transformers_of(pipe):  # whichever is called first
            hook = transformer.register_forward_pre_hook(stop)  # after the plan's own, which looks at steps and tokens
            hooks.callback(hook.remove)
        generate(pipe, inputs, seed)


def generate(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], seed: int) -> Tensor:
    """One call of the pipeline: its images, or its videos' frames one after another, on the CPU, (n, C, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    made = pipe(**{**inputs, "generator": generator, "output_type": "pt"})
    images: Tensor = made.images if hasattr(made, "images") else made.frames.flatten(0, 1)  # of (B, F, C, H, W)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return images.float().cpu()


__all__ = ["METRICS", "Evaluation", "Score", "evaluate", "generate"]
