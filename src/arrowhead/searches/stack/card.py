"""The card of a repository on the Hub that holds a profile."""

from arrowhead.plans.card import Card
from arrowhead.searches.budget.validation import FEEDBACKS
from arrowhead.searches.stack.api import cost, predicted_error
from arrowhead.searches.stack.profile import Profile
from arrowhead.searches.stack.schedule import schedules

SHOWN = (0.7, 0.55, 0.4, 0.3, 0.2, 0.15)
"""Budgets of a card's table: parts of the transformer's FLOPs."""


def card_of(profile: Profile, name: str) -> Card:
    """The card: what each of several budgets would cost, as predicted, and what was watched."""
    target, found = profile.target, schedules(profile, FEEDBACKS[0])
    rows = [["transformer_flops", "computed steps", "FLOPs left", "times faster, predicted", "error, predicted"]]
    for allowed in SHOWN:
        within = [each for each in found.values() if cost(profile, "transformer_flops", each) <= allowed]
        if within:
            best = min(within, key=lambda each: each.error)
            left, seconds = (cost(profile, of, best) for of in ("transformer_flops", "speedup"))
            error = predicted_error(profile, best)
            rows.append([f"{allowed:g}", f"{best.computed}", f"{left:.1%}", f"{1 / seconds:.2f}", f"{error:.3g}"])
    return Card(
        f"A profile of {target.transformer}: {profile.steps} steps",
        "A profile is what one watched generation showed of a diffusion transformer. A plan for any budget follows from it: "
        "which steps compute all blocks, and how the others are extrapolated.",
        [
            f"ah.speedup(pipe, 2.0, profile={name!r})  # pipe: a pipeline of diffusers",
            "",
            f"profile = ah.Profile.from_pretrained({name!r})",
            "plan = ah.solve(profile, ah.Budget(transformer_flops=0.4))",
        ],
        {
            "transformer": target.transformer,
            "scheduler": target.scheduler,
            "steps": profile.steps,
            "visual tokens": profile.tokens.visual,
            "guidance": "yes" if profile.branches.guided else "no",
        },
        profile.about,
        {"Budgets": rows},
    )
