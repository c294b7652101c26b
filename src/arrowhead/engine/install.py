"""Puts a plan on a pipeline or a custom model, and takes it off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from arrowhead.engine.cache_encoding import CacheEncoding
from arrowhead.engine.circumstances import Adaptation
from arrowhead.engine.custom_run import CustomRun
from arrowhead.engine.run import Run, carries_plan, run_on
from arrowhead.errors import AlreadyApplied, ArrowheadError, InputsInvalid
from arrowhead.models.conflicts import require_weights
from arrowhead.models.custom import Adapter, CustomModel, with_adapter
from arrowhead.models.find import find
from arrowhead.plans.memory import CacheDtype
from arrowhead.plans.plan import Plan

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

SPEEDUP = "_arrowhead_speedup"
"""The attribute of a pipeline that holds what `remove` closes in place of the plan: see `searches/speedup.py`."""


def apply(
    pipe: "DiffusionPipeline | nn.Module",
    plan: Plan,
    adapter: Adapter | None = None,
    *,
    kernel: str = "auto",
    cache_dtype: CacheDtype = "native",
    cache_device: str | torch.device | None = None,
    changes: Adaptation = "adapt",
) -> Run:
    """Put a plan on a pipeline, or on a custom model. Generations are compressed until `remove`.

    >>> run = ah.apply(pipe, ah.Plan.load("plan.json"))
    >>> image = pipe("a cat").images[0]
    >>> print(run.summary())
    >>> ah.remove(pipe)

    Nothing outside of the pipeline changes: other pipelines of its class, and their graphs of torch.compile, stay as they are.
    Until `remove`, processors see the global names of their modules as they are now. A shallow copy (`copy.copy(pipe)`, one for
    each request, say) has the plan, too, and may have a scheduler of its own. As copies share the pipeline's modules, one of
    them generates at a time.

    Args:
        pipe: a pipeline of diffusers, or a `torch.nn.Module` with an `adapter`.
        plan: a search's result, or `Plan.load(path)`.
        adapter: describes the module; None for a pipeline.
        kernel: the kernel that computes bands and boxes; `auto` picks one for each call.
        cache_dtype: how outputs and residuals are kept for later steps: `native`, the dtype in which they were computed, or
            `int8` or `fp8`, with one scale for each token and head.
        cache_device: the device on which they are kept, such as `cpu`; None: the one on which they were computed.
        changes: what to do where a generation is not what the plan was made for, by its steps, strength, noise schedule, size
            or scheduler, or where its guidance ends on the way. "adapt" carries the plan over, and warns once for each new
            circumstance (`PlanAdapted`); "refuse" raises PlanMismatch. "texts" carries it over to a prompt and a negative
            prompt of two lengths in two calls, and refuses all else. Otherwise a text's length is no part of a plan.

    Returns:
        The run: its `summary()` says what the latest generation computed, and `step(i)` tells a custom loop's steps.

    Raises:
        InputsInvalid: `plan` is no plan, or there is no such dtype, device or way with changes.
        UnsupportedPipeline: no attention sites are known for this pipeline, or its transformer has no weights.
        PlanMismatch: the plan was made for something else; the message names the first difference, and counts the others.
        AlreadyApplied: the pipeline carries a plan, or has a speedup.
        NotIntercepted: a module's attention processor cannot be wrapped.
        KernelUnavailable: there is no such kernel here.
    """
    if SPEEDUP in getattr(pipe, "__dict__", {}):
        raise has_speedup()
    return put_on(pipe, plan, adapter, kernel, cache_dtype, cache_device, changes)


def put_on(
    pipe: "DiffusionPipeline | nn.Module",
    plan: Plan,
    adapter: Adapter | None = None,
    kernel: str = "auto",
    cache_dtype: CacheDtype = "native",
    cache_device: str | torch.device | None = None,
    changes: Adaptation = "adapt",
) -> Run:
    """As `apply` does, also where the pipeline has a speedup, whose plan it is."""
    encoding = CacheEncoding.of(cache_dtype, cache_device)
    if run_on(pipe):
        raise carries_plan()
    if not isinstance(plan, Plan):
        raise InputsInvalid(f"got a {type(plan).__name__} for a plan, wanted what search gives, or Plan.load(path)")
    pipe, sites = with_adapter(pipe, adapter), plan.target.sites
    model = find(pipe, {site.kind for site in sites}).without_overlap(sites)
    require_weights(model.transformers)
    return (CustomRun if isinstance(pipe, CustomModel) else Run)(model, plan, kernel, encoding, changes)


def has_speedup() -> AlreadyApplied:
    """The error of a pipeline that has a speedup."""
    return AlreadyApplied("this pipeline has a speedup already; call arrowhead.remove(pipe) first")


def remove(pipe: "DiffusionPipeline | nn.Module") -> None:
    """Take the plan off a pipeline, or off a custom model, which is then as it was before `apply`.

    What was set on attention processors since, such as an attention backend, stays. The pipeline and its shallow copies have
    one plan: it goes off all of them. Where Ctrl-C came into `apply` or `remove`, `remove` takes off what is left.

    Raises:
        ArrowheadError: there is no plan on it.
    """
    sped = getattr(pipe, "__dict__", {}).get(SPEEDUP)
    if sped is not None:
        sped.close()
        return
    run = run_on(pipe)
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
    changes: Adaptation = "adapt",
) -> Iterator[Run]:
    """Within the block a plan is on a pipeline, or on a custom model.

    >>> with ah.applied(pipe, plan):
    ...     image = pipe("a cat").images[0]

    The arguments and errors are those of `apply`.
    """
    run = apply(pipe, plan, adapter, kernel=kernel, cache_dtype=cache_dtype, cache_device=cache_device, changes=changes)
    try:
        yield run
    finally:
        if run.on:
            run.close()
