"""Two calls of a transformer, one for each CFG branch, run as if they were one call of a batch [conditional, unconditional].

Each call runs in a greenlet. At every site both greenlets wait until their inputs have been joined to one batch, and its output
is known. So a search judges both branches of a step at once, whether a pipeline brings them in one batch or in two calls.
Inputs that are no batch, because the texts have two lengths, are in `pair_of_lengths`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import greenlet
import torch
from torch import Tensor

from arrowhead.calibration.pair_of_lengths import Lengths, PairOfLengths
from arrowhead.engine.cache import Output, map_output
from arrowhead.engine.site_calls import SiteCall
from arrowhead.errors import NotIntercepted
from arrowhead.plans.layout import Tokens

AtSite = Callable[[SiteCall], Output]
Join = Callable[[SiteCall, SiteCall], SiteCall]


def wait_for_pair(call: SiteCall) -> Output:
    """Hand a site's call to `run_paired`, from within one of the two runs; gives the site's output for this run's rows."""
    return greenlet.getcurrent().parent.switch(call)


def run_paired(runs: Sequence[Callable[[], Any]], at_site: AtSite, join: Join | None = None) -> list[Any]:
    """Run both calls, with `at_site` called once for every site, for both calls of it; gives the two calls' outputs.

    `join` makes one call of two; None joins their inputs to a batch.

    Raises:
        NotIntercepted: the two calls do not pass the same sites.
    """
    lanes = [greenlet.greenlet(run) for run in runs]
    try:
        met = [lane.switch() for lane in lanes]
        while not any(lane.dead for lane in lanes):
            if met[0].site != met[1].site:
                paths = f"{met[0].site.path} and {met[1].site.path}"
                raise NotIntercepted(f"the two calls of a step met at {paths}; wanted one site for both")
            call = (join or _joined)(*met)
            out = at_site(call)
            outs = call.split(out) if isinstance(call, PairOfLengths) else _halves(out)
            met = [lane.switch(own) for lane, own in zip(lanes, outs, strict=True)]
        if not all(lane.dead for lane in lanes):
            raise NotIntercepted("one of the two calls of a step passed more sites than the other; wanted the same ones")
        return met
    finally:
        for lane in lanes:
            if lane and not lane.dead:
                lane.throw(greenlet.GreenletExit)


def join_lengths(tokens: Sequence[Tokens], lengths: dict[str, tuple[Lengths, ...]], at_site: AtSite) -> Join:
    """Joins calls of transformer calls with these tokens, whose texts have two lengths; `lengths` as in `PairOfLengths`."""

    def join(first: SiteCall, second: SiteCall) -> SiteCall:
        site, one, other = first.site, *(first.site.tokens(own) for own in tokens)
        of_first = site, first.module, first.original, first.args, first.kwargs
        return PairOfLengths(*of_first, (first, second), (one, other), lengths, lambda runs: run_paired(runs, at_site, join))

    return join


def _halves(out: Output) -> tuple[Output, Output]:
    return map_output(out, lambda tensor: tensor.chunk(2)[0]), map_output(out, lambda tensor: tensor.chunk(2)[1])


def _joined(first: SiteCall, second: SiteCall) -> SiteCall:
    """The two calls' inputs of a site as one batch, the first call's rows first: (2B, N, C) of (B, N, C) each."""

    def both(a: Any, b: Any) -> Any:
        a, b = _mask_or_all_visible(a, b), _mask_or_all_visible(b, a)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim and a.shape[0] == first.batch:
            return torch.cat([a, b])
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():  # a block's arguments for its attention
            return {name: both(value, b[name]) for name, value in a.items()}
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):  # an IP-Adapter's image prompts
            return [both(*pair) for pair in zip(a, b, strict=True)]
        if not _alike(a, b):
            raise NotIntercepted(
                f"{first.site.path}: the two calls of a step bring arguments that differ and are no batch of tensors; wanted "
                "them alike; leave out what brings them"
            )
        return a

    args = tuple(both(a, b) for a, b in zip(first.args, second.args, strict=True))
    kwargs = {name: both(value, second.kwargs[name]) for name, value in first.kwargs.items()}
    return replace(first, args=args, kwargs=kwargs)


def _mask_or_all_visible(value: Any, other: Any) -> Any:
    """`value`, or a mask that hides nothing where only the other call brings one: Qwen leaves out a mask that hides nothing."""
    return torch.ones_like(other) if value is None and isinstance(other, Tensor) and other.dtype == torch.bool else value


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))
