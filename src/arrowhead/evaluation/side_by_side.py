"""`ah.evaluate`: quality, FLOPs and time of plans against the untouched pipeline, with the same seeds, in one run."""

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
"""A function of images and of the raw images with the same seeds, both (n, C, H, W) in [0, 1]."""
METRICS: Mapping[str, Metric] = {"psnr": psnr, "ssim": ssim}
"""The metrics that need no network."""
MAX_NAME = 200
"""Bytes of a plan's name. File systems take 255; folders get 13 more."""


@dataclass(frozen=True)
class Score:
    """The result of one plan.

    `summary` is that of the last seed. `time_ratio` is the median over the seeds of the plan's time divided by the untouched
    pipeline's, which was measured just before. `metrics` compare `images` (n, C, H, W) in [0, 1] with the raw images.
    """

    name: str
    plan: Plan
    summary: Summary
    time_ratio: float
    metrics: Mapping[str, float]
    images: Tensor

    def as_dict(self) -> dict[str, Any]:
        """The score without its images, for JSON. Infinite metrics become None."""
        values = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        counted = {**vars(self.summary), "flops": vars(self.summary.flops), "computed": vars(self.summary.computed)}
        return {"search": self.plan.about.get("search"), **counted, "time_ratio": self.time_ratio, **values}


@dataclass(frozen=True)
class Evaluation:
    """Scores of plans, and how they were measured.

    `raw` are the untouched pipeline's images, float32 (n, C, H, W) in [0, 1], in which each frame of a video is an image.
    `raw_seconds` is the median time of one seed. `setting` holds the inputs, seeds, device, dtype and versions.
    """

    raw: Tensor
    raw_seconds: float
    scores: tuple[Score, ...]
    setting: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The evaluation without its images, for JSON."""
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
    """Generate `inputs` once for each seed, untouched and with every plan in turn, and compare images, FLOPs and time.

    All plans are checked before anything is generated. To warm up, the first seed is generated untouched and with the first
    plan, without timing. All images stay in memory; the command `arrowhead evaluate` stores its work and can be resumed. The
    function needs torchmetrics (`pip install arrowhead[cli]`).

    Args:
        pipe: a diffusers pipeline of a supported family.
        plans: plans by name; none may be named `raw`.
        inputs: keyword arguments of the pipeline's call, without a generator.
        seeds: seeds of the initial noise, whole numbers of at least 0.
        metrics: functions of images and raw images, both (n, C, H, W) in [0, 1], that give a number; by default PSNR and SSIM.
        progress: show a tqdm bar.

    Returns:
        An `Evaluation`: the raw images, and for each plan its images, metrics, summary and time ratio.

    Raises:
        InputsInvalid: an argument has another type, there is no seed or no plan, or the inputs have a generator.
        PlanMismatch: a plan was made for another model, scheduler, number of steps or tokens.

    Example:
        >>> found = ah.evaluate(pipe, {"half": plan}, dict(class_labels=[1, 7]), seeds=[0, 1, 2])
        >>> found.scores[0].metrics["psnr"], found.scores[0].time_ratio
    """
    _check_types(plans, inputs, seeds, metrics)
    if not seeds or not plans or "raw" in plans or "generator" in inputs:
        raise InputsInvalid(
            f"got {len(seeds)} seeds, plans {sorted(plans)} and inputs {sorted(inputs)}; wanted at least one seed, one plan, "
            "none of them named raw, and no generator among the inputs"
        )
    require_short_names(plans)
    for each in plans.values():
        require_fit(pipe, each, inputs, seeds[0])
    settings: dict[str, Plan | None] = {"raw": None, **plans}
    images: dict[str, list[Tensor]] = {name: [] for name in settings}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    summaries: dict[str, Summary] = {}
    for plan in (None, next(iter(plans.values()))):
        with nullcontext() if plan is None else applied(pipe, plan, changes="texts"):
            generate(pipe, inputs, seeds[0])
    for seed in tqdm(seeds, desc="evaluate", unit="seed", disable=not progress):
        for name, plan in settings.items():
            with nullcontext() if plan is None else applied(pipe, plan, changes="texts") as run:
                started = time.perf_counter()
                images[name].append(generate(pipe, inputs, seed))
                seconds[name].append(time.perf_counter() - started)
                if run is not None:
                    summaries[name] = run.summary()
    raw = torch.cat(images["raw"])
    scores = []
    for name, plan in plans.items():
        ratios = [mine / raw_seconds for mine, raw_seconds in zip(seconds[name], seconds["raw"], strict=True)]
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


def require_short_names(plans: Mapping[str, Plan]) -> None:
    """Check that names of plans can be names of folders and files, with some letters added.

    Raises:
        InputsInvalid: a name is longer.
    """
    for name in plans:
        if (size := len(name.encode("utf-8", "surrogatepass"))) > MAX_NAME:
            raise InputsInvalid(
                f"got a plan's name of {size} bytes, {name[:30]!r} …, wanted {MAX_NAME} at most; rename it, or its file"
            )


class _TransformerReached(Exception):
    """The transformer is about to run, so the call can be stopped."""


def require_fit(pipe: "DiffusionPipeline", plan: Plan, inputs: Mapping[str, Any], seed: int) -> None:
    """Check a plan against a call of the pipeline, which is stopped before the transformer runs.

    Raises:
        PlanMismatch: the plan was made for another model, scheduler, number of steps or tokens.
    """

    def stop(*_: Any) -> None:
        raise _TransformerReached

    with applied(pipe, plan, changes="texts"), force_eager(), suppress(_TransformerReached), ExitStack() as hooks:
        for transformer in transformers_of(pipe):  # a pipeline may begin with either of two
            hook = transformer.register_forward_pre_hook(stop)  # runs after the plan's hook, which checks steps and tokens
            hooks.callback(hook.remove)
        generate(pipe, inputs, seed)


def generate(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], seed: int) -> Tensor:
    """Call the pipeline once and return its images or video frames, float32 (n, C, H, W) in [0, 1] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    made = pipe(**{**inputs, "generator": generator, "output_type": "pt"})
    images: Tensor = made.images if hasattr(made, "images") else made.frames.flatten(0, 1)  # of (B, F, C, H, W)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return images.float().cpu()


__all__ = ["METRICS", "Evaluation", "Score", "evaluate", "generate"]
