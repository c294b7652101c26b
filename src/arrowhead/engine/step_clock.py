"""Whether a transformer's calls are those of one generation, one step after the other: nothing else would tell."""

from dataclasses import dataclass, field

import greenlet

from arrowhead.errors import AlreadyGenerating, PlanMismatch


@dataclass
class StepClock:
    """Where a generation runs, and what its pipeline's scheduler counted at the latest call of the transformer.

    Most schedulers count the steps they make (`step_index`). None: this one does not, or has not made any. `lost` says that a
    call was refused, so that nobody knows which step the next one is.
    """

    counted: int | None = None
    lost: bool = False
    where: greenlet.greenlet = field(default_factory=greenlet.getcurrent)

    def require_same_thread(self, name: str) -> None:
        """Check that a call of the transformer comes from where the generation runs.

        Raises:
            AlreadyGenerating: it comes from another thread or greenlet.
        """
        if greenlet.getcurrent() is not self.where:
            raise AlreadyGenerating(
                f"{name} was called from elsewhere while a generation with a plan runs on it; wanted that generation's calls "
                "alone; let it end first, or give each pipeline a transformer of its own"
            )

    def keep(self, step: int, call: int, counted: int | None) -> None:
        """On to a call of the transformer, the `call`-th of its step: a scheduler moves between steps, and within none.

        Raises:
            PlanMismatch: it does not, so that the call is another one's, or one before it is missing.
        """
        before, self.counted = self.counted, counted
        missing = call > 0 and counted != before
        astray = call == 0 and step > 0 and before is not None and counted != before + 1
        again, self.lost = self.lost, self.lost or missing or astray
        if missing and not again:
            raise PlanMismatch(
                f"got one call of the transformer in step {step}, wanted two in every step, one for each CFG branch; leave out "
                "what ends guidance on its way, such as a callback, or remove the plan"
            )
        if self.lost:
            raise PlanMismatch(
                f"got a call of the transformer that is not the scheduler's for step {step}, wanted those of one generation in "
                "turn; let a generation with this transformer end before the next begins, or remove the plan"
            )
