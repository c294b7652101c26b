"""Batches of images, made once and kept: untouched and with each plan in turn, each timed beside the other."""

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
from arrowhead.evaluation.memory import Peak
from arrowhead.evaluation.request import Request
from arrowhead.evaluation.work_folder import WorkFolder
from arrowhead.models.model import transformers_of
from arrowhead.plans.plan import Plan

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def missing(settings: Sequence[WorkFolder], batches: Sequence[range]) -> list[range]:
    """Batches that some setting lacks."""
    return [images for images in batches if not all(kept.record_path(images).exists() for kept in settings)]


def warm_up(pipe: "DiffusionPipeline", asked: Request, plans: Sequence[Plan], batch: range) -> Tensor:
    """One batch, untimed and not kept, untouched and with the first plan: raw pixels (n · frames, 3, H, W) in bytes.

    So what is wrong with the images is known before many are made.
    """
    pixels, _, _ = _generate(pipe, asked, batch, None)
    for plan in plans[:1]:
        _generate(pipe, asked, batch, plan)
    return pixels.flatten(0, 1).permute(0, 3, 1, 2)


def make(
    pipe: "DiffusionPipeline", asked: Request, settings: Sequence[WorkFolder], batches: Sequence[range], *, progress: bool
) -> None:
    """Make and keep what is not there; all settings of a batch one after the other."""
    transformer, *_ = transformers_of(pipe)
    session = f"{os.getpid()}-{time.time_ns()}"
    for images in tqdm(batches, desc="generate", unit="batch", disable=not progress):
        for kept in settings:
            if kept.record_path(images).exists():
                continue
            peak = Peak(transformer.device)
            pixels, summary, seconds = _generate(pipe, asked, images, kept.plan)
            record = {
                "seconds": seconds,
                "session": session,  # only times of one session stand side by side
                "peak_memory_bytes": peak.bytes(),
                "threads": torch.get_num_threads(),
                "summary": summary and counted(summary),
            }
            kept.keep(images, pixels, record)


def counted(summary: Summary) -> dict[str, Any]:
    """A summary, for JSON."""
    return {**vars(summary), "flops": vars(summary.flops), "notes": list(summary.notes)}


def _generate(
    pipe: "DiffusionPipeline", asked: Request, images: range, plan: Plan | None
) -> tuple[Tensor, Summary | None, float]:
    """Pixels (n, frames, H, W, 3) in bytes, what was counted, and seconds of the call.

    Raises:
        InputsInvalid: the pipeline gave another number of images, or values that are not finite.
    """
    call = asked.call(images)
    with nullcontext() if plan is None else applied(pipe, plan) as run:
        started = time.perf_counter()
        made = pipe(**{**call, "output_type": "pt"})
        values: Tensor = made.images if hasattr(made, "images") else made.frames
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
        seconds = time.perf_counter() - started
    values = values if values.ndim == 5 else values.unsqueeze(1)  # (n, frames, C, H, W)
    if values.ndim != 5 or len(values) != len(images) or values.shape[2] != 3:
        raise InputsInvalid(
            f"got {tuple(values.shape)} of a call for {len(images)} images, wanted as many, in RGB; leave out what asks "
            "for more"
        )
    if not values.isfinite().all():
        raise InputsInvalid(
            f"got images {images.start} to {images.stop - 1} with values that are not finite"
            f"{'' if plan is None else ', with a plan'}; wanted numbers; try dtype float32 or bfloat16"
        )
    pixels = (values.float().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).cpu()
    return pixels.contiguous(), None if run is None else run.summary(), seconds
