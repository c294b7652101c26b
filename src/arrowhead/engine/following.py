"""What a generation does of the plan: the plan itself, or the plan carried over to what the generation really runs."""

from collections.abc import Callable, Hashable

from arrowhead.engine.circumstances import Adaptation, carried_over, conditions_of, without_shared_text
from arrowhead.engine.generation import Generation
from arrowhead.models.model import Model, target_of
from arrowhead.plans.foreign_text import visible
from arrowhead.plans.layout import Branches, Tokens
from arrowhead.plans.plan import Plan

Say = Callable[[str, str, bool], None]
"""Is told what was carried over, the remedy, and whether it is said for the first time."""
REMEDY = "search again there for a plan that fits, or refuse such calls by changes='refuse'"
KEPT = 64
"""How many carried-over plans are kept."""


class Following:
    """Carries a run's plan over to each of its generations.

    `plan` is what the running, or the latest, generation does. Plans that were carried over are kept, and what was said is
    remembered. `model` has the pipeline whose call runs: the one that was given a plan, or a copy of it.
    """

    def __init__(self, plan: Plan, model: Model, changes: Adaptation, say: Say) -> None:
        self.plan = self._whole = plan
        self.model, self._adapts, self._say = model, changes == "adapt", say
        self._carried: dict[Hashable, Plan] = {}
        self._key: Hashable = ()  # of `plan` among those that are kept
        self._said: set[str] = set()

    def begin(self, tokens: Tokens, branches: Branches) -> None:
        """Carry the plan over to a generation whose first call of the transformer has these tokens.

        Raises:
            PlanMismatch: it cannot be carried over, or, by `changes="refuse"`, would have to be.
        """
        whole, model = self._whole, self.model
        self.plan, self._key = whole, ()
        if not self._adapts:
            whole.require_call(model.steps, tokens, branches.calls, model.switch, model.levels)
            return
        old, new = whole.conditions, conditions_of(whole, model, tokens)
        if new != old:
            self._follow(new, lambda: carried_over(whole, new))
        found = [f"{name} {change}" for name, change in old.changes(self.plan.conditions).items()]
        found += whole.target.scheduler_differences(target_of(model))
        if found:
            left, before = (f"{plan.flops().module:.0%}" for plan in (self.plan, whole))
            self._tell(f"{'; '.join(found)}; it leaves {left} of the modules' FLOPs, where the plan leaves {before}")

    def advance(self, generation: Generation, tokens: Tokens, latents: int, whole: Branches, counted: int | None) -> None:
        """On to the next call of the transformer, which has these tokens and so many latents in its batch.

        `whole` are the branches that the generation began with, `counted` was the scheduler's count at the call before.

        Raises:
            PlanMismatch: the call has other tokens than such a call before.
        """
        if self._adapts:
            self._follow_guidance(generation, latents, whole, counted)
        new = generation.advance(tokens)
        if new and generation.other_texts:
            before = self.plan
            self._follow("texts", lambda: without_shared_text(before))
            if self.plan.cells != before.cells:
                generation.forget(generation.call)  # what the first call handed over
                self._tell("prompt and negative prompt have other lengths, so attention that sees the text is not shared")

    def guidance_ends(self, step: int) -> None:
        """Say that guidance ends before a step."""
        self._tell(f"guidance ends before step {step}, and the conditional branch goes on")

    def _follow_guidance(self, generation: Generation, latents: int, whole: Branches, counted: int | None) -> None:
        """Follow guidance that ends or begins with the call that comes.

        Where the branches have a call each, it shows by whether the scheduler made a step since the call before; else by the
        batch.
        """
        now, before, count = generation.branches, generation.latents, self.model.scheduler_step
        call_missing = now.calls == 2 and generation.call == 0 and count is not None and count == (counted or 0) + 1
        call_added = whole.calls == 2 and now.calls == 1 and count is not None and count == counted
        if call_missing or (now.batched and before == 2 * latents):
            self.guidance_ends(generation.step + (not call_missing))
            generation.end_guidance()
        elif call_added or (whole.batched and not now.batched and 2 * (before or 0) == latents):
            begun, plan = generation.step + 1, self.plan
            self._tell(f"guidance begins {'in' if call_added else 'with'} step {begun - call_added}; what it misses is full")
            self._follow(begun, lambda: plan.begun_at(begun))
            generation.begin_guidance(whole)

    def _follow(self, change: Hashable, carry: Callable[[], Plan]) -> None:
        """Follow the plan that `carry` gives, which is kept for this change of the plan followed so far."""
        self._key = self._key, change
        if self._key not in self._carried:
            if len(self._carried) == KEPT:
                self._carried.clear()
            self._carried[self._key] = carry()
        self.plan = self._carried[self._key]

    def _tell(self, what: str) -> None:
        what = f"the plan was carried over: {visible(what)}"
        self._say(what, REMEDY, what not in self._said)
        self._said.add(what)
