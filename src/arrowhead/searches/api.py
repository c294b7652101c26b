"""Find a plan for a pipeline: `search` is the door, `greedy`, `headwise` and `budget` the strategies, `calibrate` their run."""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn
from tqdm.auto import tqdm

from arrowhead.calibration.provenance import provenance
from arrowhead.calibration.run import SearchResult
from arrowhead.calibration.sharding import part_of, share_of
from arrowhead.errors import InputsInvalid, NothingCompressed
from arrowhead.metrics.error import LossForm
from arrowhead.models.custom import Adapter, call_inputs, with_adapter
from arrowhead.models.find import find
from arrowhead.models.model import target_of
from arrowhead.plans.cells import paper_name
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.api import budgeted, calibrate, calibration_bytes
from arrowhead.searches.budget.config import PRESETS, Budget, Extent
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.solution import solve, sweep
from arrowhead.searches.greedy import Greedy, Trial, greedy_trials
from arrowhead.searches.headwise import Choice, Headwise, headwise_choices

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

THRESHOLDS = {"D1": 0.025, "D2": 0.05, "D3": 0.075, "D4": 0.1, "D5": 0.125, "D6": 0.15}


def search(
    pipe: "DiffusionPipeline | nn.Module",
    inputs: Mapping[str, Any] | Callable[[], Any],
    *,
    adapter: Adapter | None = None,
    strategy: Literal["greedy", "headwise", "budget"] | Greedy | Headwise | None = None,
    budget: Budget | Literal["light", "balanced", "strong"] | None = None,
    threshold: float | str | None = None,
    loss: LossForm = "paper",
    extent: Extent | None = None,
    table: Table | None = None,
    shard: Sequence[str] | None = None,
    progress: bool = True,
) -> Plan:
    """Find a plan on one calibration run of the pipeline.

    The strategy follows the arguments: with a `threshold` it is `greedy` where none is named, else `budget`.

    Args:
        pipe: a diffusers pipeline of a supported family. It is left as it was, whatever happens, but for the scheduler's
            timesteps, which every call sets anew. Or a `torch.nn.Module` of one's own. What is compiled of either runs eagerly
            here, with what the search finds as if it were not compiled.
        inputs: the keyword arguments of the pipeline's call: prompts or labels, steps, guidance. A `generator` among them
            is left as it was found. For a module, a callable without arguments that generates once, by any loop over the
            model, the same whenever it is called, and returns the final latents (of which budgets alone ask). What does
            not depend on the model, such as encoding prompts, is better done before: for a budget it is called once more for
            every step, with the model's outputs as they were.
        adapter: what describes a module.
        strategy: `greedy` is DiTFastAttn's Algorithm 1, `headwise` DiTFastAttnV2's choice for single heads; a `Greedy` or a
            `Headwise` says what these may choose from; `budget` spends a budget for the whole generation where it hurts least.
        budget: for `budget`, what may be spent or lost, or the name of an error: `light` 0.03, `balanced` 0.07, `strong` 0.15.
            None: `balanced`.
        threshold: for `greedy`, the error allowed at the last layer of a step, or one of D1 … D6 (0.025 … 0.15); for
            `headwise`, the sum of a site's errors in a step (the paper has 0.2 … 1). None: 0.1 or 0.6.
        loss: for `greedy`, the error's form, see `metrics.error.relative_error`.
        extent: for `budget`, how far the calibration looks, and with how much memory.
        table: for `budget`, what `calibrate` gave for these inputs, instead of another calibration.
        shard: names of the inputs that have one entry for each prompt, the list of generators among them, to be split among the
            processes of `torch.distributed`, all of which are given the same. Each runs the pipeline on its own prompts, and
            all end with the same plan: the one of all prompts in one process, but for rounding. None: nothing is split.
        progress: show a tqdm bar.

    Raises:
        UnsupportedPipeline: no attention sites are known for this pipeline.
        InputsInvalid: the pipeline's call does not take the inputs, or a setting is out of range.
        AlreadyApplied: the pipeline carries a plan.
        NotIntercepted: attention was computed where it could not be seen.

    Warns:
        NothingCompressed: something may be lost, but every cell stayed full.
    """
    named = strategy if strategy is not None else ("greedy" if threshold is not None and budget is None else "budget")
    _check_arguments(named, budget, threshold, loss, extent, table)
    pipe = with_adapter(pipe, adapter)
    inputs = call_inputs(pipe, inputs)
    inputs = inputs if shard is None else part_of(pipe, inputs, shard)
    if named == "budget":
        wanted = Budget(error=PRESETS[budget or "balanced"]) if budget is None or isinstance(budget, str) else budget
        plan = budgeted(pipe, inputs, wanted, extent=extent, table=table, progress=progress)
        (asked, value), may_lose = wanted.asked, wanted.error is not None or wanted.asked[1] < 1
    else:
        settings = Greedy() if named == "greedy" else Headwise() if isinstance(named, str) else named
        delta = _threshold(threshold if threshold is not None else 0.1 if isinstance(settings, Greedy) else 0.6)
        plan = _thresholded(pipe, inputs, settings, delta, loss, progress)
        asked, value, may_lose = "threshold", delta, delta > 0
    plan = share_of(inputs).agreed(plan)
    if may_lose and set(plan.count()) == {"full"}:
        warnings.warn(
            f"nothing could be left out within {asked} = {value}, so the plan is full attention everywhere; allow more",
            NothingCompressed,
            stacklevel=2,
        )
    return plan


def _check_arguments(
    named: str | Greedy | Headwise,
    budget: Budget | str | None,
    threshold: float | str | None,
    loss: str,
    extent: Extent | None,
    table: Table | None,
) -> None:
    known = isinstance(named, str) and named in ("greedy", "headwise", "budget")
    if not isinstance(named, Greedy | Headwise) and not known:
        raise InputsInvalid(f"got strategy={named!r}, wanted 'greedy', 'headwise', a Greedy or a Headwise, or 'budget'")
    if not isinstance(loss, str) or loss not in ("paper", "signed"):
        raise InputsInvalid(f"got loss={loss!r}, wanted 'paper' or 'signed'")
    if not (isinstance(named, Greedy) or named == "greedy") and (loss != "paper" or isinstance(threshold, str)):
        raise InputsInvalid(
            f"got loss={loss!r} and threshold={threshold!r} with strategy={named!r}; the signed loss and D1 … D6 are "
            "greedy's; leave out the loss, and give the threshold as a number, such as 0.6"
        )
    if (budget is not None and named != "budget") or (threshold is not None and named == "budget"):
        raise InputsInvalid(
            f"got budget={budget!r} and threshold={threshold!r} with strategy={named!r}; wanted a threshold for 'greedy' and "
            "'headwise', a budget for 'budget'; leave the other one out"
        )
    if not isinstance(extent, Extent | None) or not isinstance(table, Table | None):
        raise InputsInvalid(f"got extent={extent!r} and a {type(table).__name__} for a table, wanted an Extent, or a Table")
    given = [name for name, value in (("extent", extent), ("table", table)) if value is not None]
    if len(given) > (named == "budget"):
        raise InputsInvalid(f"got {' and '.join(given)} with strategy={named!r}; wanted one of them at most, with 'budget'")
    if not isinstance(budget, Budget | None) and not (isinstance(budget, str) and budget in PRESETS):
        raise InputsInvalid(f"got budget={budget!r}, wanted a Budget, or one of {', '.join(PRESETS)}")


def _thresholded(
    pipe: "DiffusionPipeline",
    inputs: Mapping[str, Any],
    chosen: Greedy | Headwise,
    delta: float,
    loss: LossForm,
    progress: bool,
) -> Plan:
    """The papers' searches."""
    before = target_of(find(pipe))
    if isinstance(chosen, Greedy):
        found = _shown(greedy_trials(pipe, inputs, threshold=delta, loss=loss, settings=chosen), progress)
        candidates = [paper_name(cell) for cell in chosen.candidates(found.tokens, found.branches.guided)]
        settings: dict[str, Any] = {"strategy": "greedy", "candidates": candidates, **vars(chosen)}
        settings |= {"threshold": delta, "loss": loss}
    else:
        found = _shown(headwise_choices(pipe, inputs, threshold=delta, settings=chosen), progress)
        settings = {"strategy": "headwise", **vars(chosen), "threshold": delta}
    settings |= {"transformer_passes": found.passes, "attention_flops_by_raw": round(found.cost, 3)}
    target = before.common(target_of(find(pipe)))  # some schedulers change settings of their own while they run
    told, branches = provenance(pipe, inputs, settings), found.branches
    return Plan(found.cells, target, found.tokens, branches.guided, told, branches.calls, found.switch)


def _threshold(value: float | str) -> float:
    number = -1.0
    if isinstance(value, str | Real) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # words, and more digits than a float has
            number = float(THRESHOLDS.get(value, value) if isinstance(value, str) else value)
    if not 0 <= number < float("inf"):
        raise InputsInvalid(f"got threshold={value!r}, wanted a number of 0 or more, or one of {', '.join(THRESHOLDS)}")
    return number


Tried = TypeVar("Tried", Trial, Choice)


def _shown(trials: Generator[Tried, None, SearchResult], progress: bool) -> SearchResult:
    """Drain a search behind a bar over the steps."""
    with closing(trials), tqdm(desc="search", unit="step", disable=not progress) as bar:
        while True:
            try:
                trial = next(trials)
            except StopIteration as end:
                bar.update((bar.total or 0) - bar.n)
                return end.value
            bar.total = trial.steps
            bar.update(trial.step - bar.n)
            bar.set_postfix(error=f"{trial.error:.4f}", refresh=False)


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
    "greedy_trials",
    "headwise_choices",
    "search",
    "solve",
    "sweep",
]
