"""Diffusion transformers that generate faster, without retraining.

A plan says, for every step and site (attention or feed-forward), what is computed and how; arrowhead finds a plan, puts it on a
pipeline, and takes it off again.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from arrowhead import tiny
from arrowhead.analysis.arrays import Analysis
from arrowhead.analysis.measure import analyze
from arrowhead.calibration.describe import Description, describe
from arrowhead.engine.install import applied, apply, remove
from arrowhead.engine.run import Run
from arrowhead.engine.stats import Summary
from arrowhead.models import adapters
from arrowhead.models.custom import Adapter
from arrowhead.models.custom_attention import Attention, AttentionIn, FusedQKV
from arrowhead.models.custom_blocks import Block
from arrowhead.models.latte import latte
from arrowhead.models.open_sora import open_sora
from arrowhead.models.supported import supported
from arrowhead.plans.cells import Box
from arrowhead.plans.layout import Tokens
from arrowhead.plans.plan import Plan
from arrowhead.searches.api import profile, profile_bytes, search, solve, sweep
from arrowhead.searches.budget.api import calibrate, calibration_bytes
from arrowhead.searches.budget.config import Budget, Extent
from arrowhead.searches.budget.sensitivity.table import Table
from arrowhead.searches.greedy import Greedy
from arrowhead.searches.headwise import Headwise
from arrowhead.searches.speedup import Speedup, speedup
from arrowhead.searches.stack.profile import Profile

if TYPE_CHECKING:
    from arrowhead.evaluation.side_by_side import evaluate
    from arrowhead.report.page import compare

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Analysis",
    "Attention",
    "AttentionIn",
    "Block",
    "Box",
    "Budget",
    "Description",
    "Extent",
    "FusedQKV",
    "Greedy",
    "Headwise",
    "Plan",
    "Profile",
    "Run",
    "Speedup",
    "Summary",
    "Table",
    "Tokens",
    "adapters",
    "analyze",
    "applied",
    "apply",
    "calibrate",
    "calibration_bytes",
    "compare",
    "describe",
    "evaluate",
    "latte",
    "open_sora",
    "profile",
    "profile_bytes",
    "remove",
    "search",
    "solve",
    "speedup",
    "supported",
    "sweep",
    "tiny",
]

_LAZY = {"compare": "arrowhead.report.page", "evaluate": "arrowhead.evaluation.side_by_side"}  # need torchmetrics and jinja2


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
