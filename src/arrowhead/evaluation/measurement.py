"""Any number of plans beside the untouched pipeline, over any number of images: check, make, measure, merge."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead.errors import InputsInvalid
from arrowhead.evaluation.image_generation import make, missing, warm_up
from arrowhead.evaluation.real_images import Pictures
from arrowhead.evaluation.real_images import real as read_real
from arrowhead.evaluation.request import Request, Shard
from arrowhead.evaluation.run import Run
from arrowhead.evaluation.side_by_side import require_fit
from arrowhead.evaluation.suite import Networks
from arrowhead.evaluation.table import Measured
from arrowhead.evaluation.work_folder import open_work
from arrowhead.models.find import find
from arrowhead.models.model import transformers_of
from arrowhead.plans.plan import Plan

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline

NO_NETWORKS, ALONE = Networks(), Shard()


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
    shard: Shard = ALONE,
    progress: bool = True,
) -> Measured | None:
    """Generate images with paired seeds, untouched and with every plan, and measure them; all that is made is kept in `work`.

    Image i has seed `seed` + i and item i mod n of the lists among the inputs. What is in `work` already is not made again, so
    a run can be interrupted, go on, and be given more images or plans. Several processes can share it, each with a `shard`;
    figures come from what is kept, in order, so it does not matter who made it. A shard gives None: a last call without one
    merges them; where shards wait, as those do that accelerate launched, the first gives the table.

    Raises:
        InputsInvalid: something does not fit, before anything is generated; see the rooms of this package.
        PlanMismatch: a plan was made for something else.
    """
    asked = Request.of(inputs, images, seed=seed, batch=batch)
    _require_names(plans)
    transformer, *_ = transformers_of(pipe)
    first = asked.batches[0]
    call = {name: value for name, value in asked.call(first).items() if name != "generator"}
    find(pipe).call_arguments((), call)
    for plan in plans.values():
        require_fit(pipe, plan, call, seed)
    measured = networks.measures(transformer.device, asked)
    against = None if real is None else read_real(real)
    if isinstance(against, Pictures) and real_images is not None:
        against = against.first(real_images)
    run = Run(pipe, asked, measured, against, Path(work), plans, progress)
    run.require_statistics_of_the_network()
    open_work(run.work, run.about())
    share = shard.of(asked.batches)
    todo = missing(run.settings, share)
    if share:
        tried = (todo or share)[0]
        run.try_measures(tried, warm_up(pipe, asked, [*plans.values()], tried) if todo else run.raw.pixels(tried))
    run.look_at_real(shard)
    make(pipe, asked, run.settings, todo, progress=progress)
    run.look(shard)
    if shard.count > 1 and not (shard.waits and shard.index == 0):
        return None
    if shard.waits:
        run.wait()
    return run.merge(networks.left_out(asked, measured, against))


def _require_names(plans: Mapping[str, Plan]) -> None:
    wrong = [name for name in plans if name in ("raw", "real") or not name.strip() or {*name} & {*"/\\\0"} or name[0] == "."]
    if wrong:
        raise InputsInvalid(f"got plans named {wrong}, wanted names for folders, and neither raw nor real; rename them")
