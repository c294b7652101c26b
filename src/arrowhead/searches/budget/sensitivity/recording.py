"""The calibration: one run of the pipeline with full attention, followed step by step."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from arrowhead.calibration.provenance import provenance
from arrowhead.calibration.run import CalibrationRun
from arrowhead.calibration.sharding import share_of
from arrowhead.errors import InputsInvalid, NotIntercepted
from arrowhead.models.custom import CustomModel
from arrowhead.models.find import find
from arrowhead.models.model import Model, target_of
from arrowhead.plans.layout import ALL_KINDS, Branches, Site
from arrowhead.searches.budget.config import Extent
from arrowhead.searches.budget.sensitivity.cfg import Guidance
from arrowhead.searches.budget.sensitivity.loop_gain import LoopRun
from arrowhead.searches.budget.sensitivity.recorder import Recorder
from arrowhead.searches.budget.sensitivity.sampler_gain import Sampling, observed
from arrowhead.searches.budget.sensitivity.table import Table

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
    model = find(pipe, extent.kinds or ALL_KINDS)
    return model if extent.kinds else model.filtered(lambda site: site.kind != "block" or site.weights > 0)


def blocks_of(pipe: "DiffusionPipeline", extent: Extent, sites: Sequence[Site]) -> tuple[Site, ...]:
    """Blocks that a plan may speak of in place of these sites: all that they compute by their sites is looked at."""
    if extent.kinds:
        return ()
    return tuple(block for block in find(pipe, ALL_KINDS).sites if block.made_of(sites))


def record(
    pipe: "DiffusionPipeline", inputs: Mapping[str, Any], extent: Extent
) -> Generator[tuple[int, int | None], None, Recording]:
    """Run the pipeline once with `inputs`, full attention everywhere; yield (step, steps) after each step.

    Every step is one pass forward and one back for each vector, with respect to activations alone; without gradients two passes
    forward or more. Outputs and residuals of the last steps are held for all sites.

    Raises what `arrowhead.search` raises.
    """
    model = sites_of(pipe, extent)
    weights = [weight for transformer in model.transformers for weight in transformer.parameters()]
    if extent.gradients and any(weight.is_inference() for weight in weights):
        raise InputsInvalid(
            "got weights that were made under torch.inference_mode(), through which no gradient goes; wanted others; load the "
            "pipeline outside of it"
        )
    share = share_of(inputs)
    if not (extent.gradients or share.alone):
        raise InputsInvalid("got gradients=False with shard, wanted gradients, or all prompts in one process")
    target, loop = target_of(model), LoopRun(model, inputs["generate"]) if isinstance(pipe, CustomModel) else None
    calibration = CalibrationRun(model, inputs if loop is None else {"generate": loop})
    call, guided = model.call_arguments((), inputs), calibration.branches.guided
    recorder: Recorder | None = None
    with (
        observed(pipe.scheduler) if loop is None else nullcontext(loop) as sampling,
        _parameters_frozen(weights) if extent.gradients else nullcontext(),
        _checkpointed(model.transformers, extent.checkpoint, calibration.branches),
    ):
        for step in calibration.steps():
            scale = model.guidance_scale(call, step.index) if guided else 1.0
            recorder = recorder or Recorder(step.sites, calibration.tokens, extent, share)
            guidance = Guidance(calibration.joined_branches, scale, model.latent_channels)
            if loop is not None:
                loop.guidance = guidance
            recorder.follow(step, guidance)
            yield step.index, calibration.step_count
    if recorder is None:
        raise NotIntercepted("the pipeline never called its transformer; wanted at least one denoising step")
    target = target.common(target_of(model))  # some schedulers change settings of their own while they run
    blocks = blocks_of(pipe, extent, target.sites)
    told = provenance(pipe, inputs, vars(extent))
    sampling = sampling.of_all(share) if isinstance(sampling, Sampling) else sampling
    table = share.agreed(recorder.table(sampling, calibration.branches, target, blocks, told, calibration.switch))
    return Recording(table, sampling.latents(), calibration.passes, calibration.cost)


@contextmanager
def _parameters_frozen(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients with respect to weights: what they would need is not kept."""
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
    if wanted and (unable := [t for t in transformers if not hasattr(t, "enable_gradient_checkpointing")]):
        raise InputsInvalid(
            f"got checkpoint=True for a {type(unable[0]).__name__}, which has no enable_gradient_checkpointing; wanted a "
            "model that has; leave it out, or have the model checkpoint its blocks itself"
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
