"""How files are read that anybody may have written: as data, and no more of them than something real could hold."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from arrowhead.plans.layout import Site, Tokens

BYTES = 2**24
"""Of JSON: 16 MiB, where a plan for CogVideoX, 42 sites of 48 heads that all do something else in 50 steps, has 2."""
STEPS = 2**12
"""Denoising steps: ADM has 4000, and what a plan keeps is found in time that grows with their square."""
SITES = 2**11
"""Sites, with those within blocks: four in each of HunyuanVideo's 60 blocks are 240."""
HEADS_IN_STEPS = 2**21
"""Heads of all sites, times steps: 1000 steps of FLUX are 1.4 million."""
TOKENS = 2**26
"""Of a sequence, text and visual: a minute of video in 720p has less than two million."""
SIZE = 2**20
"""Heads of a site, their width, channels."""
WEIGHTS = 2**40
"""That a token is multiplied with at one site."""
SAID = 2000
"""Letters of an error that are passed on: one for each of a million cells helps nobody."""


def content(path: str | Path) -> bytes:
    """What a text file has.

    Raises:
        ValueError: it is a folder, or longer than `BYTES`.
        OSError: it is not there, or may not be read.
    """
    try:
        with Path(path).open("rb") as file:
            read = file.read(BYTES + 1)
    except IsADirectoryError as error:
        raise ValueError("got a folder") from error
    require_length(read)
    return read


def require_length(text: str | bytes) -> None:
    """Raises ValueError for more than `BYTES`."""
    if len(text) > BYTES:
        raise ValueError(f"got more than {BYTES} bytes of JSON, wanted {BYTES} at most")


def parsed(text: str | bytes) -> Any:
    """A JSON document, of which nothing is ambiguous: no key twice, and no number that JSON does not have.

    Raises:
        ValueError: it is something else, or too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("got values within values too deep, wanted less") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"got {twice!r} twice, wanted each key once")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"got {word}, wanted a finite number")


def _finite(word: str) -> float:
    value = float(word)
    return _no_number(word) if value in (float("inf"), float("-inf")) else value


def require_sizes(steps: int, tokens: Tokens, sites: Iterable[Site]) -> None:
    """Check that work with them ends, and fits into memory.

    Raises:
        ValueError: one is larger than anything real.
    """
    every = list(_all(sites, SITES))
    largest = {
        "steps": (steps, STEPS),
        "sites": (len(every), SITES),
        "heads times steps": (steps * sum(site.heads for site in every), HEADS_IN_STEPS),
        "tokens": (tokens.total, TOKENS),
        "heads, their width or channels of a site": (
            max((max(site.heads, site.head_dim, site.channels, site.text_channels) for site in every), default=0),
            SIZE,
        ),
        "weights of a site": (max((max(site.weights, site.text_weights) for site in every), default=0), WEIGHTS),
    }
    for name, (value, most) in largest.items():
        if value > most:
            raise ValueError(f"got {name}: {value}, wanted {most} at most")


def _all(sites: Iterable[Site], left: int) -> Iterator[Site]:
    """Sites with those within them, one more than `left` at most."""
    pending = [*sites]
    while pending and left >= 0:
        site = pending.pop()
        pending += site.within
        left -= 1
        yield site


def short(error: Exception) -> str:
    """What an error says, or the beginning of it."""
    said = str(error)
    return said if len(said) <= SAID else f"{said[:SAID]} …"
