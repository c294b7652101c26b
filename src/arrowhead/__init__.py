"""Diffusion transformers that generate faster, without retraining.

A plan says, for every step and site (attention or feed-forward), what is computed and how; arrowhead finds a plan, puts it on a
pipeline, and takes it off again.
"""

from arrowhead import tiny
from arrowhead.analysis.arrays import Analysis
from arrowhead.analysis.measure import analyze
from arrowhead.apply import applied, apply, remove
from arrowhead.layout import Tokens
from arrowhead.methods import Box
from arrowhead.models import Adapter, Attention, FusedQKV, latte, open_sora, supported
from arrowhead.plan import Plan
from arrowhead.run import Run
from arrowhead.search import Budget, Extent, Greedy, Headwise, Table, calibrate, calibration_bytes, search, solve, sweep
from arrowhead.tally import Summary

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Analysis",
    "Attention",
    "Box",
    "Budget",
    "Extent",
    "FusedQKV",
    "Greedy",
    "Headwise",
    "Plan",
    "Run",
    "Summary",
    "Table",
    "Tokens",
    "analyze",
    "applied",
    "apply",
    "calibrate",
    "calibration_bytes",
    "latte",
    "open_sora",
    "remove",
    "search",
    "solve",
    "supported",
    "sweep",
    "tiny",
]
