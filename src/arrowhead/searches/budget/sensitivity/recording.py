"""The calibration of a budget: one generation with full attention, in which every step's sensitivity is recorded."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from arrowhead.calibration.driver import Driver
from arrowhead.calibration.provenance import provenance
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.scheduler_calls import SchedulerCalls, joined_calls
from arrowhead.calibration.step import Step
from arrowhead.errors import CalibrationFitted, InputsInvalid
from arrowhead.models.find import find
from arrowhead.models.model import Model
from arrowhead.plans.layout import ALL_KINDS, Branches, Site, Tokens
from arrowhead.searches.budget.config import Extent
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.footprint import free_bytes, needed_bytes, smaller
from arrowhead.searches.budget.sensitivity.loop_gain import LoopReplay, run_loop
from arrowhead.searches.budget.sensitivity.recorder import Recorder
from arrowhead.searches.budget.sensitivity.sampler_gain import SchedulerReplay, run_scheduler
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.upstream import can_checkpoint


@dataclass(frozen=True)
class Recording:
    """The result of a calibration: the table, the final latents (B, C, …), and `passes` and `cost` as in `SearchResult`.

    `one_by_one`: prompts ran one after another.
    """

    table: Table
    final: Tensor
    passes: int
    cost: float
    one_by_one: bool = False


def sites_of(driver: Driver, extent: Extent) -> Model:
    """The pipeline's model with the sites that are measured."""
    model = find(driver.pipe, extent.kinds or ALL_KINDS)
    return model if extent.kinds else model.filtered(lambda site: site.kind != "block" or site.weights > 0)


def blocks_of(driver: Driver, extent: Extent, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The blocks that a plan may name in place of their sites: blocks that compute nothing besides these sites."""
    if extent.kinds:
        return ()
    return tuple(block for block in find(driver.pipe, ALL_KINDS).sites if block.made_of(sites))


class _DoesNotFit(Exception):
    """The memory that is free is less than a calibration needs; `extent` is what needs less."""

    def __init__(self, extent: Extent, said: str) -> None:
        super().__init__(said)
        self.extent = extent


def record(
    driver: Driver, extent: Extent | None = None, on_step: Callable[[int, int | None], None] = lambda *_: None
) -> Recording:
    """Generate once, full attention everywhere, and call `on_step` with the step and the number of steps after each step.

    Without an extent, it is the default one, or what fits the free memory, of which a warning tells.

    Every step is one pass forward and one back for each vector, with respect to activations alone; without gradients two passes
    forward or more. Outputs and residuals of the last steps are held for all sites.

    Raises what `arrowhead.search` raises.
    """
    if extent is not None:
        return _record(driver, extent, on_step)
    try:
        return _record(driver, Extent(), on_step, fits=True)
    except _DoesNotFit as found:
        warnings.warn(str(found), CalibrationFitted, stacklevel=4)
        extent = found.extent
    return _record(driver, extent, on_step)  # out here: the traceback would keep the first run's tensors


def _record(driver: Driver, extent: Extent, on_step: Callable[[int, int | None], None], *, fits: bool = False) -> Recording:
    """`record` with this extent. With `fits` it has to fit the free memory.

    Raises:
        _DoesNotFit: it does not; known in the first step.
    """
    model, share = sites_of(driver, extent), driver.share
    weights = [weight for transformer in model.transformers for weight in transformer.parameters()]
    if extent.gradients and any(weight.is_inference() for weight in weights):
        raise InputsInvalid(
            "got weights that were made under torch.inference_mode(), through which no gradient goes; wanted others; load the "
            "pipeline outside of it"
        )
    if not (extent.gradients or share.alone):
        raise InputsInvalid("got gradients=False with shard, wanted gradients, or all prompts in one process")
    drivers, parts = driver.one_by_one() if extent.one_by_one else [driver], list[_Part]()
    with _parameters_frozen(weights) if extent.gradients else nullcontext():
        for done, own in enumerate(drivers):
            parts.append(_run(own, model, extent, partial(_among, on_step, done, len(drivers)), fits=fits))
    longest = max(parts, key=lambda part: part.calibration.tokens.text)
    calibration, recorders = longest.calibration, [part.recorder for part in parts]
    replay = (
        longest.replay if len(parts) == 1 else SchedulerReplay(joined_calls([part.calls for part in parts], [1] * len(parts)))
    )
    target = calibration.target
    blocks, about = blocks_of(driver, extent, target.sites), provenance(driver, vars(extent))
    other_texts = any(part.calibration.other_texts for part in parts)
    run = calibration.switch, calibration.of_calls, other_texts, recorders
    table = share.agreed(longest.recorder.table(replay, calibration.branches, target, blocks, about, *run))
    passes, cost = (sum(getattr(part.calibration, name) for part in parts) for name in ("passes", "cost"))
    return Recording(table, replay.latents(), passes, cost / len(parts), len(parts) > 1)


@dataclass(frozen=True)
class _Part:
    """A calibration run that has ended: of all images, or of one prompt's."""

    calibration: CalibrationRun
    recorder: Recorder
    replay: SchedulerReplay | LoopReplay

    @property
    def calls(self) -> SchedulerCalls:
        """The scheduler's, of a pipeline."""
        assert isinstance(self.replay, SchedulerReplay)
        return self.replay.calls


def footprint_of(
    driver: Driver, model: Model, calibration: CalibrationRun
) -> tuple[Sequence[Site], list[Site], Tokens, int, int, torch.device]:
    """What a calibration's bytes depend on besides its extent, as `held_bytes` takes it; known from the first step on."""
    weight = next(model.transformer.parameters())
    itemsize = getattr(model.transformer, "dtype", weight.dtype).itemsize  # weights may be kept in a smaller dtype
    blocks = [site for site in find(driver.pipe, ALL_KINDS).sites if site.kind == "block"]
    return model.sites, blocks, calibration.tokens, calibration.rows, itemsize, weight.device


def _require_fit(driver: Driver, model: Model, calibration: CalibrationRun, extent: Extent) -> None:
    """Check that the memory that is free will do, in all processes: they run alike, and so take the smallest extent of any.

    Raises:
        _DoesNotFit: it will not.
    """
    sites, blocks, tokens, rows, itemsize, device = footprint_of(driver, model, calibration)
    free, prompts = free_bytes(device), 1
    with suppress(InputsInvalid):
        prompts = len(driver.one_by_one())
    possible = {
        "one_by_one": prompts > 1,
        "checkpoint": calibration.branches.calls == 1 and all(map(can_checkpoint, model.transformers)),
        "other_device": device.type != "cpu",
    }
    needed: list[int] = []
    for found in (extent, *smaller(extent, **possible)):
        own = rows // prompts if found.one_by_one else rows
        needed.append(needed_bytes(found, sites, blocks, tokens, own, itemsize, device))
        if free is None or needed[-1] <= free:
            break
    fit = (len(needed), needed[0], needed[-1], free or 0), found
    (tried, most, less, left), found = fit if driver.share.alone else max(driver.share.each(fit), key=itemgetter(0))
    if tried == 1:
        return
    changed = {name: value for name, value in vars(found).items() if value != getattr(extent, name)}
    named = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    raise _DoesNotFit(
        found,
        f"the calibration needs about {most / 2**30:.1f} GiB, and {left / 2**30:.1f} are free; it runs with Extent({named}), "
        f"by which it needs about {less / 2**30:.1f}; give an extent to choose",
    )


def _run(
    driver: Driver, model: Model, extent: Extent, on_step: Callable[[int, int | None], None], *, fits: bool = False
) -> _Part:
    """Generate once and record every step."""
    calibration = CalibrationRun(driver, model)
    recorder: Recorder | None = None

    def guidance(step: int) -> Guidance:
        return Guidance(calibration.joined_branches, calibration.guidance_scale(step), model.latent_channels)

    def follow(step: Step) -> None:
        nonlocal recorder
        if fits and recorder is None:
            _require_fit(driver, model, calibration, extent)
        recorder = recorder or Recorder(step.sites, calibration.tokens, extent, driver.share)
        recorder.follow(step, guidance(step.index))
        on_step(step.index, calibration.step_count)

    with _checkpointed(model.transformers, extent.checkpoint, calibration.branches):
        replay = (
            run_loop(driver, model, guidance(0), calibration, follow)
            if driver.scheduler is None
            else run_scheduler(driver, calibration, follow)
        )
    assert recorder is not None  # the run had a step
    recorder.end()
    return _Part(calibration, recorder, replay)


def _among(on_step: Callable[[int, int | None], None], done: int, runs: int, step: int, steps: int | None) -> None:
    """Tell of a step of one of several runs, of which some are done."""
    on_step(step + done * (steps or 0), None if steps is None else steps * runs)


@contextmanager
def _parameters_frozen(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block no gradients with respect to weights, so that the activations for them are not kept."""
    learnt = [p for p in weights if p.requires_grad]
    for p in learnt:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learnt:
            p.requires_grad_(True)


@contextmanager
def _checkpointed(transformers: Sequence[Any], wanted: bool, branches: Branches) -> Iterator[None]:
    """Within the block the transformers checkpoint their blocks, if `wanted`: blocks run again for the gradients."""
    if wanted and (unable := [t for t in transformers if not can_checkpoint(t)]):
        raise InputsInvalid(
            f"got checkpoint=True for a {type(unable[0]).__name__}, which does not support gradient checkpointing; wanted a "
            "model whose enable_gradient_checkpointing works; leave it out, or have the model checkpoint its blocks itself"
        )
    others = [transformer for transformer in transformers if not getattr(transformer, "is_gradient_checkpointing", False)]
    if (wanted or len(others) < len(transformers)) and branches.calls == 2:
        raise InputsInvalid(
            "got gradient checkpointing with a pipeline that calls its transformer twice a step, wanted none: the two calls "
            "run side by side here, which cannot be done again; leave it out, or disable it"
        )
    for transformer in others if wanted else ():
        transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for transformer in others if wanted else ():
            transformer.disable_gradient_checkpointing()
