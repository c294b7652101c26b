"""Changes around a generation that a search makes: no other call, no progress bar, and the same random states afterwards."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from arrowhead.engine.changes import Changes
from arrowhead.errors import AlreadyGenerating, InputsInvalid
from arrowhead.upstream import progress_bar_config, progress_bars, restore_progress_bar_config


def exclusive_call(pipe: Any, changes: Changes) -> Callable[..., Any]:
    """Returns the pipeline's call; until the changes are undone every other call of the pipeline is refused.

    Raises:
        AlreadyGenerating: another search runs on the pipeline.
    """
    own = type(pipe)

    def __call__(*_: Any, **__: Any) -> Any:
        raise AlreadyGenerating(
            f"got a call of {own.__name__} while a search runs on it, whose scheduler it would change; wanted the search's own "
            "run alone; let the search end first"
        )

    __call__.__wrapped__ = own.__call__  # type: ignore[attr-defined]  # inspect.signature follows it
    members = {"__call__": __call__, "__module__": own.__module__, "__doc__": own.__doc__}
    searched = type(own.__name__, (own,), members)

    def restore() -> None:
        if type(pipe) is searched:
            pipe.__class__ = own

    if not changes.claim(pipe, "_arrowhead_search", changes):
        raise AlreadyGenerating(
            f"got a search on a {own.__name__} while another one runs on it; wanted one at a time; let that end first"
        )
    changes.record(restore)
    pipe.__class__ = searched
    return own.__call__.__get__(pipe)


def preserve_rng(generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device, changes: Changes) -> None:
    """Restore the states of these generators and of torch's own for the CPU and `device` when the changes are undone.

    Raises:
        InputsInvalid: `generator` is neither a generator, nor a list of them, nor None.
    """
    generators = [generator] if isinstance(generator, torch.Generator) else generator or ()
    if not isinstance(generators, Sequence) or not all(isinstance(own, torch.Generator) for own in generators):
        raise InputsInvalid(f"got generator={generator!r:.200}, wanted a torch.Generator, or a list with one for each image")
    for own in generators:
        changes.record(own.set_state, own.get_state())
    changes.record(torch.set_rng_state, torch.get_rng_state())
    if device.type == "cuda":
        changes.record(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
    if device.type == "mps":
        changes.record(torch.mps.set_rng_state, torch.mps.get_rng_state())


def hide_progress_bar(pipe: Any, changes: Changes) -> None:
    """Hide the pipeline's progress bar; its configuration is as before when the changes are undone."""
    for shown in progress_bars(pipe):
        before = progress_bar_config(shown)
        changes.record(restore_progress_bar_config, shown, before)
        shown.set_progress_bar_config(**(before or {}) | {"disable": True})
