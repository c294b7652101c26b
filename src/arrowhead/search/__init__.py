"""Find a plan for a pipeline: `search` is the door, `greedy` and `headwise` the strategies, `calibrate` the run they share."""

import warnings
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from tqdm.auto import tqdm

from arrowhead.apply import plain, target_of
from arrowhead.errors import InputsInvalid, NothingCompressed
from arrowhead.methods import FULL, dit_fast_attn_candidates, paper_name
from arrowhead.metrics.error import LossForm
from arrowhead.models import find
from arrowhead.plan import Plan
from arrowhead.search.calibrate import Found
from arrowhead.search.greedy import Trial, greedy_trials
from arrowhead.search.headwise import Choice, Headwise, headwise_choices
from arrowhead.versions import versions

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

THRESHOLDS = {"D1": 0.025, "D2": 0.05, "D3": 0.075, "D4": 0.1, "D5": 0.125, "D6": 0.15}


def search(
    pipe: "DiffusionPipeline",
    inputs: Mapping[str, Any],
    *,
    strategy: Literal["greedy", "headwise"] | Headwise = "greedy",
    threshold: float | str | None = None,
    loss: LossForm = "paper",
    progress: bool = True,
) -> Plan:
    """Find a plan on one calibration run of the pipeline.

    Args:
        pipe: a diffusers pipeline of a supported family. It is left as it was, whatever happens, but for the scheduler's
            timesteps, which every call sets anew.
        inputs: the keyword arguments of the pipeline's call: prompts or labels, steps, guidance. A `generator` among them
            is left as it was found.
        strategy: `greedy` is DiTFastAttn's Algorithm 1, `headwise` DiTFastAttnV2's choice for single heads; a `Headwise` says
            what that one may choose from.
        threshold: for `greedy`, the error allowed at the last layer of a step, or one of D1 … D6 (0.025 … 0.15); for
            `headwise`, the sum of a site's errors in a step (the paper has 0.2 … 1). None: 0.1 or 0.6.
        loss: for `greedy`, the error's form, see `metrics.error.relative_error`.
        progress: show a tqdm bar.

    Raises:
        UnsupportedPipeline: no attention sites are known for this pipeline.
        InputsInvalid: the pipeline's call does not take the inputs, or a setting is out of range.
        AlreadyApplied: the pipeline carries a plan.
        NotIntercepted: attention was computed where it could not be seen.

    Warns:
        NothingCompressed: the threshold is positive, but every cell stayed full.
    """
    if loss not in ("paper", "signed"):
        raise InputsInvalid(f"got loss={loss!r}, wanted 'paper' or 'signed'")
    if strategy != "greedy" and (loss != "paper" or isinstance(threshold, str)):
        raise InputsInvalid(
            f"got loss={loss!r} and threshold={threshold!r} with strategy={strategy!r}; the signed loss and D1 … D6 are "
            "greedy's; leave out the loss, and give the threshold as a number, such as 0.6"
        )
    delta = _threshold(threshold if threshold is not None else 0.1 if strategy == "greedy" else 0.6)
    before = target_of(find(pipe))
    settings: dict[str, Any]
    if strategy == "greedy":
        found = _shown(greedy_trials(pipe, inputs, threshold=delta, loss=loss), progress)
        candidates = [paper_name(cell) for cell in dit_fast_attn_candidates(found.tokens.visual, found.branches.guided)]
        settings = {"strategy": "greedy", "candidates": candidates, "threshold": delta, "loss": loss}
    elif strategy == "headwise" or isinstance(strategy, Headwise):
        chosen_from = strategy if isinstance(strategy, Headwise) else Headwise()
        found = _shown(headwise_choices(pipe, inputs, threshold=delta, settings=chosen_from), progress)
        settings = {
            "strategy": "headwise",
            **{name: plain(value) for name, value in asdict(chosen_from).items()},
            "threshold": delta,
        }
    else:
        raise InputsInvalid(f"got strategy={strategy!r}, wanted 'greedy', 'headwise' or a Headwise")
    settings |= {"transformer_passes": found.passes, "attention_flops_by_raw": round(found.cost, 3)}
    target = before.common(target_of(find(pipe)))  # some schedulers change settings of their own while they run
    plan = Plan(found.cells, target, found.tokens, found.branches.guided, _about(pipe, inputs, settings), found.branches.calls)
    if delta > 0 and all(cell == FULL for row in plan.cells for cell in row):
        warnings.warn(
            f"no candidate stayed below threshold {delta}, so the plan is full attention everywhere; a larger threshold "
            "compresses more",
            NothingCompressed,
            stacklevel=2,
        )
    return plan


def _threshold(value: float | str) -> float:
    try:
        number = float(THRESHOLDS.get(value, value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or not 0 <= number < float("inf"):
        raise InputsInvalid(f"got threshold={value!r}, wanted a number of 0 or more, or one of {', '.join(THRESHOLDS)}")
    return number


Tried = TypeVar("Tried", Trial, Choice)


def _shown(trials: Generator[Tried, None, Found], progress: bool) -> Found:
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


def _about(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    generator = inputs.get("generator")
    seeds = [g.initial_seed() for g in ([generator] if isinstance(generator, torch.Generator) else generator or [])]
    return {
        "pipeline": type(pipe).__name__,
        "model": str(pipe.config.get("_name_or_path") or ""),
        "search": dict(settings),
        "inputs": {name: _said(value) for name, value in inputs.items() if name != "generator"},
        "seeds": seeds,
        "device": str(pipe.transformer.device),
        "dtype": str(pipe.transformer.dtype),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _said(value: Any) -> Any:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else plain(value)


__all__ = ["THRESHOLDS", "Choice", "Headwise", "Trial", "greedy_trials", "headwise_choices", "search"]
