"""Reads files that anybody may have written: as data alone, and no larger than anything real.

Each limit is far above what real models need.
"""

import io
import json
import math
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.plans.foreign_text import visible
from arrowhead.plans.layout import Site, Tokens

MAX_BYTES = 2**24
"""Bytes of JSON. A plan for CogVideoX with different cells in all 42 sites of 48 heads and 50 steps has 2 MiB."""
MAX_STEPS = 2**12
"""Denoising steps. ADM has 4000; the time to find lifetimes grows with the square of the steps."""
MAX_SITES = 2**11
"""Sites, with those within blocks. HunyuanVideo has 240: four in each of 60 blocks."""
MAX_HEADS_TIMES_STEPS = 2**21
"""Heads of all sites, times steps. 1000 steps of FLUX have 1.4 million."""
MAX_TOKENS = 2**26
"""Tokens of a sequence, text and visual. A minute of video in 720p has less than two million."""
MAX_SIZE = 2**20
"""A site's heads, head_dim, channels or text_channels."""
MAX_WEIGHTS = 2**40
"""A site's weights or text_weights."""
MAX_MESSAGE = 2000
"""Characters of an error that are passed on. A file with a million wrong cells would give a million lines."""


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """The content of a file of at most `most` bytes, or `MAX_BYTES`.

    Raises:
        ValueError: the path is a folder, or the file is longer.
        OSError: the file is not there, or may not be read.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read((most or MAX_BYTES) + 1)
    except IsADirectoryError as error:
        raise ValueError("got a folder") from error
    require_length(content, most)
    return content


def require_length(text: str | bytes, most: int | None = None) -> None:
    """Check that a text has at most `most` bytes, or `MAX_BYTES`.

    Raises:
        ValueError: the text is longer.
    """
    most = most or MAX_BYTES
    if len(text) > most:
        raise ValueError(f"got more than {most} bytes, wanted {most} at most")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document in which nothing is ambiguous: no key twice, and no number that JSON does not have.

    Raises:
        ValueError: the text is something else, or values are nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("got values within values too deep, wanted less") from error


def parse_npy(content: bytes, name: str) -> NDArray[Any]:
    """The array of an npy file. The length of the file is compared with its header before an array is allocated.

    Raises:
        ValueError: the content is something else, or holds objects, which would have to be unpickled.
    """
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"got {name} in another version of npy, wanted 1.0")
    try:
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream)
    except (RecursionError, MemoryError, SyntaxError, tokenize.TokenError, TypeError, UnicodeError) as error:
        raise ValueError(f"got an invalid header of {name} ({type(error).__name__})") from error
    values = stream.read()
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0 or dtype.itemsize * math.prod(shape) != len(values):
        raise ValueError(f"got {len(values)} bytes of {name}, wanted {dtype} of shape {shape}")
    return np.frombuffer(values, dtype).reshape(shape, order="F" if columns_first else "C").copy()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"got {twice!r} twice, wanted each key once")
    return found


def _refuse_number(word: str) -> Any:
    raise ValueError(f"got {word}, wanted a finite number")


def _finite(word: str) -> float:
    value = float(word)
    return _refuse_number(word) if value in (float("inf"), float("-inf")) else value


def require_sizes(steps: int, tokens: Tokens, sites: Iterable[Site]) -> None:
    """Check that steps, tokens and sites are no larger than anything real, so that work with them ends and fits into memory.

    Raises:
        ValueError: one of the sizes is above its limit.
    """
    every = list(_with_inner_sites(sites))
    sizes = [size for site in every for size in (site.heads, site.head_dim, site.channels, site.text_channels)]
    weights = [size for site in every for size in (site.weights, site.text_weights)]
    largest = {
        "steps": (steps, MAX_STEPS),
        "sites": (len(every), MAX_SITES),
        "heads times steps": (steps * sum(site.heads for site in every), MAX_HEADS_TIMES_STEPS),
        "tokens": (tokens.total, MAX_TOKENS),
        "heads, their width or channels of a site": (max(sizes, default=0), MAX_SIZE),
        "weights of a site": (max(weights, default=0), MAX_WEIGHTS),
    }
    for name, (value, most) in largest.items():
        if value > most:
            raise ValueError(f"got {name}: {value}, wanted {most} at most")


def _with_inner_sites(sites: Iterable[Site]) -> Iterator[Site]:
    """Sites with those within them; no more than one above the limit, since a small file can nest very many."""
    pending, left = [*sites], MAX_SITES
    while pending and left >= 0:
        site = pending.pop()
        pending += site.within
        left -= 1
        yield site


def shortened(error: Exception) -> str:
    """The message of an error, or the beginning of a very long one. Control characters, which a file may hold, are escaped."""
    message = "\n".join(map(visible, str(error).split("\n")))
    return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} …"
