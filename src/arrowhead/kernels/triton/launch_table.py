"""How the fused kernel is launched: a fixed table by architecture, head dim and sequence length. Nothing is tuned at run time.

The entries are chosen by what the compiler makes of them (registers, no spills). They have not been timed on a device.
"""

from dataclasses import dataclass
from typing import Literal

FULL, CACHED = -1, -2
"""What the policy of a full head, or of a cached one, has in place of a radius. A cached head is not computed."""
HEAD_DIMS = {64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
"""For each head dim, the two powers of two that its columns are split into: 72 is 64 + 16 columns, not 128; the rest is 0."""
INT8_TAIL = 32
"""Columns of the second part for heads in int8, the fewest that tensor cores multiply: 72 is 64 + 32 columns."""
UNIT = 8
"""Elements of half precision in 16 bytes. Where all strides are multiples of it, 16 bytes are moved at once."""
INT8_UNIT = 16
"""Elements of int8 in 16 bytes."""
Variant = Literal["pointers", "tma", "specialised"]


@dataclass(frozen=True)
class Config:
    """One way to launch the kernel.

    Attributes:
        queries: rows of queries in a tile.
        keys: rows of keys in a tile.
        warps: warps of a program.
        stages: tiles in flight.
        variant: how tiles are loaded. "pointers" runs from sm_80 on; "tma" (tensor descriptors) and "specialised" (tensor
            descriptors, in warps that do nothing else) run from sm_90 on.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    variant: Variant = "pointers"


SHORT = 2048
"""Up to this number of tokens tiles are small, so that all multiprocessors have work and few masked pairs are computed."""


@dataclass(frozen=True)
class Row:
    """The configurations for one head dim: for short sequences, for long ones, and one that uses fewer registers.

    The last one is for calls that write residuals, with twice as many loops, and for calls with a mask of keys.
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
"""By head dim, for sm_80 and later, and for tensors that descriptors cannot describe. Fits in 99 KB of shared memory (sm_86).

Heads in int8 use the same: their queries and keys are half as large, but their scores are not smaller.
"""
HOPPER = {
    dim: Row(
        short=Config(64, 64, 4, 3, "tma"),
        long=Config(128, 128, 8, 2, "tma"),
        spare=Config(128, 128 if dim < 96 else 64, 8, 2, "tma"),
    )
    for dim in HEAD_DIMS
}
"""By head dim, for sm_90."""
SPECIALISED = {dim: Config(64, 128, 4, 2, "specialised") for dim in HEAD_DIMS}
"""By head dim, for sm_90, but not for calls that write residuals, have a mask or int8: the compiler fails there.

Compiled and tested, but `chosen` does not return these until they have been timed: all tiles are masked, and the compiler does
not split 128 queries between two groups of warps with descriptors.
"""


def chosen(dim: int, tokens: int, capability: tuple[int, int], *, described: bool, spare: bool) -> Config:
    """The configuration for a head dim, a number of tokens and a compute capability.

    `described`: tensor descriptors can describe the tensors. `spare`: the call writes residuals, or has a mask.
    """
    row = (HOPPER if capability[0] == 9 and described else AMPERE)[dim]
    if spare:
        return row.spare
    return row.short if tokens <= SHORT else row.long
