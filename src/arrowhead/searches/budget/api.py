"""The search under a budget for the whole generation: calibrate once, solve, and try candidate plans in real generations."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arrowhead.calibration.driver import Driver, driver_of
from arrowhead.calibration.run import CalibrationRun
from arrowhead.errors import InputsInvalid, PlanMismatch
from arrowhead.models.custom import Adapter
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.layout import ALL_KINDS
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import first_of
from arrowhead.searches.budget.config import PRESETS, Budget, Extent
from arrowhead.searches.budget.sensitivity.recording import Recording, record, sites_of
from arrowhead.searches.budget.sensitivity.footprint import held_bytes
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.head_groups import group_size
from arrowhead.searches.budget.solver.solution import solve, with_provenance
from arrowhead.searches.budget.validation import corrected, fast_enough, within_error
from arrowhead.searches.progress import bar_of_steps
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
    """Run the pipeline once with `inputs`, and measure how much each change of a site would change the final picture.

    The table that this gives serves any budget.

    Args:
        pipe: a diffusers pipeline of a supported family, or a custom model, as `search` takes it; left as it was.
        inputs: the keyword arguments of the pipeline's call. A `generator` among them has the same state afterwards. For a
            custom model, a callable that generates once, as `search` takes it.
        adapter: describes a custom model.
        extent: what is measured: radii, ages, random vectors. None: `Extent()`.
        shard: as `search` takes it; all processes end with the table of all prompts.
        progress: whether to show a tqdm bar.

    Raises what `arrowhead.search` raises.

    >>> table = arrowhead.calibrate(pipe, inputs)
    >>> plan = arrowhead.solve(table, arrowhead.Budget(module_flops=0.4))
    """
    return _recorded(driver_of(pipe, inputs, adapter, shard), _extent(extent), progress).table


def calibration_bytes(
    pipe: "DiffusionPipeline | nn.Module",
    inputs: Mapping[str, Any] | Callable[[], Any],
    *,
    adapter: Adapter | None = None,
    extent: Extent | None = None,
) -> int:
    """The bytes that a calibration holds at most on the model's device, besides the pipeline and what one pass needs.

    These are what sites gave in the last steps, the gradients at all sites, and, with `Extent(checkpoint=True)`, each block's
    input. A pass with gradients needs its activations, too: those of one block where blocks run again, and else of all. The
    pipeline runs up to its first call of the transformer. Arguments are those of `calibrate`.

    Raises what `arrowhead.search` raises.

    >>> arrowhead.calibration_bytes(pipe, inputs, extent=arrowhead.Extent(ages=4)) / 2**30
    """
    extent, driver = _extent(extent), driver_of(pipe, inputs, adapter)
    model = sites_of(driver, extent)
    calibration = CalibrationRun(driver, model)
    calibration.run(lambda _: None, first_only=True)
    # weights may be kept in a smaller dtype than the one that computes
    weight = next(model.transformer.parameters())
    itemsize = getattr(model.transformer, "dtype", weight.dtype).itemsize
    blocks = [site for site in find(driver.pipe, ALL_KINDS).sites if site.kind == "block"]
    return held_bytes(extent, model.sites, blocks, calibration.tokens, calibration.rows, itemsize, weight.device)


def _extent(extent: Extent | None) -> Extent:
    if extent is not None:
        require_a(Extent, extent, "extent")
    return extent or Extent()


def budgeted(
    driver: Driver,
    budget: Budget,
    *,
    extent: Extent | None = None,
    table: Table | None = None,
    progress: bool = True,
) -> Plan:
    """Find a plan for a budget: calibrate, where there is no `table`; solve; and try candidates in real generations.

    Raises what `arrowhead.search` raises.
    """
    name, _ = budget.asked
    if name == "speedup" and not driver.share.alone:
        raise InputsInvalid("got a budget of speedup with shard, wanted FLOPs or an error: seconds are each process's own")
    for site in find(driver.pipe).sites:
        group_size(budget.granularity or "head", site)  # now, rather than after minutes
    kinds = extent.kinds if extent is not None and table is None else None
    if name in ("attention_flops", "module_flops") and kinds is not None and "self_attention" not in kinds:
        raise InputsInvalid(
            f"got a budget of {name} with kinds={kinds!r}, wanted self_attention among them; or transformer_flops"
        )
    if table is None:
        recording = _recorded(driver, extent or Extent(), progress)
    else:
        _require_fit(table, driver)
        recording = Recording(table, driver.final_latents(), 0, 0.0)
    about = {"calibration_passes": recording.passes, "calibration_attention_flops_by_raw": round(recording.cost, 3)}
    if name == "speedup":
        return with_provenance(fast_enough(driver, budget, recording), **about)
    if name != "error":
        plan, generations = corrected(driver, budget, recording, solve)
        return with_provenance(plan, generations=generations, **about)
    return with_provenance(within_error(driver, budget, recording), **about)


def _require_fit(table: Table, driver: Driver) -> None:
    """Check that a table was made on such a pipeline, with as many branches.

    Raises:
        PlanMismatch: it was not; the message names the first difference, and counts the others.
    """
    sites = table.target.sites
    model = find(driver.pipe, {site.kind for site in sites}).filtered(lambda site: site.path in {own.path for own in sites})
    found = table.target.differences(target_of(model))
    branches = model.branches(driver.call_arguments(model))
    if branches != table.branches:
        found.append(f"branches: table {table.branches}, inputs {branches}")
    if found:
        raise PlanMismatch(f"table does not fit this pipeline and inputs; calibrate again on them. {first_of(found)}")


def _recorded(driver: Driver, extent: Extent, progress: bool) -> Recording:
    """Calibrate behind a bar over the steps."""
    with torch.inference_mode(False), bar_of_steps("calibrate", shown=progress) as ended:
        return record(driver, extent, ended)


__all__ = ["PRESETS", "Budget", "budgeted", "calibrate", "calibration_bytes", "solve"]
