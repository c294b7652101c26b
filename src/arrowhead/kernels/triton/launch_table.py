"""How the fused kernel is launched: a shipped table, by architecture, head dim and length. Nothing is tuned at first use.

Chosen by reasoning from what the compiler makes of each entry (registers, no spills), not yet by the clock on a device.
"""

from dataclasses import dataclass
from typing import Literal

FULL, CACHED = -1, -2
"""What a head's policy says in place of a radius."""
HEAD_DIMS = {64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
"""Head dim: the powers of two that its columns are taken in, so that 72 costs 80 and not 128. What is beyond is zero."""
INT8_TAIL = 32
"""Columns that the second part of a head in int8 is taken in, the least that are multiplied at once: 72 costs 96."""
INT8_UNIT = 16
"""Elements in 16 bytes of int8."""
Variant = Literal["pointers", "tma", "specialised"]


@dataclass(frozen=True)
class Config:
    """One way to launch: rows of queries and of keys in a tile, warps, tiles in flight, how keys and values are fetched.

    `pointers` run from sm_80 on, `tma` (tensor descriptors) and `specialised` (the same, by warps of their own) from sm_90 on.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    variant: Variant = "pointers"


SHORT = 2048
"""Tokens up to which blocks of queries are small: programs for every multiprocessor, and little computed beside a band."""


@dataclass(frozen=True)
class Row:
    """Configurations for one head dim: for short sequences, for long ones, and one that spares registers.

    Residuals to write need them, for twice as many loops, and so do masks of keys.
    """

    short: Config
    long: Config
    spare: Config


AMPERE = {
    64: Row(Config(64, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 3)),
    72: Row(Config(64, 32, 4, 3), Config(128, 32, 8, 3), Config(128, 32, 8, 3)),
    80: Row(Config(64, 32, 4, 3), Config(128, 32, 8, 3), Config(128, 32, 8, 3)),
    96: Row(Config(64, 32, 4, 3), Config(128, 32, 8, 3), Config(128, 32, 8, 2)),
    128: Row(Config(64, 32, 4, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
}
"""By head dim: for sm_80 and all that follow, and wherever descriptors do not do. Fits in 99 KB of shared memory (sm_86).

Heads in int8 take the same: their queries and keys are half as large, their scores no smaller.
"""
HOPPER = {
    dim: Row(
        short=Config(64, 64, 4, 3, "tma"),
        long=Config(128, 128, 8, 2, "tma"),
        spare=Config(128, 128 if dim < 96 else 64, 8, 2, "tma"),
    )
    for dim in HEAD_DIMS
}
"""The same for sm_90."""
SPECIALISED = {dim: Config(64, 128, 4, 2, "specialised") for dim in HEAD_DIMS}
"""For sm_90 too, without residuals to write, a mask, or int8, at which the compiler fails. Compiled and tested, but chosen by
nothing until a clock has said so: its tiles are all masked, and 128 queries in two groups of warps are more than the compiler
does with descriptors."""


def chosen(dim: int, tokens: int, capability: tuple[int, int], *, described: bool, spare: bool) -> Config:
    """The configuration for a head dim, a length and a compute capability.

    `described`: descriptors can be made of the tensors. `spare`: there are residuals to write, or a mask.
    """
    row = (HOPPER if capability[0] == 9 and described else AMPERE)[dim]
    if spare:
        return row.spare
    return row.short if tokens <= SHORT else row.long
