"""What one generation stores between steps. A generation owns its caches, and ends with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from arrowhead.engine.cache_encoding import NATIVE, CacheEncoding, EncodedTensor, own_storage
from arrowhead.errors import NotIntercepted
from arrowhead.kernels.head_index import select_heads
from arrowhead.plans.cells import Radius
from arrowhead.plans.layout import Branches
from arrowhead.plans.lifetimes import EntryKind

Output = Tensor | tuple[Tensor | None, ...]
"""The output of a site's module: (B, N, C), or a pair of such tensors for image and text, None in place of no text."""
EncodedOutput = EncodedTensor | tuple[EncodedTensor | None, ...]
"""An output as it is stored."""


class Key(NamedTuple):
    """What an entry holds of a site: its module's output, the output's change per step, outputs of heads, or their residuals.

    A residual belongs to one radius. An output that is `handed over` is read by the second call of the transformer in a step.
    """

    site: str
    what: EntryKind = "output"
    radius: Radius | None = None


@dataclass(frozen=True)
class Entry:
    """Values for both CFG branches, or, `conditional_only`, for the conditional one; kept until step `last_reader`.

    `heads` are those that the value's second dimension holds; None for all, and for what has no heads. `made` is the step that
    a module's output is of.
    """

    value: EncodedOutput
    conditional_only: bool
    last_reader: int
    heads: tuple[int, ...] | None = None
    made: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are stored."""
        parts = self.value if isinstance(self.value, tuple) else (self.value,)
        return tuple(tensor for part in parts if part is not None for tensor in part.tensors)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def unchanged(self) -> Output | None:
        """The value itself, where every tensor is stored unchanged on its device; else None."""
        parts = self.value if isinstance(self.value, tuple) else (self.value,)
        if not all(part is None or part.unchanged for part in parts):
            return None
        return decode_output(self.value)

    def without(self, heads: Sequence[int]) -> "Entry | None":
        """The entry for the other heads; None when there are none."""
        assert isinstance(self.value, EncodedTensor)
        held = self.heads or tuple(range(self.value.values.shape[1]))
        if set(held).isdisjoint(heads):
            return self
        others = [head for head in held if head not in heads]
        if not others:
            return None
        return replace(self, value=self.value.heads(tuple(map(held.index, others))), heads=tuple(others))


@dataclass
class Cache:
    """Module outputs (B, N, C) and their slopes, head outputs (B, h, N, D) and residuals (B, h, V, D) of every site.

    Where the branches come in two calls, each call has a cache of its own, and no entry is for one branch of several.
    """

    branches: Branches
    entries: dict[Key, list[Entry]] = field(default_factory=dict)
    held_bytes: int = 0

    def __post_init__(self) -> None:
        self._batched = self.branches.batched  # asked for in every pass

    def read(self, key: Key, step: int, *, conditional: bool = False) -> Output:
        """A module's output, for both branches or for the conditional one; freed if no later step reads it.

        Raises:
            NotIntercepted: nothing was stored.
        """
        (entry,) = self._stored(key, step)
        if entry.last_reader <= step:
            self.drop(key)
        return self._branch(entry, conditional=conditional)

    def age(self, key: Key, step: int) -> int:
        """The number of steps since a module's output was stored. Raises what `read` raises."""
        (entry,) = self._stored(key, step)
        return step - entry.made

    def read_heads(self, key: Key, heads: Sequence[int], count: int, step: int, *, conditional: bool = False) -> Tensor:
        """Stored tensors of these heads, (B, len(heads), ·, D), of a site with `count` heads; freed as `read` does.

        The result may share memory with the cache.

        Raises:
            NotIntercepted: nothing was stored for one of them.
        """
        entries = self._stored(key, step)
        which, places, missing = _places_in_entries(tuple(entry.heads for entry in entries), tuple(heads), count)
        if missing:
            raise NotIntercepted(f"{key.site}: step {step} reads {key.what} of heads {missing}, which were not stored")
        tensors = [self._tensor(entries[number], conditional) for number in which]
        self._free(key, step)
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)
        return select_heads(whole, places)

    def write(self, key: Key, entry: Entry) -> None:
        """Store an entry until step `last_reader` has read it, or until it is overwritten; other heads' entries stay."""
        if entry.heads is None:
            self.drop(key)
        else:
            trimmed = (other.without(entry.heads) for other in self.entries.get(key, []))
            self._replace(key, [other for other in trimmed if other is not None])
        self.entries.setdefault(key, []).append(entry)
        self.held_bytes += entry.nbytes

    def of_conditional(self) -> "Cache":
        """The conditional branch's part of the cache, for a generation whose guidance has ended."""
        cache = Cache(self.branches.unguided)
        for key, entries in self.entries.items():
            for entry in entries:
                whole = self._batched and not entry.conditional_only
                value = _conditional_rows(entry.value, self.branches) if whole else entry.value
                cache.write(key, replace(entry, value=value, conditional_only=False))
        return cache

    def drop(self, key: Key) -> None:
        """Remove all entries of a key."""
        self._replace(key, [])

    def expire(self, site: str, step: int) -> None:
        """Remove the entries of a site that no step after `step` reads."""
        for key in [key for key in self.entries if key.site == site]:
            self._free(key, step)

    def _stored(self, key: Key, step: int) -> list[Entry]:
        entries = self.entries.get(key)
        if not entries:
            raise NotIntercepted(
                f"{key.site}: step {step} reads what an earlier step should have stored, but the site did not run there; "
                "wanted every site in every step; remove what skips blocks"
            )
        return entries

    def _free(self, key: Key, step: int) -> None:
        if any(entry.last_reader <= step for entry in self.entries[key]):
            self._replace(key, [entry for entry in self.entries[key] if entry.last_reader > step])

    def _replace(self, key: Key, entries: list[Entry]) -> None:
        before = self.entries.pop(key, [])
        self.held_bytes += sum(entry.nbytes for entry in entries) - sum(entry.nbytes for entry in before)
        if entries:
            self.entries[key] = entries

    def _tensor(self, entry: Entry, conditional: bool) -> Tensor:
        value = self._branch(entry, conditional=conditional)
        assert isinstance(value, Tensor)
        return value

    def _branch(self, entry: Entry, *, conditional: bool) -> Output:
        if not self._batched or conditional == entry.conditional_only:
            return decode_output(entry.value) if (value := entry.unchanged) is None else value
        if not conditional:
            return both_branches(decode_output(entry.value))
        return decode_output(entry.value, self.branches)


@lru_cache(maxsize=2**14)  # a plan head by head has others for every site and step
def _places_in_entries(
    held: tuple[tuple[int, ...] | None, ...], heads: tuple[int, ...], count: int
) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """Which entries hold some of these heads, each head's place in these entries one after the other, and heads in none."""
    every, which, place_of, length = tuple(range(count)), [], dict[int, int](), 0
    for number, own in enumerate(own or every for own in held):
        if not set(own).isdisjoint(heads):
            which.append(number)
            place_of |= {head: length + place for place, head in enumerate(own)}
            length += len(own)
    missing = [head for head in heads if head not in place_of]
    return tuple(which), tuple(place_of[head] for head in heads if head in place_of), missing


def held_bytes(caches: Sequence[Cache]) -> int:
    """The bytes that the caches hold; a tensor that both hold counts once."""
    if len(caches) == 1:
        return caches[0].held_bytes
    entries = (entry for own in caches for stored in own.entries.values() for entry in stored)
    return sum({id(tensor): tensor.nbytes for entry in entries for tensor in entry.tensors}.values())


def encode_output(value: Output, head_dim: int, encoding: CacheEncoding = NATIVE) -> EncodedOutput:
    """A value as it is stored, for a site whose heads have `head_dim` channels."""
    if isinstance(value, tuple):
        return tuple(None if tensor is None else encoding.stored(tensor, head_dim) for tensor in value)
    return encoding.stored(value, head_dim)


def decode_output(value: EncodedOutput, half: Branches | None = None) -> Output:
    """The value that was stored; with `half`, the rows of its conditional branch."""
    if isinstance(value, tuple):
        return tuple(None if part is None else _decode(part, half) for part in value)
    return _decode(value, half)


def _conditional_rows(value: EncodedOutput, branches: Branches) -> EncodedOutput:
    """The conditional branch's rows of a stored value."""

    def half(part: EncodedTensor) -> EncodedTensor:
        return part.rows(branches.conditional(part.values.shape[0]))

    if isinstance(value, tuple):
        return tuple(None if part is None else half(part) for part in value)
    return half(value)


def _decode(part: EncodedTensor, half: Branches | None) -> Tensor:
    return part.read() if half is None else part.rows(half.conditional(part.values.shape[0])).read()


def map_output(value: Output, change: Callable[[Tensor], Tensor]) -> Output:
    """An output with `change` applied to each tensor."""
    return tuple(t if t is None else change(t) for t in value) if isinstance(value, tuple) else change(value)


def add_scaled(value: Output, other: Output, weight: float) -> Output:
    """`value` + weight · `other`, for outputs of the same form."""
    if isinstance(value, tuple):
        return tuple(
            [None if a is None or b is None else torch.add(a, b, alpha=weight) for a, b in zip(value, other, strict=True)]
        )
    assert isinstance(other, Tensor)
    return torch.add(value, other, alpha=weight)


def compact_output(value: Output) -> Output:
    """An output that keeps no larger tensor alive: parts of larger tensors are copied."""
    return map_output(value, own_storage)


def both_branches(half: Output) -> Output:
    """One branch's rows for both branches: (B/2, …) -> (B, …). The order of the branches does not matter."""
    return map_output(half, lambda tensor: torch.cat([tensor, tensor]))
