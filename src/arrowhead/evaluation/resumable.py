"""Evaluates plans on any number of images, stored in a folder: check, generate, measure, merge."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.image_generation import generate_missing, missing_batches, warm_up
from arrowhead.evaluation.measurement_run import MeasurementRun
from arrowhead.evaluation.metric_networks import Networks
from arrowhead.evaluation.real_images import RealImages, read_real_images
from arrowhead.evaluation.request import Request, Shard
from arrowhead.evaluation.results import Results
from arrowhead.evaluation.side_by_side import require_fit, require_short_names
from arrowhead.evaluation.work_folder import open_work
from arrowhead.models.find import find
from arrowhead.plans.plan import Plan

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

NO_NETWORKS, ONLY_SHARD = Networks(), Shard()


def measure(
    pipe: "DiffusionPipeline",
    plans: Mapping[str, Plan],
    inputs: Mapping[str, Any],
    *,
    images: int,
    work: str | Path,
    seed: int = 0,
    batch: int = 8,
    networks: Networks = NO_NETWORKS,
    real: str | Path | None = None,
    real_images: int | None = None,
    shard: Shard = ONLY_SHARD,
    progress: bool = True,
) -> Results | None:
    """Generate images with the same seeds, untouched and with every plan, and measure them.

    All images and values are stored in `work`. What is there already is not made again, so a run can be interrupted, resumed,
    and extended by more images, plans or networks. Several processes can share the work, each with its `shard`. The results are
    computed from the stored values in a fixed order, so they do not depend on which process made what.

    Args:
        pipe: a diffusers pipeline of a supported family.
        plans: plans by name; a name becomes the name of a folder and of a row.
        inputs: keyword arguments of the pipeline's call. Image i gets item i mod n of lists of prompts or labels.
        images: how many images to generate for each setting.
        work: the folder where everything is stored.
        seed: image i is generated from seed `seed` + i.
        batch: images in one call of the pipeline.
        networks: the metric networks; PSNR and SSIM need none.
        real: real images or their moments for FID and KID, see `read_real_images`.
        real_images: use only so many of the real images.
        shard: the share of this process; by default it does everything.
        progress: show tqdm bars.

    Returns:
        The table, or None in a process that did only a share. A last call without a shard gives the table then; shards that
        wait, as those launched by accelerate do, give it in the first process.

    Raises:
        InputsInvalid: inputs, names, networks, real images or the folder do not fit. This is known before images are generated.
        PlanMismatch: a plan was made for another model, scheduler, number of steps or tokens.
    """
    request = Request.of(inputs, images, seed=seed, batch=batch)
    _require_names(plans)
    require_short_names(plans)
    model = find(pipe)
    first = request.batches[0]
    call = {name: value for name, value in request.call(first).items() if name != "generator"}
    model.call_arguments((), call)
    for plan in plans.values():
        require_fit(pipe, plan, call, seed)
    measured = networks.measures(pipe.transformer.device, request)
    reference = None if real is None else read_real_images(real)
    if isinstance(reference, RealImages) and real_images is not None:
        reference = reference.first(real_images)
    run = MeasurementRun(pipe, request, measured, reference, Path(work), plans, progress)
    run.require_matching_statistics()
    open_work(run.work, run.about())
    share = shard.share(request.batches)
    todo = missing_batches(run.settings, share)
    if share:
        tried = (todo or share)[0]
        run.try_measures(tried, warm_up(pipe, request, [*plans.values()], tried) if todo else run.raw.pixels(tried))
    run.measure_real_images(shard)
    generate_missing(pipe, request, run.settings, todo, progress=progress)
    run.measure_images(shard)
    if shard.count > 1 and not (shard.waits and shard.index == 0):
        return None
    if shard.waits:
        run.wait()
    return run.results(networks.not_measured(request, measured, reference))


def _require_names(plans: Mapping[str, Plan]) -> None:
    wrong = [name for name in plans if name in ("raw", "real") or not name.strip() or {*name} & {*"/\\\0"} or name[0] == "."]
    if wrong:
        raise InputsInvalid(f"got plans named {wrong}, wanted names for folders, and neither raw nor real; rename them")
