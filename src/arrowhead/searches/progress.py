"""What searches have in common while they run: a bar over the steps, and a clock that waits for the device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm


@contextmanager
def bar_of_steps(name: str, *, shown: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A bar over the steps of a run, and a function that is told the step that ended and the number of steps."""
    with tqdm(desc=name, unit="step", disable=not shown) as bar:

        def ended(step: int, steps: int | None) -> None:
            bar.total = steps
            bar.update(step + 1 - bar.n)

        yield ended


def clock() -> float:
    """Seconds on a clock, when all work that was given to a device is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
