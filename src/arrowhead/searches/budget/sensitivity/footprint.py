"""The bytes that a calibration holds, in closed form, and settings by which it fits the free memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.memory import SCALE_BYTES, CacheDtype, groups
from arrowhead.searches.budget.config import Extent
from arrowhead.searches.budget.sensitivity.site_history import radii_of


def history_bytes(extent: Extent, sites: Sequence[Site], tokens: Tokens, itemsize: int) -> int:
    """The bytes of a full history of one row of the batch, on whichever device it is."""
    radii, found = len(radii_of(extent, sites, tokens)), 0
    for site in sites:
        own, attends = site.tokens(tokens), site.kind == "self_attention"
        of_attention = own.visual * radii + own.total * len(extent.precisions)
        rows = (own.total + of_attention * attends) * site.sequences(tokens)
        found += rows * site.heads * _bytes_of(site, extent.cache_dtype, itemsize)
    return found * (extent.ages + 1)


def _bytes_of(site: Site, dtype: CacheDtype, itemsize: int) -> int:
    """The bytes of one token of a head."""
    width = site.head_dim
    return width * itemsize if dtype == "native" else width + SCALE_BYTES * groups(width, width)


def gradient_bytes(sites: Iterable[Site], tokens: Tokens, itemsize: int) -> int:
    """The bytes of the gradients at all sites' outputs, of one row of the batch: all are there when products are taken."""
    of_sites = (site.tokens(tokens).total * site.sequences(tokens) * site.heads * site.head_dim for site in sites)
    return sum(of_sites) * itemsize


def block_input_bytes(blocks: Iterable[Site], tokens: Tokens, itemsize: int) -> int:
    """The bytes of each block's input, of one row of the batch, which are kept where blocks run again on the way back."""
    found = 0
    for block in blocks:
        takes_text = block.joint or any(site.joint for site in block.within)  # SD3's last block gives none
        found += (tokens.total if takes_text else tokens.visual) * block.channels
    return found * itemsize


def held_bytes(
    extent: Extent,
    sites: Sequence[Site],
    blocks: Iterable[Site],
    tokens: Tokens,
    rows: int,
    itemsize: int,
    device: torch.device,
) -> int:
    """The bytes that a calibration of so many `rows` of the batch holds on the model's device, see `calibration_bytes`."""
    found = 0
    if extent.cache_device is None or torch.device(extent.cache_device).type == device.type:
        found += history_bytes(extent, sites, tokens, itemsize)
    if extent.gradients:
        found += gradient_bytes(sites, tokens, itemsize)
    if extent.checkpoint:
        found += block_input_bytes(blocks, tokens, itemsize)
    return found * rows


ACTIVATIONS = 24
"""About how many tensors like its input a block's pass keeps for the way back: of FLUX's and DiT's blocks."""


def needed_bytes(
    extent: Extent,
    sites: Sequence[Site],
    blocks: Sequence[Site],
    tokens: Tokens,
    rows: int,
    itemsize: int,
    device: torch.device,
) -> int:
    """`held_bytes`, and about what the activations of a pass take."""
    layers = blocks or [site for site in sites if site.kind == "self_attention"]
    kept = layers[:1] if extent.checkpoint else layers
    activations = ACTIVATIONS * block_input_bytes(kept, tokens, itemsize) * rows * extent.gradients
    return held_bytes(extent, sites, blocks, tokens, rows, itemsize, device) + activations


def smaller(extent: Extent, *, one_by_one: bool, checkpoint: bool, other_device: bool) -> Iterator[Extent]:
    """Settings by which a calibration holds less and less, each with those before it; the flags say what is possible."""
    steps = (one_by_one, {"one_by_one": True}), (checkpoint, {"checkpoint": True}), (True, {"cache_dtype": "int8"})
    for possible, settings in (*steps, (other_device, {"cache_device": "cpu"})):
        if possible:
            extent = replace(extent, **settings)
            yield extent


def free_bytes(device: torch.device) -> int | None:
    """The bytes that are free on a device; None where the platform does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    said = PROC / "meminfo"
    if device.type != "cpu" or not said.exists():
        return None
    lines = (line.split() for line in said.read_text().splitlines())
    available = [int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"]
    return min([*available, *_cgroup_bytes()], default=None)


PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def _cgroup_bytes() -> Iterator[int]:
    """The bytes that each limit on this process's groups leaves, in cgroup v2. Cached files count as free: they can go."""
    groups = PROC / "self/cgroup"
    lines = groups.read_text().splitlines() if groups.exists() else []
    for own in (CGROUPS / line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        for group in (own, *own.parents):
            limit, used, stat = (group / f"memory.{name}" for name in ("max", "current", "stat"))
            if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
                counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
                yield max(0, int(most) - int(used.read_text()) + int(counts.get("inactive_file", 0)))
