"""Checks, on one row of a module's first input, that an attention module is what the adapter says, and no whole block."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arrowhead.engine.attention_hook import AttentionCall, attention_handler
from arrowhead.engine.attention_seen import listed, running_module
from arrowhead.engine.site_calls import ForwardSiteCall, SiteCall
from arrowhead.errors import ArrowheadError, NotIntercepted
from arrowhead.upstream import no_dispatch_modes

TOLERANCE = 2e-3
"""Largest relative difference, in float32, between a custom forward's output and the module's own."""
CONTAINED = 0.5
"""A module whose output contains its input has, without its attention, this part of the input or more in it."""
ONE = slice(0, 1)


@torch.no_grad()
def require_described(call: ForwardSiteCall, replaced: bool) -> None:
    """Check an attention module's first call; `replaced`: the adapter gives the forward that is hooked.

    Raises:
        NotIntercepted: the forward that replaces the module's gives something else, or the module is a whole block.
    """
    call = replace(call, args=tuple(map(_detached, call.args)), kwargs={n: _detached(v) for n, v in call.kwargs.items()})
    with no_dispatch_modes():  # no counter of FLOPs counts the checks
        if replaced:
            _require_alike(call)
        _require_no_block(call)


def _require_alike(call: ForwardSiteCall) -> None:
    """Check that a custom forward gives what the module's own gives."""
    wanted = call.native(ONE)
    try:
        got: Any = call.run(lambda attention: attention.native(), ONE)
    except ArrowheadError:
        raise
    except Exception as error:  # a custom forward may fail in any way
        got = error
    if isinstance(wanted, Tensor) and isinstance(got, Tensor) and wanted.shape == got.shape:
        off = float((got - wanted).float().norm() / wanted.float().norm().clamp_min(1e-12))
        if off <= max(TOLERANCE, 8 * torch.finfo(wanted.dtype).eps) or not wanted.isfinite().all():
            return
        found = f"what is off by {off:.1%}"
    else:
        found = f"{_described(got)} where the module gives {_described(wanted)}"
    raise NotIntercepted(
        f"{call.site.path}: the forward given for a {type(call.module).__name__} gives {found}; wanted what the module itself "
        "gives; look at the order of norms and rotary embeddings, at the scale, and at the order of heads in its projection"
    ) from (got if isinstance(got, Exception) else None)


class RowsAlone:
    """Checks, once, that a custom model's module gives the same for some rows of its input as among all rows.

    A module whose arguments do not have a row for each sample, such as texts that are packed into one, does not.
    """

    def __init__(self, unanswered: Callable[[], AbstractContextManager[None]]) -> None:
        """Within `unanswered()` no site within the module is answered by a plan or a search."""
        self._unanswered, self._checked = unanswered, False

    @torch.no_grad()
    def __call__(self, call: SiteCall, rows: slice) -> None:
        """Check it for these rows, the first time.

        Raises:
            NotIntercepted: the module gives something else, or fails.
        """
        if self._checked:
            return
        with no_dispatch_modes(), self._unanswered():
            whole = call.native()
            try:
                part: Any = call.native(rows)
            except ArrowheadError:
                raise
            except Exception as error:  # a module may fail in any way
                part = error
        failed = isinstance(part, Exception)
        if failed or not all(map(_close, _tensors(part), (tensor[rows] for tensor in _tensors(whole)))):
            found = _described(part) if failed else "something else"
            raise NotIntercepted(
                f"{call.site.path}: a {type(call.module).__name__} gives {found} for the rows of one CFG branch alone; wanted "
                "arguments with a row for each sample; search with share_cfg=False, or leave these modules out of the adapter"
            ) from (part if failed else None)
        self._checked = True


def _tensors(out: Any) -> list[Tensor]:
    return [each for each in (out if isinstance(out, tuple) else (out,)) if isinstance(each, Tensor)]


def _close(got: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if got.shape != wanted.shape:
        return False
    off = float((got - wanted).float().norm() / wanted.float().norm().clamp_min(1e-12))
    return off <= max(TOLERANCE, 8 * torch.finfo(wanted.dtype).eps) or not bool(wanted.isfinite().all())


def _require_no_block(call: ForwardSiteCall) -> None:
    """Check that a module's output does not contain its input, which no other step may repeat.

    Where attention gives zeros, an attention module gives the same for every token. What a block gives then still varies from
    token to token as its input does.
    """
    attended: list[str] = []

    def nothing(attention: AttentionCall) -> Tensor:
        attended.append(running_module(call.module) or "")
        return attention.q.new_zeros(*attention.q.shape[:-1], attention.v.shape[-1])

    args, kwargs = call.of_rows(ONE)
    with attention_handler(nothing):
        outputs = call.hooked(*args, **kwargs)
    given = call.rows_of_input(ONE)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not attended or not any(isinstance(out, Tensor) and _contains(out, given) for out in outputs):
        return
    inner = sorted({f"{call.site.path}.{path}" for path in attended if path})
    remedy = (
        f"name {listed(inner)}, where it calls attention"
        if inner
        else "name the attention module within it, or put the attention that its forward computes into a module"
    )
    raise NotIntercepted(
        f"{call.site.path}: got an arrowhead.Attention for a {type(call.module).__name__} whose output contains its input, as "
        f"that of a whole block does; a step that repeats it would repeat the input, too; wanted an attention module; {remedy}"
    )


def _contains(out: Tensor, given: Tensor) -> bool:
    """Whether an output (1, N, C) varies from token to token as the input does."""
    if out.shape != given.shape or out.ndim < 3 or not out.is_floating_point():
        return False
    x, y = (each.float() - each.float().mean(-2, keepdim=True) for each in (given, out))
    return bool((x * y).sum() >= CONTAINED * x.square().sum().clamp_min(1e-12))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _described(out: Any) -> str:
    if isinstance(out, Exception):
        return f"{type(out).__name__} ({out})"[:300]
    return f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
