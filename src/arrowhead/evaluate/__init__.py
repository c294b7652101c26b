"""Quality, cost and time of plans beside the untouched pipeline.

`evaluate` generates the same inputs once for each of a few seeds, and holds all images: what the page of compare shows.
`measure` is for figures to decide by: any number of images, kept on disk, with other people's networks.
"""

from arrowhead.evaluate.asked import Asked, Shard, captions
from arrowhead.evaluate.figures import Figure
from arrowhead.evaluate.measuring import measure
from arrowhead.evaluate.side_by_side import METRICS, Evaluation, Score, evaluate, generate
from arrowhead.evaluate.suite import Networks
from arrowhead.evaluate.table import Cost, Measured, Row

__all__ = [
    "METRICS",
    "Asked",
    "Cost",
    "Evaluation",
    "Figure",
    "Measured",
    "Networks",
    "Row",
    "Score",
    "Shard",
    "captions",
    "evaluate",
    "generate",
    "measure",
]
