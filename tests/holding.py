"""What caches hold under a plan, by simulation: entries are stored, read and freed one by one, call by call, site by site."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from independent import WHOLE, for_one_branch, made, readers, reads

from arrowhead.plans.cells import Reuse
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.plan import Plan


@dataclass
class Held:
    """The most bytes at any moment of each step, those at its end, and the kinds of entries at the fullest moment."""

    peaks: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    greatest: Counter[str] = field(default_factory=Counter)


def rows_of(site: Site, what: tuple[Any, ...], tokens: Tokens) -> list[tuple[int, int]]:
    """The tokens of one sample's entry and the numbers in each: of the image, and of the text."""
    visual, text = tokens.visual, tokens.text if site.joint else 0
    if what in WHOLE:
        width, of_text = site.heads * site.head_dim, site.text_channels or site.channels
        of_image = width if site.projects_out == "none" else site.channels
        return [(visual, of_image), (text, of_text if site.projects_out == "all" else width)]
    return [(visual if what[0] == "residual" else visual + text, site.head_dim)]


def size_of(site: Site, what: tuple[Any, ...], tokens: Tokens, itemsize: int, dtype: str) -> int:
    """Bytes of one sample. In 8 bits: one byte a number, and four a scale, of which a token has one a head, or one."""
    found = 0
    for count, numbers in rows_of(site, what, tokens):
        scales = numbers / site.head_dim
        own = numbers * itemsize if dtype == "native" else numbers + 4 * (int(scales) if scales.is_integer() else 1)
        found += count * own
    return found


def simulated_bytes(plan: Plan, images: int, itemsize: int, dtype: str = "native") -> Held:
    """`held` has (call, site, name): (tensor, bytes), so that a tensor which serves both calls of a step counts once.

    In 8 bits, an output that is handed over is another tensor than the stored one.
    """
    held: dict[Any, tuple[Any, int]] = {}
    found, greatest = Held(), -1

    def moment() -> int:
        nonlocal greatest
        tensors = dict(held.values())
        total = sum(tensors.values())
        if total > greatest:
            greatest, found.greatest = total, Counter()
            for (*_, (what, *_)), size in tensors.items():
                found.greatest["heads" if what == "head" else what] += size
        return total

    for step, cells in enumerate(plan.cells):
        moments = [moment()]
        for call in range(plan.calls):
            for row, (site, cell) in enumerate(zip(plan.target.sites, cells, strict=True)):
                column, shared = tuple(cells[row] for cells in plan.cells), getattr(cell, "share_cfg", False)
                held.pop((call, row, "handed over"), None)
                for what in reads(column, step, site.heads):
                    if not readers(column, step, what, site.heads):
                        held.pop((call, row, what), None)
                stored = {} if isinstance(cell, Reuse) or (shared and call) else made(column, step, site.heads)
                for what, who in stored.items():
                    only = for_one_branch(what, who)
                    samples = 1 if shared or only else plan.samples // plan.calls
                    entry = (step, call, row, what), size_of(site, what, plan.tokens, itemsize, dtype) * samples * images
                    if not (call and only):
                        held[call, row, what] = entry
                    if plan.calls == 2 and shared and not only:
                        held[1, row, what] = entry
                if plan.calls == 2 and shared and not call:
                    tensor = (step, call, row, ("output",) if dtype == "native" and ("output",) in stored else ("handed over",))
                    size = size_of(site, ("output",), plan.tokens, itemsize, "native") * images
                    held[1, row, "handed over"] = tensor, size
                moments.append(moment())
        found.peaks.append(max(moments))
        found.ends.append(moments[-1])
    assert not held
    return found
