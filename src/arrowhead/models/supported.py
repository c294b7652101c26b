"""What is supported, as a table: read from the families, so that it says what is done."""

from dataclasses import dataclass

from arrowhead.models.families import FAMILIES
from arrowhead.plans.layout import BranchOrder, Kind

CALLS: dict[BranchOrder, str] = {
    "cond_first": "one batch, conditional first",
    "uncond_first": "one batch, unconditional first",
    "two_calls": "two calls",
}
KINDS: tuple[Kind, ...] = ("self_attention", "cross_attention", "feed_forward", "block")


@dataclass(frozen=True)
class Supported:
    """A family of models: its transformer's class, the pipelines, which of its modules are compressed, how CFG comes."""

    family: str
    transformer: str
    pipelines: tuple[str, ...]
    compressed: tuple[Kind, ...]
    left_alone: str
    cfg: str
    tested: str


def supported() -> tuple[Supported, ...]:
    """The families of models that arrowhead compresses. Subclasses of these pipelines and transformers are supported, too."""
    return tuple(
        Supported(
            family.name,
            family.transformer,
            tuple(family.branch_order),
            tuple(kind for kind in KINDS if family.knows(kind)),
            family.left_alone,
            " or ".join(CALLS[order] for order in dict.fromkeys(family.branch_order.values())),
            family.tested,
        )
        for family in FAMILIES
    )
