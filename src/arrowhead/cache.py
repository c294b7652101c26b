"""What one generation remembers between steps. A run owns a cache, and drops it when the generation ends."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from arrowhead.errors import NotIntercepted
from arrowhead.layout import Branches


@dataclass(frozen=True)
class Entry:
    """A tensor for both CFG branches, or, `conditional_only`, for the conditional one; kept until step `last_reader`."""

    tensor: Tensor
    conditional_only: bool
    last_reader: int


Key = tuple[str, int | None]  # site, and the radius of a residual or None for the module's output


@dataclass
class Cache:
    """Module outputs (B, N, C) and residuals (B, H, V, D) of every site."""

    branches: Branches
    entries: dict[Key, Entry] = field(default_factory=dict)
    held_bytes: int = 0

    def read(self, key: Key, step: int, *, conditional: bool = False) -> Tensor:
        """What was stored, for both branches or for the `conditional` one; freed if no later step reads it.

        Raises:
            NotIntercepted: nothing was.
        """
        entry = self.entries.get(key)
        if entry is None:
            raise NotIntercepted(
                f"{key[0]}: step {step} reads what an earlier step should have stored, but the site did not run there; wanted "
                "every site in every step; remove what skips blocks"
            )
        if entry.last_reader <= step:
            self.drop(key)
        if conditional:
            rows = slice(None) if entry.conditional_only else self.branches.conditional(entry.tensor.shape[0])
            return entry.tensor[rows]
        return both_branches(entry.tensor) if entry.conditional_only else entry.tensor

    def write(self, key: Key, tensor: Tensor, *, conditional_only: bool, last_reader: int) -> None:
        """Store a tensor until step `last_reader` has read it, or until it is overwritten."""
        self.drop(key)
        self.entries[key] = Entry(tensor, conditional_only, last_reader)
        self.held_bytes += tensor.nbytes

    def drop(self, key: Key) -> None:
        """Forget an entry, if there is one."""
        entry = self.entries.pop(key, None)
        self.held_bytes -= entry.tensor.nbytes if entry else 0


def both_branches(half: Tensor) -> Tensor:
    """One branch's rows, serving both: (B/2, …) -> (B, …). Alike for both orders of the branches."""
    return torch.cat([half, half])
