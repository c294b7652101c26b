"""Generates batches of images, untouched and with each plan in turn, with their times, and stores them."""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from arrowhead.engine.install import applied
from arrowhead.engine.stats import Summary
from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.peak_memory import PeakMemory
from arrowhead.evaluation.request import Request
from arrowhead.evaluation.work_folder import SettingFolder
from arrowhead.models.model import transformers_of
from arrowhead.plans.plan import Plan

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def missing_batches(settings: Sequence[SettingFolder], batches: Sequence[range]) -> list[range]:
    """The batches that at least one setting has not stored yet."""
    return [images for images in batches if not all(setting.record_path(images).exists() for setting in settings)]


def warm_up(pipe: "DiffusionPipeline", request: Request, plans: Sequence[Plan], batch: range) -> Tensor:
    """Generate one batch untouched and with the first plan, without timing or storing it.

    Returns the untouched pixels, uint8 (n · frames, 3, H, W), so that every measure can be tried before many images are made.
    """
    pixels, _, _ = _generate(pipe, request, batch, None)
    for plan in plans[:1]:
        _generate(pipe, request, batch, plan)
    return pixels.flatten(0, 1).permute(0, 3, 1, 2)


def generate_missing(
    pipe: "DiffusionPipeline", request: Request, settings: Sequence[SettingFolder], batches: Sequence[range], *, progress: bool
) -> None:
    """Generate and store what is missing. All settings of a batch run one after the other, so that times can be compared."""
    transformer, *_ = transformers_of(pipe)
    session = f"{os.getpid()}-{time.time_ns()}"
    for images in tqdm(batches, desc="generate", unit="batch", disable=not progress):
        for setting in settings:
            if setting.record_path(images).exists():
                continue
            peak = PeakMemory(transformer.device)
            pixels, summary, seconds = _generate(pipe, request, images, setting.plan)
            record = {
                "seconds": seconds,
                "session": session,  # times are compared within one session only
                "peak_memory_bytes": peak.bytes(),
                "threads": torch.get_num_threads(),
                "summary": summary and summary_as_dict(summary),
            }
            setting.store(images, pixels, record)


def summary_as_dict(summary: Summary) -> dict[str, Any]:
    """A generation's summary, for JSON."""
    counted = {"flops": vars(summary.flops), "computed": vars(summary.computed)}
    return {**vars(summary), **counted, "notes": list(summary.notes)}


def _generate(
    pipe: "DiffusionPipeline", request: Request, images: range, plan: Plan | None
) -> tuple[Tensor, Summary | None, float]:
    """One call of the pipeline: pixels, uint8 (n, frames, H, W, 3), the summary if a plan was applied, and seconds.

    Raises:
        InputsInvalid: the pipeline gave another number of images, or values that are not finite.
    """
    call = request.call(images)
    with nullcontext() if plan is None else applied(pipe, plan, changes="texts") as run:
        started = time.perf_counter()
        made = pipe(**{**call, "output_type": "pt"})
        values: Tensor = made.images if hasattr(made, "images") else made.frames
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
        seconds = time.perf_counter() - started
    values = values if values.ndim == 5 else values.unsqueeze(1)  # (n, frames, C, H, W)
    if values.ndim != 5 or len(values) != len(images) or values.shape[2] != 3:
        raise InputsInvalid(
            f"got {tuple(values.shape)} of a call for {len(images)} images, wanted one RGB image for each; leave out "
            "inputs that ask for more images"
        )
    if not values.isfinite().all():
        raise InputsInvalid(
            f"got images {images.start} to {images.stop - 1} with values that are not finite"
            f"{'' if plan is None else ', with a plan'}; wanted numbers; try dtype float32 or bfloat16"
        )
    pixels = (values.float().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).cpu()
    return pixels.contiguous(), None if run is None else run.summary(), seconds
