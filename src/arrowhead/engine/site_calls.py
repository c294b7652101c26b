"""One call of a site's module: how to run it, also for some rows or some heads only, and what of its output can be stored."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import greenlet
import torch
from torch import Tensor

from arrowhead.engine.attention_hook import (
    AttentionCall,
    AttentionHandler,
    NativeAttention,
    attention_handler,
    batch_calls,
    replaced_attention,
)
from arrowhead.engine.attention_seen import running_module
from arrowhead.engine.cache import Output, add_scaled
from arrowhead.engine.head_projection import ProjectedHeads
from arrowhead.errors import NotIntercepted
from arrowhead.models.image_prompts import has_ip_adapter
from arrowhead.plans.layout import Site


@dataclass(slots=True)  # not frozen: one is made in every pass
class SiteCall(ABC):
    """One call of a site's module."""

    site: Site
    module: Any
    original: Callable[..., Output]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def batch(self) -> int:
        """Rows of the module's input (B, N, C)."""
        return self._hidden_states.shape[0]

    @abstractmethod
    def run(self, answer: AttentionHandler, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:
        """Run the module on `rows` of its input: (rows, N, C)."""

    def native(self, rows: slice | None = None) -> Output:
        """The module's output without any change."""
        args, kwargs = self.of_rows(rows)
        return self.original(*args, **kwargs)

    def storable(self, out: Output, rows: slice | None = None) -> Output:  # noqa: ARG002
        """The part of an output for `rows` that other steps, or the other branch, can use: all of it, except of a block."""
        return out

    def restore(self, stored: Output) -> Output:
        """The output of this call, from what `storable` gave in another step, or for one branch."""
        return stored

    def rows_of_input(self, rows: slice) -> Tensor:
        """These rows of the module's input, (rows, N, C)."""
        return self._hidden_states[rows]

    @property
    def _hidden_states(self) -> Tensor:
        if "hidden_states" in self.kwargs:
            return self.kwargs["hidden_states"]
        return self.args[self._first] if len(self.args) > self._first else next(iter(self.kwargs.values()))

    _first: ClassVar[int] = 0
    """The place of the input among the arguments."""

    def of_rows(self, rows: slice | None) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of the call for these rows, positional and by name."""
        if rows is None:
            return self.args, self.kwargs
        batch = self.batch
        args = tuple(_part(value, rows, batch) for value in self.args)
        return args, {name: _part(value, rows, batch) for name, value in self.kwargs.items()}


def _part(value: Any, rows: slice, batch: int) -> Any:
    """These rows of a tensor that has the batch's; of a tuple or list, the same of its tensors, such as rotary embeddings.

    Of a dictionary, such as a block's attention arguments, the same of its values.
    """
    if isinstance(value, dict):
        return {name: _part(item, rows, batch) for name, item in value.items()}
    if isinstance(value, tuple | list):  # tensors of (N, C) or (N, H, C) are for all samples
        return type(value)(_part(item, rows, batch) if isinstance(item, Tensor) and item.ndim > 2 else item for item in value)
    return value[rows] if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch else value


@dataclass(slots=True)
class ModuleCall(SiteCall):
    """One call of a module without attention; `original` is its forward."""

    def run(self, answer: AttentionHandler, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:  # noqa: ARG002
        """Run the module on `rows` of its input. No attention is asked for, and there are no heads to choose."""
        args, kwargs = self.of_rows(rows)
        return self.original(*args, **kwargs)


@dataclass(slots=True)
class BlockCall(ModuleCall):
    """One call of a block, which gives (text, image) or the image alone. What is stored is what it adds to its input.

    `parameters` are the names of the forward's parameters, the first of which takes the image's tokens.
    """

    parameters: Sequence[str]

    def storable(self, out: Output, rows: slice | None = None) -> Output:
        """What the block added to its input."""
        return add_scaled(out, self._input(out, rows), -1)

    def restore(self, stored: Output) -> Output:
        """The block's input, with this added."""
        visual = self._argument(self.parameters[0], None)
        if isinstance(stored, Tensor):
            return visual + stored
        text, image = stored
        assert image is not None
        return None if text is None else self._argument("encoder_hidden_states", None) + text, visual + image

    def _input(self, like: Output, rows: slice | None) -> Output:
        """The image's tokens, and the text's where `like` has them."""
        visual = self._argument(self.parameters[0], rows)
        if isinstance(like, Tensor):
            return visual
        return (None if like[0] is None else self._argument("encoder_hidden_states", rows)), visual

    def _argument(self, name: str, rows: slice | None) -> Tensor:
        value = self.kwargs[name] if name in self.kwargs else self.args[self.parameters.index(name)]
        return value if rows is None else _part(value, rows, self.batch)


@dataclass(slots=True)
class CustomModuleCall(ModuleCall):
    """One call of a custom model's block or cross-attention, whose arguments may be of any form.

    `rows_alone` is asked before the module runs on some rows of its input.
    """

    rows_alone: Callable[[SiteCall, slice], None]

    def run(self, answer: AttentionHandler, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:
        """Run the module on `rows` of its input.

        Raises:
            NotIntercepted: it gives something else for rows alone.
        """
        if rows is not None:
            self.rows_alone(self, rows)
        return ModuleCall.run(self, answer, rows, heads)


@dataclass(slots=True)
class CustomBlockCall(CustomModuleCall):
    """One call of a custom model's block. What is stored is what its outputs add to the arguments `continued`.

    `parameters` are the names of the forward's parameters.
    """

    parameters: Sequence[str]
    continued: Sequence[str | int]

    def storable(self, out: Output, rows: slice | None = None) -> Output:
        """What the block added to its inputs."""
        return add_scaled(out, self._inputs(out, rows), -1)

    def restore(self, stored: Output) -> Output:
        """The block's inputs, with this added."""
        return add_scaled(stored, self._inputs(stored, None), 1)

    def _inputs(self, like: Output, rows: slice | None) -> Output:
        """The inputs that outputs of this form continue.

        Raises:
            NotIntercepted: the block gives something else than the adapter says, or is called without such an argument.
        """
        outs = like if isinstance(like, tuple) else (like,)
        found = [self._argument(name) for name in self.continued]
        if isinstance(like, Tensor | tuple) and len(outs) == len(found):
            pairs = [
                (out, each if rows is None else _part(each, rows, self.batch)) for out, each in zip(outs, found, strict=True)
            ]
            if all(out is None or _alike(out, each) for out, each in pairs):
                return tuple(each for _, each in pairs) if isinstance(like, tuple) else pairs[0][1]
        got = ", ".join(f"{tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__ for out in outs)
        raise NotIntercepted(
            f"{self.site.path}: got {got} from a {type(self.module).__name__}, wanted an output like each of the arguments "
            f"{', '.join(map(str, self.continued))}; correct `inputs` of arrowhead.Block, or leave these blocks out"
        )

    def _argument(self, name: str | int) -> Any:
        place = name if isinstance(name, int) else self.parameters.index(name) if name in self.parameters else len(self.args)
        named = name if isinstance(name, str) else self.parameters[name] if name < len(self.parameters) else ""
        if named in self.kwargs:
            return self.kwargs[named]
        return self.args[place] if place < len(self.args) else None


def _alike(out: Any, given: Any) -> bool:
    return isinstance(out, Tensor) and isinstance(given, Tensor) and out.shape == given.shape


@dataclass(slots=True)
class AttentionSiteCall(SiteCall):
    """One call of an attention processor; the module is its first argument."""

    _first: ClassVar[int] = 1
    _wanted: ClassVar[str] = "a processor that does, such as diffusers' AttnProcessor2_0"

    def run(self, answer: AttentionHandler, rows: slice | None = None, heads: Sequence[int] | None = None) -> Output:
        """Run the module on `rows` of its input, its attention computed by `answer`: (rows, N, C).

        With `heads`, Q, K and V of these heads alone are projected; `answer` gives the output of all heads nevertheless. Where
        the module calls attention for each sample, `answer` is asked once, for all samples, padded and masked.

        Raises:
            NotIntercepted: the processor computed attention in a way that is not hooked.
        """
        if self.site.by_sample:
            return self._by_sample(answer, range(self.batch)[rows or slice(None)])
        args, kwargs = self.of_rows(rows)
        if heads is not None:
            args = (ProjectedHeads(args[0], heads), *args[1:])
        handler = _AttentionOnce(self, answer, None if heads is None else args[0])
        with attention_handler(handler):
            out = self._attend(args, kwargs)
        if not handler.reached:
            raise self._never_attends()
        return out

    def _never_attends(self) -> NotIntercepted:
        said = "did not call F.scaled_dot_product_attention or dispatch_attention_fn"
        if (replaced := replaced_attention()) is not None:
            said = f"attended out of sight, as F.scaled_dot_product_attention is replaced by {replaced}; put torch's back"
        return NotIntercepted(f"{self.site.path}: {self._processor} {said}; wanted {self._wanted}")

    def attends_twice(self) -> NotIntercepted:
        """The error of a processor that calls attention more than once."""
        return NotIntercepted(
            f"{self.site.path}: {self._processor} computes attention twice; wanted a processor that does once, or diffusers' "
            "own for IP-Adapters; put one of these in its place, or remove the plan"
        )

    def _attend(self, args: Any, kwargs: Any) -> Output:
        return self.original(*args, **kwargs)

    def native(self, rows: slice | None = None) -> Output:
        """The module's output bit for bit. Raises what `run` raises, though a call of attention for each sample is no error."""
        args, kwargs = self.of_rows(rows)
        handler = NativeAttention()
        with attention_handler(handler):
            out = self.original(*args, **kwargs)
        if handler.calls == 0:
            raise self._never_attends()
        if handler.calls > 1 and not (self.site.by_sample or has_ip_adapter(self.module)):
            raise self.attends_twice()
        return out

    def _by_sample(self, answer: AttentionHandler, rows: range) -> Output:
        """Run each row in a greenlet until it asks for attention; `answer` gets all rows as one batch, padded to one length.

        Rows one after another would not do: a search chooses one cell from the errors of the whole batch, and the caches hold
        entries of whole batches.
        """

        def lane(row: int) -> Output:
            args, kwargs = self.of_rows(slice(row, row + 1))
            with attention_handler(greenlet.getcurrent().parent.switch):
                return self.original(*args, **kwargs)

        lanes = [greenlet.greenlet(partial(lane, row)) for row in rows]
        try:
            asked = [lane.switch() for lane in lanes]
            if not all(isinstance(call, AttentionCall) for call in asked):
                raise NotIntercepted(
                    f"{self.site.path}: {self._processor} did not call attention for a sample; wanted one call"
                )
            attended = answer(batch_calls(asked, self._hidden_states.shape[1] + self.kwargs["encoder_hidden_states"].shape[1]))
            parts = zip(lanes, attended.chunk(len(lanes)), asked, strict=True)
            outs = [lane.switch(part[:, :, : call.q.shape[2]]) for lane, part, call in parts]
            if not all(lane.dead for lane in lanes):
                raise NotIntercepted(
                    f"{self.site.path}: {self._processor} called attention twice for a sample; wanted one call"
                )
        finally:
            for begun in filter(None, lanes):  # and not at their end
                begun.throw(greenlet.GreenletExit)
        return tuple(map(torch.cat, zip(*outs, strict=True))) if isinstance(outs[0], tuple) else torch.cat(outs)

    @property
    def _processor(self) -> str:
        return type(self.module.processor).__name__


class _AttentionOnce:
    """An attention handler for one call of attention, after which the processor sees the whole module again.

    Further calls are an IP-Adapter's, and run as they are.
    """

    __slots__ = ("_answer", "_call", "_module", "reached")

    def __init__(self, call: AttentionSiteCall, answer: AttentionHandler, module: ProjectedHeads | None) -> None:
        self.reached = False
        self._call, self._answer, self._module = call, answer, module

    def __call__(self, attention: AttentionCall) -> Tensor:
        if self.reached:
            if has_ip_adapter(self._call.module):
                return attention.native()
            raise self._call.attends_twice()
        self.reached = True
        attended = self._answer(attention)
        if self._module is not None:
            self._module.attended()
        return attended


@dataclass(slots=True)
class ForwardSiteCall(AttentionSiteCall):
    """One call of an attention module without a processor. `original` is its forward, `hooked` that with hooked attention."""

    hooked: Callable[..., Output]

    _first: ClassVar[int] = 0
    _wanted: ClassVar[str] = "a module that does; give arrowhead.Attention a forward that calls its `attend`"

    def native(self, rows: slice | None = None) -> Output:
        """Bit for bit, though `hooked` may multiply in another order."""
        return SiteCall.native(self, rows)

    def attends_twice(self) -> NotIntercepted:
        """The error of a module that calls attention more than once, as a whole block does."""
        where = running_module(self.module)
        return NotIntercepted(
            f"{self.site.path}: a {self._processor} calls attention twice"
            f"{f', the second time in {self.site.path}.{where}' if where else ''}; wanted a module that calls it once; name "
            "the attention modules within it, each of them"
        )

    def _attend(self, args: Any, kwargs: Any) -> Output:
        return self.hooked(*args, **kwargs)

    @property
    def _processor(self) -> str:
        return type(self.module).__name__


@dataclass(slots=True)
class FunctionSiteCall(ForwardSiteCall):
    """One call of an attention function in a module's code. `original` is the function, `hooked` that with hooked attention."""

    _wanted: ClassVar[str] = "a function that does; where it is the attention itself, say the layout of arrowhead.AttentionIn"

    def attends_twice(self) -> NotIntercepted:
        """The error of a function that calls attention more than once, or that its module calls more than once."""
        return NotIntercepted(
            f"{self.site.path}: {self._processor} is called, or calls attention, twice; wanted attention once in each call of "
            "the module; name modules that attend once, or leave these out of the adapter"
        )

    @property
    def _processor(self) -> str:
        return f"{self.site.path.rpartition('.')[2]} in a {type(self.module).__name__}"
