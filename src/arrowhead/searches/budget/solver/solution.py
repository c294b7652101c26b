"""Plans from a sensitivity table and a budget, without the model."""

from dataclasses import asdict, replace
from typing import Any

from arrowhead.errors import InputsInvalid
from arrowhead.plans.layout import relevant_tokens
from arrowhead.plans.plan import Plan
from arrowhead.searches.budget.config import ASKED, Budget
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.budget.solver.allocation import Allocation, within_cost, within_memory
from arrowhead.searches.budget.solver.costs import FlopCosts
from arrowhead.searches.budget.solver.problem import Problem, problem_of
from arrowhead.searches.settings import require_a


def solve(table: Table, budget: Budget) -> Plan:
    """Find the plan for a budget of FLOPs from a table alone. The model is not run.

    Args:
        table: from `arrowhead.calibrate`, or loaded with `Table.load`.
        budget: of attention, module or transformer FLOPs.

    Raises:
        InputsInvalid: these are no table and budget, nothing is as cheap, or the budget is an error or a speedup, which only
            the pipeline can show.

    Examples:
        >>> plan = ah.solve(table, ah.Budget(module_flops=0.4))
    """
    require_a(Table, table, "table")
    require_a(Budget, budget, "budget")
    name, value = budget.asked
    if name in ("error", "speedup"):
        raise InputsInvalid(
            f"got a budget of {name}={value}, wanted FLOPs: a table alone knows no other; call arrowhead.search"
        )
    problem = problem_of(budget, table)
    return plan_of(problem, budget, within(problem, budget))


def within(problem: Problem, budget: Budget) -> Allocation:
    """The allocation of least error found within the budget's cost, and within its bytes if they are bounded."""
    if budget.cache_bytes is None:
        return within_cost(problem, budget.fraction)
    table = problem.table

    def peak(found: Allocation) -> int:
        plan = plan_of(problem, budget, found)
        return max(plan.cache_bytes(table.images, table.itemsize))

    found, refused = [], None
    for each in (problem, problem.without_extrapolation()) if problem.choices.slopes else (problem,):
        try:
            found.append(within_memory(each, budget.fraction, peak, budget.cache_bytes))
        except InputsInvalid as error:
            refused = error
    if not found:
        assert refused is not None
        raise refused
    return min(found, key=lambda allocation: allocation.error)


def plan_of(problem: Problem, budget: Budget, found: Allocation) -> Plan:
    """The plan of an allocation, for the model that the table was made on."""
    table, (name, value) = problem.table, budget.asked
    settings = {key: setting for key, setting in asdict(budget).items() if key not in ASKED}
    settings["granularity"] = problem.granularity
    search = {"strategy": "budget", "asked": f"{name} = {value}", **settings, **dict(table.about.get("search", {}))}
    if isinstance(problem.costs, FlopCosts):
        search[f"{problem.costs.measure}_flops"] = short(found.cost + problem.fixed)
    search["predicted_error"] = short(found.error**0.5)
    columns = {site: column for site, column in zip(problem.sites, found.columns, strict=True) if column is not None}
    rows = tuple(zip(*columns.values(), strict=True))
    about = {**table.about, "search": search}
    target, tokens = replace(table.target, sites=tuple(columns)), relevant_tokens(table.tokens, columns)
    return Plan(rows, target, tokens, table.branches.guided, about, table.branches.calls, table.switch)


def with_provenance(plan: Plan, **facts: Any) -> Plan:
    """The plan with more facts in its provenance."""
    return replace(plan, about={**plan.about, "search": {**plan.about["search"], **facts}})


def short(value: float) -> float:
    """The value to three digits."""
    return float(f"{value:.3g}")
