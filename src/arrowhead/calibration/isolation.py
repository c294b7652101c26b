"""Contexts around a generation that a search makes: no other call, no progress bar, and the same random states afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from arrowhead.errors import AlreadyGenerating, InputsInvalid
from arrowhead.upstream import progress_bar_config, restore_progress_bar_config


@contextmanager
def exclusive_call(pipe: Any) -> Iterator[Callable[..., Any]]:
    """Give the pipeline's call; within the block every other call of the pipeline is refused, with AlreadyGenerating."""
    own = type(pipe)

    def __call__(*_: Any, **__: Any) -> Any:
        raise AlreadyGenerating(
            f"got a call of {own.__name__} while a search runs on it, whose scheduler it would change; wanted the search's own "
            "run alone; let the search end first"
        )

    __call__.__wrapped__ = own.__call__  # type: ignore[attr-defined]  # inspect.signature follows it
    pipe.__class__ = type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__, "__doc__": own.__doc__})
    try:
        yield own.__call__.__get__(pipe)
    finally:
        pipe.__class__ = own


@contextmanager
def preserved_rng(generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device) -> Iterator[None]:
    """Restore, after the block, the states of these generators and of torch's own for the CPU and `device`.

    Raises:
        InputsInvalid: `generator` is neither a generator, nor a list of them, nor None.
    """
    generators = [generator] if isinstance(generator, torch.Generator) else generator or ()
    if not isinstance(generators, Sequence) or not all(isinstance(own, torch.Generator) for own in generators):
        raise InputsInvalid(f"got generator={generator!r:.200}, wanted a torch.Generator, or a list with one for each image")
    states = [g.get_state() for g in generators]
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)
            if on_mps is not None:
                torch.mps.set_rng_state(on_mps)


@contextmanager
def no_progress_bar(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's progress bar within the block; its configuration is then as before."""
    before = progress_bar_config(pipe)
    pipe.set_progress_bar_config(**(before or {}) | {"disable": True})
    try:
        yield
    finally:
        restore_progress_bar_config(pipe, before)
