"""A plan meets a pipeline: put on, and taken off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arrowhead.engine.cache_encoding import CacheEncoding
from arrowhead.engine.custom_run import CustomRun
from arrowhead.engine.run import Run
from arrowhead.errors import AlreadyApplied, ArrowheadError, InputsInvalid
from arrowhead.models.custom import Adapter, CustomModel, with_adapter
from arrowhead.models.find import find
from arrowhead.plans.memory import CacheDtype
from arrowhead.plans.plan import Plan
from arrowhead.upstream import uncompiled

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def apply(
    pipe: "DiffusionPipeline | nn.Module",
    plan: Plan,
    adapter: Adapter | None = None,
    *,
    kernel: str = "auto",
    cache_dtype: CacheDtype = "native",
    cache_device: str | torch.device | None = None,
) -> Run:
    """Put a plan on a pipeline, or on a module with its adapter. Generations that follow are compressed, until `remove`.

    `kernel` is `auto`, or the name of the kernel that has to run the bands. What later steps read is kept in `cache_dtype`:
    `native`, or `int8` or `fp8` with a scale for each token and head; on `cache_device`, such as `cpu`, or None: where it is
    computed.

    Raises:
        InputsInvalid: there is no such dtype, or device.
        UnsupportedPipeline: no attention sites are known for this pipeline.
        InputsInvalid: what is given is no plan.
        PlanMismatch: the plan was made for something else; the message names every difference.
        AlreadyApplied: the pipeline carries a plan.
        KernelUnavailable: there is no such kernel here.
    """
    encoding = CacheEncoding.of(cache_dtype, cache_device)
    if _run_on(pipe):
        raise AlreadyApplied("this pipeline carries a plan already; call arrowhead.remove(pipe) first")
    if not isinstance(plan, Plan):
        raise InputsInvalid(f"got a {type(plan).__name__} for a plan, wanted what search gives, or Plan.load(path)")
    pipe, sites = with_adapter(pipe, adapter), plan.target.sites
    model = find(pipe, {site.kind for site in sites}).without_overlap(sites)
    return (CustomRun if isinstance(pipe, CustomModel) else Run)(model, plan, kernel, encoding)


def remove(pipe: "DiffusionPipeline | nn.Module") -> None:
    """Take the plan off a pipeline, or a module of one's own, which is then exactly as before.

    Raises:
        ArrowheadError: it carries none.
    """
    run = _run_on(pipe)
    if run is None:
        raise ArrowheadError("this pipeline carries no plan; apply one with arrowhead.apply(pipe, plan)")
    run.close()


@contextmanager
def applied(
    pipe: "DiffusionPipeline | nn.Module",
    plan: Plan,
    adapter: Adapter | None = None,
    *,
    kernel: str = "auto",
    cache_dtype: CacheDtype = "native",
    cache_device: str | torch.device | None = None,
) -> Iterator[Run]:
    """`apply` for the length of a `with` block. Raises what `apply` raises."""
    run = apply(pipe, plan, adapter, kernel=kernel, cache_dtype=cache_dtype, cache_device=cache_device)
    try:
        yield run
    finally:
        if run.on:
            run.close()


def _run_on(pipe: Any) -> Run | None:
    if isinstance(pipe, nn.Module):
        return getattr(uncompiled(pipe).forward, "arrowhead_run", None)
    return getattr(type(pipe), "_arrowhead_run", None)
