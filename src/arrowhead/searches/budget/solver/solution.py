"""A table and a budget solved: the plan, and what it says of itself."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import relevant_tokens
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import ASKED, Budget
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.allocation import Allocation, within_cost, within_memory
from arrowhead.searches.budget.solver.costs import FlopCosts
from arrowhead.searches.budget.solver.problem import Problem
from arrowhead.searches.settings import require_a


def solve(table: Table, budget: Budget) -> Plan:
    """The plan for a budget of FLOPs, from a table alone; nothing is run.

    Raises:
        InputsInvalid: these are no table and budget, the budget is an error or a speedup, which the pipeline has to show, or
            nothing is as cheap.
    """
    require_a(Table, table, "table")
    require_a(Budget, budget, "budget")
    name, value = budget.asked
    if name in ("error", "speedup"):
        raise InputsInvalid(
            f"got a budget of {name}={value}, wanted FLOPs: a table alone knows no other; call arrowhead.search"
        )
    problem = budget.problem(table)
    return plan_of(problem, budget, within(problem, budget))


def sweep(table: Table, budgets: Sequence[Budget]) -> list[Plan]:
    """A plan for each budget of FLOPs, from one table. Raises what `solve` raises."""
    if not isinstance(budgets, Sequence):
        raise InputsInvalid(f"got budgets of type {type(budgets).__name__}, wanted a list of them; solve takes a single one")
    return [solve(table, budget) for budget in budgets]


def within(problem: Problem, budget: Budget) -> Allocation:
    """What is found within the cost, and within the bytes if they are bounded."""
    if budget.cache_bytes is None:
        return within_cost(problem, budget.fraction)
    table = problem.table

    def peak(found: Allocation) -> int:
        plan = plan_of(problem, budget, found)
        return max(plan.cache_bytes(table.images, table.itemsize))

    found, refused = [], None
    for each in (problem, problem.without_lines()) if problem.choices.slopes else (problem,):
        try:
            found.append(within_memory(each, budget.fraction, peak, budget.cache_bytes))
        except InputsInvalid as error:
            refused = error
    if not found:
        assert refused is not None
        raise refused
    return min(found, key=lambda allocation: allocation.damage)


def plan_of(problem: Problem, budget: Budget, found: Allocation) -> Plan:
    """What was found, as a plan for what the table was made on."""
    table, (name, value) = problem.table, budget.asked
    settings = {key: setting for key, setting in asdict(budget).items() if key not in ASKED}
    settings["granularity"] = problem.granularity
    search = {"strategy": "budget", "asked": f"{name} = {value}", **settings, **dict(table.about.get("search", {}))}
    if isinstance(problem.costs, FlopCosts):
        search[f"{problem.costs.measure}_flops"] = short(found.cost + problem.fixed)
    search["predicted_error"] = short(found.damage**0.5)
    columns = {site: column for site, column in zip(problem.sites, found.columns, strict=True) if column is not None}
    rows = tuple(zip(*columns.values(), strict=True))
    about = {**table.about, "search": search}
    target, tokens = replace(table.target, sites=tuple(columns)), relevant_tokens(table.tokens, columns)
    return Plan(rows, target, tokens, table.branches.guided, about, table.branches.calls, table.switch)


def with_provenance(plan: Plan, **facts: Any) -> Plan:
    """The plan, saying more of how it was found."""
    return replace(plan, about={**plan.about, "search": {**plan.about["search"], **facts}})


def short(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")
