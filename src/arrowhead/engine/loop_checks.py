"""Checks of a custom model's loop by what the model is called with: the CFG branches, and where generations begin and end."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from arrowhead.errors import InputsInvalid, PlanMismatch
from arrowhead.plans.layout import Branches

Numbers = Mapping[str, float | Tensor]
"""The small numbers among a call's arguments, by name, one of which may be the timestep. On a device a tensor, not read yet."""
OTHER = 0.05
"""Latents are different ones if fewer of their values than this part are equal: some models get their conditions with them."""


def numbers_of(arguments: Mapping[str, Any]) -> Numbers:
    """The numbers among a call's arguments; of a tensor with one number for each sample, the first."""
    return {name: number for name, value in _flat(arguments) if (number := _number(value)) is not None}


def _flat(arguments: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments by name; those within tuples and dicts, such as *args and **kwargs, too."""
    for name, value in arguments.items():
        if isinstance(value, tuple | dict):
            yield from _flat(value if isinstance(value, dict) else dict(enumerate(value)))
        else:
            yield str(name), value


def _number(value: Any) -> float | Tensor | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Tensor) or value.is_meta or value.is_complex() or value.dtype == torch.bool:
        return None
    if value.ndim > 2 or value.numel() == 0 or value.numel() != (len(value) if value.ndim else 1):
        return None
    first = value.detach().flatten()[0]
    return float(first) if first.device.type == "cpu" else first.clone()


class BranchCheck:
    """Compares latents in a generation's first two steps: both CFG branches of an image start from the same latents.

    Which branch comes first cannot be told from them.
    """

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._before: tuple[Tensor, Numbers] | None = None

    def check(self, step: int, call: int, latents: Any, numbers: Numbers) -> None:
        """Check the `call`-th call of a step, with latents (B, …) or a list of B.

        Raises:
            InputsInvalid: the latents contradict the adapter's `cfg`.
        """
        if step > 1 or (batch := _as_batch(latents)) is None:
            return
        before, self._before = self._before, (batch.detach().clone(), numbers)
        if (got := self._contradiction(step, call, batch, numbers, before)) is None:
            return
        order, guided = self._branches.order, self._branches.guided
        if not guided:
            wanted = "without guidance other latents for each image and step"
        elif order == "two_calls":
            wanted = "the same latents in both calls of a step"
        else:
            wanted = "the same latents in both halves of a batch, which are the CFG branches"
        raise InputsInvalid(
            f"got {got}, where the adapter says cfg={order if guided else None!r}; wanted {wanted}; correct cfg of the adapter "
            "(cond_first, uncond_first, two_calls, or None), and search again"
        )

    def _contradiction(
        self, step: int, call: int, batch: Tensor, numbers: Numbers, before: tuple[Tensor, Numbers] | None
    ) -> str | None:
        """What the latents show that the adapter denies, or None."""
        halves = batch.chunk(2) if len(batch) % 2 == 0 else None
        if self._branches.batched:
            return "a batch whose halves have different latents" if halves and _differ(*halves) else None
        if before is None:
            return None
        if self._branches.calls == 2:
            return "two calls of a step with different latents" if call == 1 and _differ(before[0], batch) else None
        if step == 0:
            return None
        if halves and torch.equal(*halves):
            return "a batch whose halves have the same latents in two steps"
        return "two calls with the same latents and numbers" if torch.equal(before[0], batch) and before[1] == numbers else None


def _as_batch(latents: Any) -> Tensor | None:
    """Latents as one batch (B, …); None where they are none of one shape."""
    if isinstance(latents, list) and latents and all(isinstance(each, Tensor) for each in latents):
        latents = torch.stack(latents) if len({each.shape for each in latents}) == 1 else None
    return latents if isinstance(latents, Tensor) and latents.ndim > 1 and not latents.is_meta else None


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two latents are different ones. Latents that are not finite are not compared."""
    if a.shape != b.shape:
        return False
    return bool((a.isfinite().all() & b.isfinite().all()) & ((a == b).float().mean() < OTHER))


class LoopTimes:
    """The numbers that a loop's calls of the model have in one generation, and those that the generation before had.

    The numbers that change from call to call are timesteps. In one generation they move away from the first one. A generation
    that begins starts again. What is on a device is read with the last step, since each read waits for the device.
    """

    def __init__(self) -> None:
        self._noted: list[Numbers] = []
        self._checked = 1
        self._ended: tuple[Numbers, Numbers] | None = None

    def require_start(self, numbers: Numbers, steps: int) -> None:
        """Check the first call of a generation.

        Raises:
            PlanMismatch: the call goes on with the timesteps of the generation before.
        """
        if self._ended is None:
            return
        first, last = self._ended
        moves = _moves(first, last, numbers)
        if moves and all(by * further >= 0 for by, further in moves.values()):
            name = next(iter(moves))
            raise PlanMismatch(
                f"got a call of the model with {name}={float(numbers[name]):g} after the plan's {steps} steps ended at "
                f"{float(last[name]):g}: the loop has more steps; wanted {steps}; search again in this loop, or say "
                "run.step(i) where a step begins"
            )

    def note(self, numbers: Numbers, steps: int) -> None:
        """Note the first call of a step, and check that no other generation began meanwhile.

        Raises:
            PlanMismatch: the timesteps have started again.
        """
        self._noted.append(numbers)
        if len(self._noted) < steps and any(isinstance(number, Tensor) for number in numbers.values()):
            return
        for step in range(max(self._checked, 2), len(self._noted)):
            moves = _moves(self._noted[0], self._noted[step - 1], self._noted[step])
            if moves and all(by * (by + further) <= 0 for by, further in moves.values()):
                name = next(iter(moves))
                raise PlanMismatch(
                    f"got a call of the model with {name}={float(self._noted[step][name]):g}, where the generation began at "
                    f"{float(self._noted[0][name]):g}, after {step} of the plan's {steps} steps: another generation has begun; "
                    "wanted all steps; search again in this loop, or say run.step(i) where a step begins"
                )
        self._checked = len(self._noted)

    def end(self) -> None:
        """The generation has ended with its last step."""
        self._ended = (self._noted[0], self._noted[-1]) if self._noted else None
        self._noted, self._checked = [], 1


def _moves(first: Numbers, last: Numbers, now: Numbers) -> dict[str, tuple[float, float]]:
    """By name, how far the numbers have moved from first to last, and from there to now; without those that have not moved."""
    names = first.keys() & last.keys() & now.keys()
    found = {name: (float(last[name] - first[name]), float(now[name] - last[name])) for name in sorted(names)}
    return {name: move for name, move in found.items() if move[0]}
