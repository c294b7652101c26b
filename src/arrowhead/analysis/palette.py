"""A colour for every kind of cell, from much computed (dark) to nothing computed (light)."""

COLOURS = {
    "full": "#1f3a5f",
    "ASC": "#3f7cac",
    "WA": "#8a5a83",
    "WA+ASC": "#c48bb0",
    "WA-RS": "#2e8b6f",
    "WA-RS+ASC": "#8fc9a8",
    "head-wise": "#c8553d",
    "head-wise+ASC": "#e8a598",
    "cached": "#d98e04",
    "cached+ASC": "#edc27a",
    "AST": "#f2d16b",
    "forecast": "#f7ecc6",
}

MEANINGS = {
    "full": "computed in full",
    "ASC": "shared across CFG branches",
    "WA": "window",
    "WA+ASC": "window, shared across CFG branches",
    "WA-RS": "window with residual",
    "WA-RS+ASC": "window with residual, shared across CFG branches",
    "head-wise": "each head its own way",
    "head-wise+ASC": "each head its own way, shared across CFG branches",
    "cached": "heads' outputs of an earlier step, projected again",
    "cached+ASC": "heads' outputs of an earlier step, projected again, shared across CFG branches",
    "AST": "reused from an earlier step",
    "forecast": "extrapolated from two earlier steps",
}
