"""How attention can be computed at one site in one step: the values that every other file speaks of.

A *method* says which query–key pairs are looked at. A *cell* says what a site does in a step: attend with a method,
perhaps for the conditional branch only, or reuse what it gave before.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Full:
    """Every query sees every key."""


@dataclass(frozen=True)
class Arrow:
    """Band of `radius` visual tokens on each side of a query; text rows and text columns stay dense.

    Without text tokens this is the window attention of DiTFastAttn (WA). With `residual` the output of the last full
    step minus its band, O_r − W_r, is added to it (WA-RS of DiTFastAttn).
    """

    radius: int
    residual: bool = False

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"a band's radius is a number of tokens; got {self.radius}, wanted 0 or more")


Method = Full | Arrow


@dataclass(frozen=True)
class Attend:
    """Compute attention with `method`.

    With `share_cfg` only the conditional half of the CFG batch is computed, projections included, and its output serves
    both halves (attention sharing across CFG, the ASC of DiTFastAttn).
    """

    method: Method = Full()
    share_cfg: bool = False


@dataclass(frozen=True)
class Reuse:
    """Return the module's last computed output, after the output projection (attention sharing across timesteps, AST)."""


Cell = Attend | Reuse

FULL = Attend()
ASC = Attend(share_cfg=True)
AST = Reuse()


def wa_rs(radius: int, share_cfg: bool = False) -> Attend:
    """Window attention with residual sharing, for both branches or for the conditional one."""
    return Attend(Arrow(radius, residual=True), share_cfg)


def refreshes_residual(cell: Cell) -> bool:
    """Whether the full output is at hand in this step, so that residuals can be made from it."""
    return isinstance(cell, Attend) and isinstance(cell.method, Full)


def residual_radius(cell: Cell) -> int | None:
    """The radius of the residual that the cell reads, or None."""
    if isinstance(cell, Attend) and isinstance(cell.method, Arrow) and cell.method.residual:
        return cell.method.radius
    return None


def paper_name(cell: Cell) -> str:
    """The papers' name: full, ASC, WA, WA-RS, WA+ASC, WA-RS+ASC or AST."""
    if isinstance(cell, Reuse):
        return "AST"
    sharing = ["ASC"] if cell.share_cfg else []
    if isinstance(cell.method, Full):
        return "ASC" if sharing else "full"
    return "+".join(["WA-RS" if cell.method.residual else "WA", *sharing])


def dit_fast_attn_candidates(visual_tokens: int, guided: bool) -> Sequence[Cell]:
    """The cells that DiTFastAttn tries, in its order; without guidance there is no branch to share.

    The band reaches an eighth of the visual tokens on each side, the only reading that gives the paper's Table 2.
    """
    radius = visual_tokens // 8
    if guided:
        return AST, wa_rs(radius, share_cfg=True), wa_rs(radius), ASC
    return AST, wa_rs(radius)
