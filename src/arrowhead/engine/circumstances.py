"""Carries a plan over to what a generation really runs: its noise levels, its tokens, its scheduler and its guidance."""

from dataclasses import replace
from typing import Any, Literal, get_args

from arrowhead.errors import InputsInvalid, PlanMismatch
from arrowhead.models.model import Model
from arrowhead.plans.cells import Attend
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.plans.resample import Conditions, same_levels

Adaptation = Literal["adapt", "texts", "refuse"]
"""What is done where a generation's circumstances are other ones than the plan's: the plan is carried over, or carried over to
texts of two lengths alone, or refused."""


def require_adaptation(changes: Any) -> Adaptation:
    """Returns a known one.

    Raises:
        InputsInvalid: it is not.
    """
    if changes not in get_args(Adaptation):
        raise InputsInvalid(f"got changes={changes!r}, wanted 'adapt' or 'refuse', or 'texts'")
    found: Adaptation = changes
    return found


def conditions_of(plan: Plan, model: Model, tokens: Tokens) -> Conditions:
    """The conditions of the running generation, in the plan's terms: equal to the plan's where nothing has to be carried over.

    The length of the text is none of them: text is attended in full. `tokens` are those of a call of the transformer.
    """
    old = plan.conditions
    tokens = replace(tokens, text=old.tokens.text, text_first=old.tokens.text_first)
    if old.tokens.grid is None:
        tokens = tokens.flat
    levels = model.levels
    if levels is None:  # a custom model's loop, whose length is known at its end
        return replace(old, tokens=tokens)
    if old.levels is None or same_levels(levels, old.levels):
        levels = old.levels
    return Conditions(model.steps or old.steps, tokens, model.switch, levels)


def carried_over(plan: Plan, conditions: Conditions) -> Plan:
    """The plan under these conditions.

    Raises:
        PlanMismatch: it cannot be carried over to them.
    """
    try:
        return plan.carried_over(conditions)
    except InputsInvalid as error:
        raise PlanMismatch(f"the plan cannot be carried over to this generation: {error}") from error


def without_shared_text(plan: Plan) -> Plan:
    """The plan in which no site that works on the text shares it between the CFG branches, whose texts have other lengths.

    Returns the plan itself where no such site shares.
    """
    rows = tuple(
        tuple(
            replace(cell, share_cfg=False) if isinstance(cell, Attend) and works_on_text(site) else cell
            for site, cell in zip(plan.target.sites, row, strict=True)
        )
        for row in plan.cells
    )
    return plan if rows == plan.cells else replace(plan, cells=rows)


def works_on_text(site: Site) -> bool:
    """Whether a site gives outputs for text tokens, which CFG branches can share where their texts have one length."""
    return site.joint or any(map(works_on_text, site.within))
