"""The table of what is supported, read from the families."""

from dataclasses import dataclass

from arrowhead.models.families import FAMILIES
from arrowhead.plans.layout import BranchOrder, Kind

CFG: dict[BranchOrder, str] = {
    "cond_first": "one batch, conditional first",
    "uncond_first": "one batch, unconditional first",
    "two_calls": "two calls",
}
KINDS: tuple[Kind, ...] = ("self_attention", "cross_attention", "feed_forward", "block", "stack")


@dataclass(frozen=True)
class Supported:
    """A supported family of models.

    Attributes:
        family: what people call it.
        transformer: the name of the transformer's class.
        pipelines: the names of the pipelines' classes.
        compressed: the kinds of modules that plans can have cells for.
        left_alone: what is computed in every step.
        cfg: how the branches of classifier-free guidance come.
        tested: which of the tests the family goes through.
    """

    family: str
    transformer: str
    pipelines: tuple[str, ...]
    compressed: tuple[Kind, ...]
    left_alone: str
    cfg: str
    tested: str


def supported() -> tuple[Supported, ...]:
    """Returns the supported families of models. Subclasses of their pipelines and transformers are supported, too.

    >>> [row.family for row in supported() if "FluxPipeline" in row.pipelines]
    ['FLUX.1']
    """
    return tuple(
        Supported(
            family.name,
            family.transformer,
            tuple(family.branch_order),
            tuple(kind for kind in KINDS if family.has(kind)),
            family.left_alone,
            " or ".join(CFG[order] for order in dict.fromkeys(family.branch_order.values())),
            family.tested,
        )
        for family in FAMILIES
    )
