"""What a plan's owner is warned of when it is applied."""

import warnings

from arrowhead.errors import BandCoversAll, PlanDerived
from arrowhead.plans import masks
from arrowhead.plans.cells import Arrow, Attend, radius_sort_key
from arrowhead.plans.foreign_text import visible
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
