"""`search` finds a plan for a pipeline, by one of four strategies: `greedy`, `headwise`, `stack` and `budget`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from tqdm.auto import tqdm

from arrowhead.calibration.driver import Driver, driver_of
from arrowhead.calibration.provenance import provenance
from arrowhead.errors import InputsInvalid, NothingCompressed
from arrowhead.metrics.error import LossForm
from arrowhead.models.custom import Adapter
from arrowhead.plans.cells import paper_name
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.api import budgeted, calibrate, calibration_bytes
from arrowhead.searches.budget.config import PRESETS, Budget, Extent
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.solution import solve as solve_table
from arrowhead.searches.budget.solver.solution import with_provenance
from arrowhead.searches.greedy import Greedy, Trial, greedy_search
from arrowhead.searches.headwise import Choice, Headwise, headwise_search
from arrowhead.searches.stack.api import planned, profile, solve_profile, why_sites
from arrowhead.searches.stack.held import profile_bytes
from arrowhead.searches.stack.levels import two_levels
from arrowhead.searches.stack.profile import Profile

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

THRESHOLDS = {"D1": 0.025, "D2": 0.05, "D3": 0.075, "D4": 0.1, "D5": 0.125, "D6": 0.15}


def search(
    pipe: "DiffusionPipeline | nn.Module",
    inputs: Mapping[str, Any] | Callable[[], Any],
    *,
    adapter: Adapter | None = None,
    strategy: Literal["greedy", "headwise", "budget", "stack"] | Greedy | Headwise | None = None,
    budget: Budget | Literal["light", "balanced", "strong"] | None = None,
    threshold: float | str | None = None,
    loss: LossForm = "paper",
    extent: Extent | None = None,
    table: Table | None = None,
    shard: Sequence[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Find a plan on one calibration run of the pipeline.

    Without a `strategy` it is `greedy` where a `threshold` is given. Else it is `stack`, unless only `budget` can do what is
    asked for: with an `extent`, a `table` or a `shard`, for a custom model, for a model that is no plain chain of blocks, and
    with a `Budget` that says more than the transformer's FLOPs, a speedup or an error, such as a granularity or a bound of
    cache bytes. The plan's `about["search"]` then says why, under `why_sites`.

    Args:
        pipe: a diffusers pipeline of a supported family, or a custom model: a `torch.nn.Module` with its `adapter`. However the
            search ends, the pipeline is as before, but for the scheduler's timesteps, which every call sets. Compiled parts run
            eagerly in the search, which finds the same plan as without compiling.
        inputs: the keyword arguments of the pipeline's call: prompts or labels, steps, guidance. A `generator` among them
            has the same state afterwards. For a custom model: a callable without arguments that generates once, by any loop
            over the model, with the same result at every call, and returns the final latents (B, C, …), which only budgets
            read. For a budget the callable is called once more for every step, with the model's outputs as they were: what does
            not depend on the model, such as encoding prompts, is better done before.
        adapter: describes a custom model.
        strategy: `greedy` is DiTFastAttn's Algorithm 1, `headwise` DiTFastAttnV2's choice for single heads; a `Greedy` or a
            `Headwise` holds the candidates of these. `stack` and `budget` keep the whole generation to a budget, with the least
            error. `stack` skips all blocks of a step at once: it needs one generation without gradients, and up to three to
            check plans. `budget` decides for single sites or heads, and measures them with gradients.
        budget: for `stack` and `budget`: the cost or the error that is allowed, or the name of an error: `light` 0.03,
            `balanced` 0.07, `strong` 0.15. None: `balanced`.
        threshold: for `greedy`, the error allowed at the last layer of a step, or one of D1 … D6 (0.025 … 0.15); for
            `headwise`, the sum of a site's errors in a step (the paper has 0.2 … 1). None: 0.1 or 0.6.
        loss: for `greedy`, the error's form, see `metrics.error.relative_error`.
        extent: for `budget`: what the calibration measures, and with how much memory. With `stack`: that heads may be arrows in
            the steps that are computed, and by which radii; a second generation measures these, with gradients or without.
        table: for `budget`: the table that `calibrate` gave for these inputs, in place of another calibration.
        shard: names of the inputs that have one entry for each prompt, the list of generators among them. These are split among
            the processes of `torch.distributed`, which are all given the same arguments. Each process runs the pipeline on its
            prompts, and all end with the same plan: that of all prompts in one process, but for rounding. None: no splitting.
        progress: whether to show a tqdm bar.

    Raises:
        UnsupportedPipeline: no attention sites are known for this pipeline.
        InputsInvalid: the pipeline's call does not take the inputs, or a setting is out of range.
        AlreadyApplied: the pipeline carries a plan.
        AlreadyGenerating: the pipeline is called from elsewhere while the search runs.
        NotIntercepted: attention was computed where it could not be seen.

    Warns:
        NothingCompressed: an error is allowed, but every cell stayed full.

    >>> plan = arrowhead.search(pipe, {"prompt": ["a cat"], "num_inference_steps": 50}, budget="light")
    """
    named = strategy if strategy is not None else ("greedy" if threshold is not None and budget is None else "budget")
    _check_arguments(named, budget, threshold, loss, extent, table)
    driver = driver_of(pipe, inputs, adapter, shard)
    if named in ("budget", "stack"):
        wanted = Budget(error=PRESETS[budget or "balanced"]) if budget is None or isinstance(budget, str) else budget
        why = why_sites(driver, wanted, extent, table) if strategy is None else None
        if named == "stack" and extent is not None:
            plan = two_levels(driver, wanted, extent, progress)
        elif named == "stack" or (strategy is None and why is None):
            plan = planned(driver, wanted, progress)
        else:
            plan = budgeted(driver, wanted, extent=extent, table=table, progress=progress)
            plan = plan if why is None else with_provenance(plan, why_sites=why)
        (asked, value), may_lose = wanted.asked, wanted.error is not None or wanted.asked[1] < 1
    else:
        settings = Greedy() if named == "greedy" else Headwise() if isinstance(named, str) else named
        delta = _threshold(threshold if threshold is not None else 0.1 if isinstance(settings, Greedy) else 0.6)
        plan = _thresholded(driver, settings, delta, loss, progress)
        asked, value, may_lose = "threshold", delta, delta > 0
    plan = driver.share.agreed(plan)
    if may_lose and set(plan.count()) == {"full"}:
        warnings.warn(
            f"nothing could be left out within {asked} = {value}, so the plan is full attention everywhere; allow more",
            NothingCompressed,
            stacklevel=2,
        )
    return plan


def solve(learnt: Table | Profile, budget: Budget) -> Plan:
    """Find the plan for a budget from what a calibration learnt. The model is not run.

    Args:
        learnt: a `Table`, from `arrowhead.calibrate`, or a `Profile`, from `arrowhead.profile`; or one that was loaded.
        budget: of FLOPs; with a profile, of the transformer's FLOPs, a speedup or an error.

    Raises:
        InputsInvalid: these are no table or profile and budget, nothing is as cheap, or the budget is one that only the
            pipeline can show.

    Examples:
        >>> plan = ah.solve(table, ah.Budget(module_flops=0.4))
        >>> plan = ah.solve(profile, ah.Budget(transformer_flops=0.4))
    """
    return solve_profile(learnt, budget) if isinstance(learnt, Profile) else solve_table(learnt, budget)


def sweep(learnt: Table | Profile, budgets: Sequence[Budget]) -> list[Plan]:
    """Find a plan for each budget from one table or profile. Raises what `solve` raises.

    Examples:
        >>> plans = ah.sweep(table, [ah.Budget(module_flops=left) for left in (0.6, 0.4, 0.2)])
    """
    if not isinstance(budgets, Sequence):
        raise InputsInvalid(f"got budgets of type {type(budgets).__name__}, wanted a list of them; solve takes a single one")
    return [solve(learnt, budget) for budget in budgets]


def _check_arguments(
    named: str | Greedy | Headwise,
    budget: Budget | str | None,
    threshold: float | str | None,
    loss: str,
    extent: Extent | None,
    table: Table | None,
) -> None:
    known = isinstance(named, str) and named in ("greedy", "headwise", "budget", "stack")
    if not isinstance(named, Greedy | Headwise) and not known:
        raise InputsInvalid(f"got strategy={named!r}, wanted 'greedy', 'headwise', a Greedy or a Headwise, 'budget' or 'stack'")
    if not isinstance(loss, str) or loss not in ("paper", "signed"):
        raise InputsInvalid(f"got loss={loss!r}, wanted 'paper' or 'signed'")
    if not (isinstance(named, Greedy) or named == "greedy") and (loss != "paper" or isinstance(threshold, str)):
        raise InputsInvalid(
            f"got loss={loss!r} and threshold={threshold!r} with strategy={named!r}; the signed loss and D1 … D6 are "
            "greedy's; leave out the loss, and give the threshold as a number, such as 0.6"
        )
    budgets = named in ("budget", "stack")
    if (budget is not None and not budgets) or (threshold is not None and budgets):
        raise InputsInvalid(
            f"got budget={budget!r} and threshold={threshold!r} with strategy={named!r}; wanted a threshold for 'greedy' and "
            "'headwise', a budget for 'budget' and 'stack'; leave the other one out"
        )
    if not isinstance(extent, Extent | None) or not isinstance(table, Table | None):
        raise InputsInvalid(f"got extent={extent!r} and a {type(table).__name__} for a table, wanted an Extent, or a Table")
    given = [name for name, value in (("extent", extent), ("table", table)) if value is not None]
    if len(given) > (named == "budget" or (named == "stack" and table is None)):
        raise InputsInvalid(
            f"got {' and '.join(given)} with strategy={named!r}; wanted one of them at most, with 'budget', or an extent with "
            "'stack'"
        )
    if not isinstance(budget, Budget | None) and not (isinstance(budget, str) and budget in PRESETS):
        raise InputsInvalid(f"got budget={budget!r}, wanted a Budget, or one of {', '.join(PRESETS)}")


def _thresholded(driver: Driver, chosen: Greedy | Headwise, delta: float, loss: LossForm, progress: bool) -> Plan:
    """The plan that a paper's search finds, behind a bar over the steps."""
    with tqdm(desc="search", unit="step", disable=not progress) as bar:

        def show(trial: Trial | Choice) -> None:
            bar.total = trial.steps
            bar.update(trial.step - bar.n)
            bar.set_postfix(error=f"{trial.error:.4f}", refresh=False)

        if isinstance(chosen, Greedy):
            found = greedy_search(driver, threshold=delta, loss=loss, settings=chosen, on_trial=show)
            candidates = [paper_name(cell) for cell in chosen.candidates(found.tokens, found.branches.guided)]
            settings: dict[str, Any] = {"strategy": "greedy", "candidates": candidates, **vars(chosen)}
            settings |= {"threshold": delta, "loss": loss}
        else:
            found = headwise_search(driver, threshold=delta, settings=chosen, on_choice=show)
            settings = {"strategy": "headwise", **vars(chosen), "threshold": delta}
        bar.update((bar.total or 0) - bar.n)
    settings |= {"transformer_passes": found.passes, "attention_flops_by_raw": round(found.cost, 3)}
    about, branches = provenance(driver, settings), found.branches
    return Plan(found.cells, found.target, found.tokens, branches.guided, about, branches.calls, found.switch)


def _threshold(value: float | str) -> float:
    number = -1.0
    if isinstance(value, str | Real) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # words, and more digits than a float has
            number = float(THRESHOLDS.get(value, value) if isinstance(value, str) else value)
    if not 0 <= number < float("inf"):
        raise InputsInvalid(f"got threshold={value!r}, wanted a number of 0 or more, or one of {', '.join(THRESHOLDS)}")
    return number


__all__ = [
    "PRESETS",
    "THRESHOLDS",
    "Budget",
    "Choice",
    "Extent",
    "Greedy",
    "Headwise",
    "Table",
    "Trial",
    "calibrate",
    "calibration_bytes",
    "greedy_search",
    "headwise_search",
    "profile",
    "profile_bytes",
    "search",
    "solve",
    "sweep",
]
