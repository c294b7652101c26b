"""Radii that a search may choose from: in tokens of the sequence, or boxes in the grid."""

from collections.abc import Iterable
from typing import Any

from arrowhead.errors import InputsInvalid
from arrowhead.plans import masks
from arrowhead.plans.cells import Box, Radius, radius_sort_key
from arrowhead.plans.layout import Site, Tokens


def require_radii(radii: Any) -> None:
    """Check a setting of radii.

    Raises:
        InputsInvalid: it is not None, nor a tuple of numbers of tokens and of boxes.
    """
    if not isinstance(radii, tuple | list | None):
        raise InputsInvalid(f"got radii={radii!r}, wanted a tuple of numbers of tokens or of boxes, or None")
    if not all(isinstance(radius, Box) or (type(radius) is int and radius >= 0) for radius in radii or ()):
        raise InputsInvalid(
            f"got radii={radii!r}, wanted numbers of tokens, 0 or more, or boxes such as Box(rows=4, columns=4)"
        )


def fewest(sites: Iterable[Site], tokens: Tokens) -> Tokens:
    """What a sequence has at that self-attention which has the fewest: radii for all sites have to make sense there."""
    of_sites = [site.tokens(tokens) for site in sites if site.kind == "self_attention"]
    return min(of_sites, key=lambda own: own.visual, default=tokens)


def narrower(radii: Iterable[Radius], tokens: Tokens) -> tuple[Radius, ...]:
    """Each once, widest first; bands that would cover everything are left out.

    Raises:
        InputsInvalid: there are boxes, and nobody knows the tokens' grid.
    """
    wanted = set(radii)
    if tokens.grid is None and (boxes := [str(radius) for radius in wanted if isinstance(radius, Box)]):
        raise InputsInvalid(
            f"got boxes of {', '.join(sorted(boxes))} for a model whose calls do not tell its grid of tokens; wanted radii in "
            "tokens"
        )
    found = [radius for radius in wanted if not masks.covers(tokens, radius)]
    return tuple(sorted(found, key=lambda radius: (masks.pairs(tokens, radius), radius_sort_key(radius)), reverse=True))
