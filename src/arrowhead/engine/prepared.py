"""The site plans of every step, prepared before a step needs them, and shared by generations that are alike."""

from collections import OrderedDict
from dataclasses import replace

from arrowhead.engine.site_plan import ReusePlan, SitePlan, prepare
from arrowhead.models.head_separation import can_project_heads_separately
from arrowhead.models.model import Model
from arrowhead.plans.cells import Attend, Cached
from arrowhead.plans.layout import Branches, Tokens, counted_once, stack_around
from arrowhead.plans.lifetimes import lifetimes_of_all
from arrowhead.plans.plan import Plan
from arrowhead.upstream import uncompiled

SitePlans = tuple[dict[str, SitePlan], ...]
"""For each step, the plan of each site's pass, by the site's path."""
KEPT = 16
"""How many kinds of generations are kept: prompts of other lengths are other kinds."""
Inseparable = frozenset[tuple[bool, str]]
"""The paths of sites with cached heads that have to project all heads, with True for the second transformer."""


class PreparedPlans:
    """Prepares the site plans of a model's generations. Owns those that were prepared."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._kept: OrderedDict[tuple[object, ...], tuple[Plan, SitePlans]] = OrderedDict()

    def inseparable(self, plan: Plan) -> Inseparable:
        """What the modules say today: a LoRA may have been loaded. To be asked once in a generation."""
        caching = [
            site
            for site, column in zip(plan.target.sites, plan.columns, strict=True)
            if any(isinstance(cell, Attend) and Cached() in cell.methods(site.heads) for cell in column)
        ]
        return frozenset(
            (later > 0, site.path)
            for later, transformer in enumerate(self._model.transformers)
            for site in caching
            if not can_project_heads_separately(uncompiled(transformer.get_submodule(site.module_path)))
        )

    def of(self, plan: Plan, tokens: Tokens, branches: Branches, inseparable: Inseparable) -> SitePlans:
        """The site plans of a plan, for calls of the transformer with these tokens and branches."""
        key = id(plan), tokens, branches, inseparable
        if key not in self._kept:
            self._kept[key] = plan, self._prepared(plan, tokens, branches, inseparable)  # the plan stays alive with its id
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def _prepared(self, plan: Plan, tokens: Tokens, branches: Branches, inseparable: Inseparable) -> SitePlans:
        sites = counted_once(plan.target.sites)
        writes = lifetimes_of_all(plan.cells, plan.target.sites)
        inner = {site.path: stack.path for site, stack in stack_around(plan.target.sites).items()}
        prepared = tuple(
            {
                site.path: prepare(
                    site,
                    cell,
                    of_site[step],
                    tokens,
                    branches,
                    separable=(plan.switch is not None and step >= plan.switch, site.path) not in inseparable,
                )
                for site, cell, of_site in zip(sites, cells, writes, strict=True)
            }
            for step, cells in enumerate(plan.cells)
        )
        return tuple(_with_inner(of_step, inner) for of_step in prepared) if inner else prepared


def _with_inner(of_step: dict[str, SitePlan], inner: dict[str, str]) -> dict[str, SitePlan]:
    """A step's site plans; a stack that skips counts the passes of the sites within it. `inner`: the stack of each of them."""
    found = dict(of_step)
    for path, plan in of_step.items():
        counts = tuple(of_step[site].count for site, stack in inner.items() if stack == path)
        if isinstance(plan, ReusePlan) and counts:
            found[path] = replace(plan, inner=counts)
    return found
