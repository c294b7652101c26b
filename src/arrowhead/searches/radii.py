"""The radii that a search may choose from: in tokens of the sequence, or boxes in the grid."""

from collections.abc import Iterable
from typing import Any

from arrowhead.errors import InputsInvalid
from arrowhead.plans import masks
from arrowhead.plans.cells import Box, Radius, radius_sort_key
from arrowhead.plans.layout import Site, Tokens


def require_radii(radii: Any) -> None:
    """Check a setting of radii: None, or a tuple of numbers of tokens and of boxes.

    Raises:
        InputsInvalid: the setting is something else.
    """
    if not isinstance(radii, tuple | list | None):
        raise InputsInvalid(f"got radii={radii!r}, wanted a tuple of numbers of tokens or of boxes, or None")
    if not all(isinstance(radius, Box) or (type(radius) is int and radius >= 0) for radius in radii or ()):
        raise InputsInvalid(
            f"got radii={radii!r}, wanted numbers of tokens, 0 or more, or boxes such as Box(rows=4, columns=4)"
        )


def fewest(sites: Iterable[Site], tokens: Tokens) -> Tokens:
    """The tokens of the self-attention with the shortest sequence: radii for all sites have to make sense there."""
    of_sites = [site.tokens(tokens) for site in sites if site.kind == "self_attention"]
    return min(of_sites, key=lambda own: own.visual, default=tokens)


def narrower(radii: Iterable[Radius], tokens: Tokens) -> tuple[Radius, ...]:
    """The radii, each once, widest first, without bands that would cover everything.

    Raises:
        InputsInvalid: there are boxes, and the tokens' grid is not known.
    """
    wanted = set(radii)
    if tokens.grid is None and (boxes := [str(radius) for radius in wanted if isinstance(radius, Box)]):
        raise InputsInvalid(
            f"got boxes of {', '.join(sorted(boxes))} for a model whose calls do not tell its grid of tokens; wanted radii in "
            "tokens"
        )
    found = [radius for radius in wanted if not masks.covers(tokens, radius)]
    return tuple(sorted(found, key=lambda radius: (masks.pairs(tokens, radius), radius_sort_key(radius)), reverse=True))
