"""Plans with the FLOPs that the papers report: the places of cells are random, and their number is searched for.

DiTFastAttn (V1) counts whole modules, and its cells are ASC, windows with residuals, both, and AST. DiTFastAttnV2 (V2) counts
the two matmuls, and each head has a method of its own: full, an arrow of one of three widths, the widest with its residual, or
cached. The papers do not say where the reductions are, so places are random here; time depends on them little.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arrowhead import Plan
from arrowhead.plans.cells import FULL, Arrow, Attend, Cached, Cell, Full, Method
from arrowhead.plans.flops import site_flops
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.lifetimes import Writes
from arrowhead.plans.target import Target
from arrowhead.searches.greedy import Greedy

NEAR = 0.005
"""How far from a level a plan may be."""

Place = tuple[int, int, int]
"""Step, site, and head; head 0 for the whole site."""


@dataclass(frozen=True)
class Level:
    """A paper's setting: its name, and what it leaves of its kind of FLOPs."""

    name: str
    left: float
    of: Literal["module", "attention"]


def _v1(**left: float) -> tuple[Level, ...]:
    return tuple(Level(name, share, "module") for name, share in left.items())


def _v2(*removed: float) -> tuple[Level, ...]:
    thresholds = 0.2, 0.6, 1.0
    return tuple(
        Level(f"δ {threshold}", round(1 - share, 2), "attention") for threshold, share in zip(thresholds, removed, strict=True)
    )


LEVELS = {
    "DiT-XL/2-512": _v1(D2=0.69, D4=0.49, D6=0.34),
    "PixArt-Σ-1024": _v1(D2=0.74, D4=0.52, D6=0.37),
    "PixArt-Σ-2K": _v1(D2=0.60, D4=0.36, D6=0.24),
    "SD3-1024": _v2(0.41, 0.63, 0.69),
    "SD3-2K": _v2(0.43, 0.50, 0.68),  # not reported: FLUX's at 2K
    "FLUX-1024": _v2(0.31, 0.56, 0.69),
    "FLUX-2K": _v2(0.43, 0.50, 0.68),
}


def plan(level: Level, target: Target, tokens: Tokens, steps: int, *, guided: bool) -> Plan:
    """A plan that leaves what the level says; its first step is full.

    From full attention everywhere, one place after another (a site in a step, or a head in one) is given one of the paper's
    ways; where that is not enough, one after another is given the cheapest. How many of these moves are made is bisected.
    """
    if level.of == "module":
        some = target.sites[0], tokens
        cells = sorted(Greedy().candidates(tokens, guided), key=lambda cell: _module_flops(*some, cell))
        moves = _moves(steps, [1] * len(target.sites), cells)
    else:
        moves = _moves(steps, [site.heads for site in target.sites], _ways_of_a_head(tokens.visual))

    def cell(given: dict[Place, Any], step: int, place: int) -> Cell:
        if level.of == "module":
            return given.get((step, place, 0), FULL)
        return Attend(tuple(given.get((step, place, head), Full()) for head in range(target.sites[place].heads)))

    low, high = 0, len(moves)
    while True:
        count = (low + high) // 2
        given = dict(moves[:count])
        rows = tuple(tuple(cell(given, step, place) for place in range(len(target.sites))) for step in range(steps))
        made = Plan(rows, target, tokens, guided)
        left = made.flops().module if level.of == "module" else made.flops().attention
        if abs(left - level.left) < NEAR or low == high:
            return made
        low, high = (count + 1, high) if left > level.left else (low, count)


def _moves(steps: int, heads: Sequence[int], ways: Sequence[Any]) -> list[tuple[Place, Any]]:
    """Each place and one of the ways, drawn at random; then each place and the first, the cheapest."""
    draw = random.Random(0)
    places = [(step, place, head) for step in range(1, steps) for place, count in enumerate(heads) for head in range(count)]
    first, second = (draw.sample(places, len(places)) for _ in range(2))
    return [(place, draw.choice(ways)) for place in first] + [(place, ways[0]) for place in second]


def _module_flops(site: Site, tokens: Tokens, cell: Cell) -> float:
    return site_flops(site, tokens, cell, Writes(), samples=2).module


def _ways_of_a_head(visual: int) -> tuple[Method, ...]:
    """The cheapest first."""
    return Cached(), Arrow(visual // 64), Arrow(visual // 32), Arrow(visual // 16, residual=True)
