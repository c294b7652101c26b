"""What a plan's owner is warned of when it is applied, and when a generation begins."""

import warnings
from collections.abc import Iterator

from arrowhead.errors import (
    BandCoversAll,
    GuidanceMissing,
    GuidanceNotPlanned,
    OtherWeights,
    PlanDerived,
    ShareCfgIgnored,
)
from arrowhead.models.model import Model
from arrowhead.models.weights import fingerprint, same_weights
from arrowhead.plans import masks
from arrowhead.plans.cells import Arrow, Attend, radius_sort_key
from arrowhead.plans.foreign_text import visible
from arrowhead.plans.layout import Branches
from arrowhead.plans.plan import Plan


def warn_of_wide_bands(plan: Plan) -> None:
    """Warn of a band that reaches over the whole sequence."""
    for site, column in zip(plan.target.sites, plan.columns, strict=True):
        own = site.tokens(plan.tokens)
        methods = {method for cell in column if isinstance(cell, Attend) for method in cell.methods(1)}
        radii = sorted({m.radius for m in methods if isinstance(m, Arrow)}, key=radius_sort_key)
        if wide := [radius for radius in radii if masks.covers(own, radius)]:
            warnings.warn(
                f"the plan has a band of radius {wide[0]} over {own.visual} visual tokens; a narrower one would save work, "
                "this one is full attention",
                BandCoversAll,
                stacklevel=4,
            )
            return


def warn_of_other_weights(plan: Plan, model: Model) -> None:
    """Warn of a model with other weights than the plan was found with."""
    if plan.target.weights is not None and not same_weights(plan.target.weights, fingerprint(model.transformers)):
        warnings.warn(
            f"the plan was found with other weights of {plan.target.transformer} than these, so its error may be another here; "
            "search again with these weights, or look at what the plan does",
            OtherWeights,
            stacklevel=4,
        )


def warn_of_derived(plan: Plan) -> None:
    """Warn of a plan that `Plan.resample` derived."""
    if changes := plan.about.get("derived"):
        said = "; then ".join(", ".join(f"{name} {what}" for name, what in change.items()) for change in changes)
        warnings.warn(
            f"the plan was not found for these circumstances, but derived: {visible(said)}; search again for one of its own, "
            "or look at what it does",
            PlanDerived,
            stacklevel=4,
        )


def other_guidance(plan: Plan, branches: Branches) -> Iterator[tuple[str, str, type[Warning]]]:
    """What is different, the remedy and the warning where a generation has guidance and the plan has none, or the reverse."""
    alone = "search again without guidance for a plan of its own"
    if not branches.guided and any(getattr(cell, "share_cfg", False) for row in plan.cells for cell in row):
        yield "guidance is off, so there is one CFG branch and nothing to share", alone, ShareCfgIgnored
    elif plan.guided and not branches.guided:
        yield "guidance is off, and the plan was made with guidance, by whose errors it was chosen", alone, GuidanceMissing
    if branches.guided and not plan.guided:
        said = "guidance is on, and the plan was made without guidance, which multiplies the plan's errors"
        yield said, "search again with guidance for a plan that fits", GuidanceNotPlanned
