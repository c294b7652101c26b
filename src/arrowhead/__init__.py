"""Diffusion transformers that generate faster, without retraining.

A plan says, for every step and site (attention or feed-forward), what is computed and how; arrowhead finds a plan, puts it on a
pipeline, and takes it off again.
"""

from arrowhead import tiny
from arrowhead.analysis.arrays import Analysis
from arrowhead.analysis.measure import analyze
from arrowhead.apply import Run, applied, apply, remove
from arrowhead.models import supported
from arrowhead.plan import Plan
from arrowhead.search import Budget, Extent, Headwise, Table, calibrate, calibration_bytes, search, solve, sweep
from arrowhead.tally import Summary

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "Budget",
    "Extent",
    "Headwise",
    "Plan",
    "Run",
    "Summary",
    "Table",
    "analyze",
    "applied",
    "apply",
    "calibrate",
    "calibration_bytes",
    "remove",
    "search",
    "solve",
    "supported",
    "sweep",
    "tiny",
]
