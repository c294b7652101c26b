"""How many query–key pairs each kernel computes for a head. Chunks, windows, blocks and tiles are computed whole.

So some pairs are computed and masked. Pairs beyond the end of the sequence, where the last block or tile ends, do not count.
"""

from functools import lru_cache

from arrowhead.kernels import flex
from arrowhead.kernels.call import Call
from arrowhead.kernels.cpu import chunked, windows
from arrowhead.kernels.triton import api
from arrowhead.plans import masks
from arrowhead.plans.cells import Box, Radius
from arrowhead.plans.layout import Tokens

Way = tuple[str, int, int]
"""What the pairs depend on: "windows", "chunks" or a kernel's name, and for "fused" the queries and keys of a tile (else 0)."""


def way_of(kernel: str, call: Call) -> Way:
    """How a kernel computes a call."""
    if kernel == "fused":
        return kernel, *api.tile(call)
    if kernel == "chunked":
        return ("windows" if chunked.uses_windows(call) else "chunks"), 0, 0
    return kernel, 0, 0


@lru_cache(maxsize=2**12)
def computed_pairs(way: Way, tokens: Tokens, radius: Radius | None) -> int:
    """The query–key pairs of a sequence whose scores one head computes, masked ones included."""
    name, queries, keys = way
    if name == "reference" or radius is None or masks.covers(tokens, radius):
        return tokens.total**2
    if isinstance(radius, Box):
        return masks.pairs(tokens, radius)
    if name == "flex":
        return flex.computed_pairs(tokens, radius)
    visual, text = tokens.visual, tokens.text
    if name == "fused":
        band = sum(_in_tiles(start, min(start + queries, visual), visual, radius, keys) for start in range(0, visual, queries))
    elif name == "windows":
        band = _in_windows(visual, radius)
    else:
        band = _in_chunks(0, visual, visual, radius)
    return band + text * tokens.total + visual * text


def _in_chunks(begin: int, end: int, visual: int, radius: int) -> int:
    """Of the queries from `begin` to `end`, in chunks: each meets the keys within the reach of any query of its chunk."""
    length, count = windows.chunk_length(radius), 0
    for start in range(begin, end, length):
        stop = min(start + length, end)
        count += (stop - start) * (min(visual, stop + radius) - max(0, start - radius))
    return count


def _in_windows(visual: int, radius: int) -> int:
    """Of all visual queries: in windows as far as their reach lies within the sequence, in chunks at both ends."""
    length = windows.window_length(radius)
    inner = max(visual - 2 * radius, 0) // length * length
    first, last = (radius, radius + inner) if inner else (0, 0)
    ends = _in_chunks(0, first, visual, radius) + _in_chunks(last, visual, visual, radius)
    return inner * (length + 2 * radius) + ends


def _in_tiles(start: int, stop: int, visual: int, radius: int, keys: int) -> int:
    """Of a block of queries: tiles of keys that overlap its band."""
    low, high = max(start - radius, 0) // keys * keys, min(-(-min(stop + radius, visual) // keys) * keys, visual)
    return (stop - start) * (high - low)
