"""The calibration: one run of the pipeline with full attention, followed step by step."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from arrowhead.apply import target_of
from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.layout import Branches, Site
from arrowhead.models import EVERYTHING, Model, find
from arrowhead.search.about import about
from arrowhead.search.budget.extent import Extent
from arrowhead.search.budget.guidance import Guidance
from arrowhead.search.budget.recorder import Recorder
from arrowhead.search.budget.samplers import observed
from arrowhead.search.budget.table import Table
from arrowhead.search.calibrate import Calibration

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Recording:
    """What a calibration ends with: the table, the run's final latents, and what it cost, as `Found` says it."""

    table: Table
    final: Tensor
    passes: int
    cost: float


def sites_of(pipe: "DiffusionPipeline", extent: Extent) -> Model:
    """The pipeline's model with the sites that are looked at."""
    model = find(pipe, extent.kinds or EVERYTHING)
    return model if extent.kinds else model.only(lambda site: site.kind != "block" or site.weights > 0)


def blocks_of(pipe: "DiffusionPipeline", extent: Extent, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Blocks that a plan may speak of in place of these sites: all that they compute by their sites is looked at."""
    if extent.kinds:
        return ()
    return tuple(block for block in find(pipe, EVERYTHING).sites if block.made_of(sites))


def record(pipe: "DiffusionPipeline", inputs: Mapping[str, Any], extent: Extent) -> Generator[tuple[int, int], None, Recording]:
    """Run the pipeline once with `inputs`, full attention everywhere; yield (step, steps) after each step.

    Every step is one pass forward and one back for each vector, with respect to activations alone; without gradients two passes
    forward or more. Outputs and residuals of the last steps are held for all sites.

    Raises what `arrowhead.search` raises.
    """
    model = sites_of(pipe, extent)
    if extent.gradients and any(weight.is_inference() for weight in model.transformer.parameters()):
        raise InputsInvalid(
            "got weights that were made under torch.inference_mode(), through which no gradient goes; wanted others; load the "
            "pipeline outside of it"
        )
    target = target_of(model)
    calibration = Calibration(model, inputs)
    scale = model.family.guidance_scale(model.call_arguments((), inputs)) if calibration.branches.guided else 1.0
    guidance = Guidance(calibration.seen, scale, model.latent_channels)
    recorder: Recorder | None = None
    with (
        observed(pipe.scheduler) as sampling,
        _parameters_frozen(model.transformer) if extent.gradients else nullcontext(),
        _checkpointed(model.transformer, extent.checkpoint, calibration.branches),
    ):
        for step in calibration.steps():
            recorder = recorder or Recorder(step.sites, calibration.tokens, guidance, extent)
            recorder.follow(step)
            yield step.index, calibration.step_count
    if recorder is None:
        raise NotIntercepted("the pipeline never called its transformer; wanted at least one denoising step")
    target = target.common(target_of(model))  # some schedulers change settings of their own while they run
    blocks = blocks_of(pipe, extent, target.sites)
    table = recorder.table(sampling, calibration.branches, target, blocks, about(pipe, inputs, vars(extent)))
    return Recording(table, sampling.latents(), calibration.passes, calibration.cost)


@contextmanager
def _parameters_frozen(module: nn.Module) -> Iterator[None]:
    """No gradients with respect to weights: what they would need is not kept."""
    learnt = [p for p in module.parameters() if p.requires_grad]
    for p in learnt:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learnt:
            p.requires_grad_(True)


@contextmanager
def _checkpointed(transformer: Any, wanted: bool, branches: Branches) -> Iterator[None]:
    before = transformer.is_gradient_checkpointing
    if (wanted or before) and branches.calls == 2:
        raise InputsInvalid(
            "got gradient checkpointing with a pipeline that calls its transformer twice a step, wanted none: the two calls "
            "run side by side here, which cannot be done again; leave it out, or disable it"
        )
    if wanted:
        transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if wanted and not before:
            transformer.disable_gradient_checkpointing()
