"""Figures. `palette` says each method's colour once, for paper and terminal alike; `draw` is the only user of matplotlib."""
