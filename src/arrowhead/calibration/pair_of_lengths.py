"""A site's calls in the two runs of a step whose texts have two lengths, seen as one call of both CFG branches.

Inputs of two lengths are no batch, and not every model takes a mask for text. So the module runs for each call, and what a
search sees is joined: attention, with the shorter text padded and masked, and outputs, with zeros for the padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import greenlet
import torch
from torch import Tensor

from arrowhead.engine.attention_hook import AttentionCall, AttentionHandler
from arrowhead.engine.cache import Output, both_branches, map_output
from arrowhead.engine.site_calls import SiteCall
from arrowhead.plans.layout import Tokens

Lengths = tuple[int, int]
"""The tokens of a tensor in the first call and in the second one."""


@dataclass(slots=True)
class PairOfLengths(SiteCall):
    """Two calls of a site as one. The rows are the first call's, then the second's.

    Tensors have the tokens of the longer text: zeros follow the shorter one. The other fields are the first call's.

    Attributes:
        calls: both.
        tokens: of one sequence of the site, in each call.
        lengths: by path, those of each tensor of a site's output: they tell which tensors hold text. Filled by what runs, for
            the outputs that later steps repeat.
        run_both: runs both calls; sites within a block meet in pairs.
    """

    calls: tuple[SiteCall, SiteCall]
    tokens: tuple[Tokens, Tokens]
    lengths: dict[str, tuple[Lengths, ...]]
    run_both: Callable[[Sequence[Callable[[], Any]]], Sequence[Any]]

    @property
    def batch(self) -> int:
        """The rows of both calls."""
        return sum(call.batch for call in self.calls)

    def run(self, answer: AttentionHandler, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:
        """Run the module for each call; `answer` is asked once, for both. `rows` are all, or those of the first call."""
        if self.site.kind != "self_attention":
            return self.native(rows)
        if rows is not None and not self._apart:
            return self.calls[0].run(answer, None, heads)
        lanes = [greenlet.greenlet(partial(_until_attention, call, heads)) for call in self.calls]
        try:
            attended = answer(self._one_attention([lane.switch() for lane in lanes])).chunk(2)  # (B, H, N, D) each
            outs = [lane.switch(self._unpadded(part, 2, i)) for i, (lane, part) in enumerate(zip(lanes, attended, strict=True))]
        finally:
            for begun in filter(None, lanes):  # and not at their end
                begun.throw(greenlet.GreenletExit)
        return self._joined(outs, rows)

    def native(self, rows: slice | None = None) -> Output:
        """What the module gives for each call, or, of `rows`, for the first one."""
        if rows is not None and not self._apart and self.site.kind != "block":
            return self.calls[0].native()
        return self._joined(self.run_both([call.native for call in self.calls]), rows)

    def storable(self, out: Output, rows: slice | None = None) -> Output:
        """As each call says."""
        if self.site.kind != "block":
            return out
        outs = self.split(out if rows is None else both_branches(out))
        return self._joined([call.storable(own) for call, own in zip(self.calls, outs, strict=True)], rows)

    def restore(self, stored: Output) -> Output:
        """As each call says."""
        if self.site.kind != "block":
            return stored
        return self._joined([call.restore(own) for call, own in zip(self.calls, self.split(stored), strict=True)])

    def split(self, out: Output) -> list[Output]:
        """The output of each call, without padding."""
        parts, lengths = out if isinstance(out, tuple) else (out,), self.lengths[self.site.path]

        def of_call(number: int) -> Output:
            own = [
                None if part is None else self._unpadded(part.chunk(2)[number], 1, number, of_part)
                for part, of_part in zip(parts, lengths, strict=True)
            ]
            alone: Any = tuple(own) if isinstance(out, tuple) else own[0]
            return alone

        return [of_call(number) for number in range(2)]

    @property
    def _apart(self) -> bool:
        """Whether the site works on texts of two lengths."""
        return self.tokens[0] != self.tokens[1]

    def _joined(self, outs: Sequence[Output], rows: slice | None = None) -> Output:
        """One output for those of both calls; with `rows`, the part of it that is the first call's."""
        pairs = [*zip(*(out if isinstance(out, tuple) else (out,) for out in outs), strict=True)]
        lengths = [(0, 0) if a is None or b is None else (a.shape[1], b.shape[1]) for a, b in pairs]
        self.lengths[self.site.path] = tuple(lengths)
        found = [
            None if a is None or b is None else torch.cat([self._padded(a, 1, 0, own), self._padded(b, 1, 1, own)])
            for (a, b), own in zip(pairs, lengths, strict=True)
        ]
        joined: Any = tuple(found) if isinstance(outs[0], tuple) else found[0]
        return joined if rows is None else map_output(joined, lambda tensor: tensor.chunk(2)[0])

    def _one_attention(self, asked: Sequence[AttentionCall]) -> AttentionCall:
        """Both calls of attention as one, padded and masked."""

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([self._padded(part, 2, number) for number, part in enumerate(parts)])  # (B, H, n, D) each

        q, k, v = (joined([getattr(call, name) for call in asked]) for name in "qkv")
        shown = [torch.ones(len(call.k), 1, 1, call.k.shape[2], dtype=torch.bool, device=call.k.device) for call in asked]
        mask = padding = None
        if self._apart or any(call.mask is not None for call in asked):
            mask = self._one_mask([_mask(call, own) for call, own in zip(asked, shown, strict=True)])
        if self._apart:
            padding = ~torch.cat([self._padded(own, 3, number)[:, 0, 0] for number, own in enumerate(shown)])  # (2B, N)
        return AttentionCall(
            q,
            k,
            v,
            asked[0].scale,
            mask,
            any(call.causal for call in asked),
            lambda: joined([call.native() for call in asked]),
            padding,
        )

    def _one_mask(self, masks: Sequence[Tensor]) -> Tensor:
        """The masks (B, H or 1, n or 1, n) of both calls as one, in which no query sees padding."""
        if any(mask.dtype != torch.bool for mask in masks):
            added = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
            masks = [mask if mask.dtype != torch.bool else _as_added(mask, added) for mask in masks]
        hidden = False if masks[0].dtype == torch.bool else -torch.inf
        masks = [self._padded(mask, 3, number, value=hidden) for number, mask in enumerate(masks)]
        masks = [mask if mask.shape[2] == 1 else self._padded(mask, 2, i, value=hidden) for i, mask in enumerate(masks)]
        heads, queries = (max(mask.shape[axis] for mask in masks) for axis in (1, 2))
        return torch.cat([mask.expand(-1, heads, queries, -1) for mask in masks])

    def _padded(self, tensor: Tensor, axis: int, number: int, lengths: Lengths = (0, 1), value: float = 0.0) -> Tensor:
        """A call's tensor with as many text tokens as the longer text has; as it is, where both calls' `lengths` are equal."""
        missing = self._missing(number, lengths)
        if not missing:
            return tensor
        length = tensor.shape[axis]
        before, after = torch.split(tensor, [end := self._end_of_text(number, length), length - end], axis)
        padding = tensor.new_full([missing if i == axis % tensor.ndim else n for i, n in enumerate(tensor.shape)], value)
        return torch.cat([before, padding, after], axis)

    def _unpadded(self, tensor: Tensor, axis: int, number: int, lengths: Lengths = (0, 1)) -> Tensor:
        """The tensor without what `_padded` adds."""
        missing = self._missing(number, lengths)
        if not missing:
            return tensor
        length = tensor.shape[axis] - missing
        before, _, after = torch.split(tensor, [end := self._end_of_text(number, length), missing, length - end], axis)
        return torch.cat([before, after], axis)

    def _missing(self, number: int, lengths: Lengths) -> int:
        """How many text tokens the other call has more."""
        return max(0, self.tokens[1 - number].text - self.tokens[number].text) if lengths[0] != lengths[1] else 0

    def _end_of_text(self, number: int, length: int) -> int:
        """Where the text ends in a call's tensor of so many tokens, which holds text alone or text and image."""
        return self.tokens[number].text if self.tokens[number].text_first else length


def _until_attention(call: SiteCall, heads: Sequence[int] | None) -> Output:
    """Run a call in a greenlet whose parent answers its attention."""
    answer: AttentionHandler = greenlet.getcurrent().parent.switch
    return call.run(answer, None, heads)


def _mask(call: AttentionCall, shown: Tensor) -> Tensor:
    """The mask of a call, (B, H or 1, n or 1, n); `shown` shows every key."""
    if call.mask is None:
        return shown
    mask = call.mask[(None,) * (4 - call.mask.ndim)]
    return mask.expand(len(shown), -1, -1, shown.shape[3])


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as one that is added to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
