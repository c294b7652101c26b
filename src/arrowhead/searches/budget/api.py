"""The search under a budget for the whole generation: calibrate once, solve, check."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.sharding import part_of, share_of
from arrowhead.errors import InputsInvalid, NotIntercepted, PlanMismatch
from arrowhead.models.custom import Adapter, call_inputs, with_adapter
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import PRESETS, Budget, Extent
from arrowhead.searches.budget.sensitivity.recording import Recording, record, sites_of
from arrowhead.searches.budget.sensitivity.site_history import held_elements
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.head_groups import group_size
from arrowhead.searches.budget.solver.solution import solve, sweep, with_provenance
from arrowhead.searches.budget.validation import corrected, fast_enough, final_latents, within_error
from arrowhead.searches.settings import require_a

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


def calibrate(
    pipe: "DiffusionPipeline | nn.Module",
    inputs: Mapping[str, Any] | Callable[[], Any],
    *,
    adapter: Adapter | None = None,
    extent: Extent | None = None,
    shard: Sequence[str] | None = None,
    progress: bool = True,
) -> Table:
    """Run the pipeline once with `inputs`, and note what skipping anything would do; the table serves any budget.

    Args:
        pipe: a diffusers pipeline of a supported family, or a module of one's own. It is left as it was.
        inputs: the keyword arguments of the pipeline's call. A `generator` among them is left as it was found. For a module, a
            callable that generates once, as `search` has it.
        adapter: of a module.
        extent: how far to look: radii, ages, random vectors.
        shard: as `search` has it; all processes end with the table of all prompts.
        progress: show a tqdm bar.

    Raises what `arrowhead.search` raises.
    """
    extent = _extent(extent)
    pipe = with_adapter(pipe, adapter)
    inputs = call_inputs(pipe, inputs)
    inputs = inputs if shard is None else part_of(pipe, inputs, shard)
    return _recorded(pipe, inputs, extent, progress).table


def calibration_bytes(
    pipe: "DiffusionPipeline | nn.Module",
    inputs: Mapping[str, Any] | Callable[[], Any],
    *,
    adapter: Adapter | None = None,
    extent: Extent | None = None,
) -> int:
    """What a calibration holds at most from one step to the next, beside the pipeline itself and what one pass needs.

    A pass with gradients keeps its activations for the way back; with `checkpoint` one block's and each block's input, without
    gradients none. The pipeline runs up to the first call of its transformer. Raises what `arrowhead.search` raises.
    """
    extent = _extent(extent)
    pipe = with_adapter(pipe, adapter)
    model = sites_of(pipe, extent)
    calibration = CalibrationRun(model, call_inputs(pipe, inputs))
    with closing(calibration.steps()) as steps:
        if next(steps, None) is None:
            raise NotIntercepted("the pipeline never called its transformer; wanted at least one denoising step")
        computes = getattr(
            model.transformer, "dtype", next(model.transformer.parameters()).dtype
        )  # weights may be kept in less
        return held_elements(extent, model.sites, calibration.tokens) * calibration.rows * computes.itemsize


def _extent(extent: Extent | None) -> Extent:
    if extent is not None:
        require_a(Extent, extent, "extent")
    return extent or Extent()


def budgeted(
    pipe: "DiffusionPipeline",
    inputs: Mapping[str, Any],
    budget: Budget,
    *,
    extent: Extent | None = None,
    table: Table | None = None,
    progress: bool = True,
) -> Plan:
    """Calibrate, solve, and check by generating once more. Raises what `arrowhead.search` raises."""
    name, _ = budget.asked
    if name == "speedup" and not share_of(inputs).alone:
        raise InputsInvalid("got a budget of speedup with shard, wanted FLOPs or an error: seconds are each process's own")
    for site in find(pipe).sites:
        group_size(budget.granularity or "head", site)  # now, rather than after minutes
    kinds = extent.kinds if extent is not None and table is None else None
    if name in ("attention_flops", "module_flops") and kinds is not None and "self_attention" not in kinds:
        raise InputsInvalid(
            f"got a budget of {name} with kinds={kinds!r}, wanted self_attention among them; or transformer_flops"
        )
    if table is None:
        recording = _recorded(pipe, inputs, extent or Extent(), progress)
    else:
        _require(table, pipe, inputs)
        recording = Recording(table, final_latents(pipe, inputs), 0, 0.0)
    about = {"calibration_passes": recording.passes, "calibration_attention_flops_by_raw": round(recording.cost, 3)}
    if name == "speedup":
        return with_provenance(fast_enough(pipe, inputs, budget, recording), **about)
    if name != "error":
        plan, tried = corrected(pipe, inputs, budget, recording, solve)
        return with_provenance(plan, generations=tried, **about)
    return with_provenance(within_error(pipe, inputs, budget, recording), **about)


def _require(table: Table, pipe: "DiffusionPipeline", inputs: Mapping[str, Any]) -> None:
    """Check that a table was made on such a pipeline, with as many branches.

    Raises:
        PlanMismatch: it was not; the message names every difference.
    """
    sites = table.target.sites
    model = find(pipe, {site.kind for site in sites}).only(lambda site: site.path in {own.path for own in sites})
    found = table.target.differences(target_of(model))
    branches = model.branches(model.call_arguments((), inputs))
    if branches != table.branches:
        found.append(f"branches: table {table.branches}, inputs {branches}")
    if found:
        raise PlanMismatch("table does not fit this pipeline and inputs; calibrate again on them. " + "; ".join(found))


def _recorded(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], extent: Extent, progress: bool) -> Recording:
    """Drain a calibration behind a bar over the steps."""
    steps = record(pipe, inputs, extent)
    with torch.inference_mode(False), closing(steps), tqdm(desc="calibrate", unit="step", disable=not progress) as bar:
        while True:
            try:
                step, bar.total = next(steps)
            except StopIteration as end:
                return end.value
            bar.update(step + 1 - bar.n)


__all__ = ["PRESETS", "Budget", "budgeted", "calibrate", "calibration_bytes", "solve", "sweep"]
