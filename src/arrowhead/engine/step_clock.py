"""Whether the calls of a transformer are those of one generation, one step after another: no call says which step it is."""

from dataclasses import dataclass, field
from typing import Any

import greenlet

from arrowhead.errors import AlreadyGenerating, PlanMismatch


@dataclass
class StepClock:
    """The thread a generation runs in, and the scheduler's count at the latest call of the transformer.

    Most schedulers count the steps they make (`step_index`). `counted` is None where this one does not, or has made none.
    `out_of_order`: a call was refused, so which step the next one belongs to cannot be told. `timesteps` are the scheduler's,
    as the running denoising loop found them: a scheduler makes new ones where a loop begins.
    """

    counted: int | None = None
    out_of_order: bool = False
    timesteps: Any = None
    thread: greenlet.greenlet = field(default_factory=greenlet.getcurrent)

    @property
    def is_here(self) -> bool:
        """Whether this code runs in the thread, and greenlet, of the generation."""
        return greenlet.getcurrent() is self.thread

    def require_same_thread(self, name: str) -> None:
        """Check that a call of the transformer comes from the thread, and greenlet, of the generation.

        Raises:
            AlreadyGenerating: it comes from another one.
        """
        if not self.is_here:
            raise AlreadyGenerating(
                f"{name} was called from elsewhere while a generation with a plan runs on it; wanted that generation's calls "
                "alone; let it end first, or give each pipeline a transformer of its own"
            )

    def begin_loop(self, timesteps: Any) -> None:
        """Begin a denoising loop over the scheduler's timesteps; None where there is no scheduler."""
        self.counted, self.timesteps = None, timesteps

    def check(self, step: int, call: int, counted: int | None) -> None:
        """Check the `call`-th call of a step: a scheduler moves by one between two steps, and not within a step.

        Raises:
            PlanMismatch: it moved otherwise, so the call belongs to another generation, or a call is missing before it.
        """
        before, self.counted = self.counted, counted
        missing = call > 0 and counted != before
        moved_otherwise = call == 0 and step > 0 and before is not None and counted != before + 1
        refused_before, self.out_of_order = self.out_of_order, self.out_of_order or missing or moved_otherwise
        if missing and not refused_before:
            raise PlanMismatch(
                f"got one call of the transformer in step {step}, wanted two in every step, one for each CFG branch; leave out "
                "what ends guidance on its way, such as a callback, or remove the plan"
            )
        if self.out_of_order:
            raise PlanMismatch(
                f"got a call of the transformer that is not the scheduler's for step {step}, wanted those of one generation in "
                "turn; let a generation with this transformer end before the next begins, or remove the plan"
            )
