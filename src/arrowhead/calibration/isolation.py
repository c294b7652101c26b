"""A pipeline whose run is a search's: it is called by nobody else, shows no bar, and draws what it would have drawn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from arrowhead.errors import AlreadyGenerating, InputsInvalid
from arrowhead.models.custom import CustomModel
from arrowhead.upstream import execution_device, progress_bar_config, restore_progress_bar_config


@contextmanager
def exclusive_call(pipe: Any) -> Iterator[Callable[..., Any]]:
    """Within the block the pipeline is called by what this gives, and by nobody else; a loop of one's own is as it was."""
    own = type(pipe)
    if issubclass(own, CustomModel):
        yield pipe
        return

    def __call__(*_: Any, **__: Any) -> Any:
        raise AlreadyGenerating(
            f"got a call of {own.__name__} while a search runs on it, whose scheduler it would change; wanted the search's own "
            "run alone; let the search end, or close it, first"
        )

    __call__.__wrapped__ = own.__call__  # type: ignore[attr-defined]  # inspect.signature follows it
    pipe.__class__ = type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__, "__doc__": own.__doc__})
    try:
        yield own.__call__.__get__(pipe)
    finally:
        pipe.__class__ = own


@contextmanager
def preserved_rng(pipe: Any, generator: torch.Generator | Sequence[torch.Generator] | None) -> Iterator[None]:
    """No progress bar, and random states, the inputs' generators included, as they were afterwards."""
    own = isinstance(pipe, CustomModel)
    device = next(pipe.transformer.parameters()).device if own else execution_device(pipe)
    with _preserved_random_state(generator, device), nullcontext() if own else _no_progress_bar(pipe):
        yield


@contextmanager
def _preserved_random_state(
    generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> Iterator[None]:
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
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    before = progress_bar_config(pipe)
    pipe.set_progress_bar_config(**(before or {}) | {"disable": True})
    try:
        yield
    finally:
        restore_progress_bar_config(pipe, before)
