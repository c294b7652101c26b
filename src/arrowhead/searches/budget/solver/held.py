"""What the caches have to hold for an output, which a search under `cache_bytes` puts a price on."""

from collections.abc import Sequence

import numpy as np

from arrowhead.plans.layout import Site
from arrowhead.searches.budget.sensitivity.site_outputs import ExtrapolatedOutput, SiteOutput
from arrowhead.searches.budget.sensitivity.table import Floats, Table


def held_for(outputs: Sequence[SiteOutput], columns: Sequence[tuple[Site, int]], table: Table) -> Floats:
    """Elements that are held from one step to the next so that a step can give an output: (outputs, C).

    In units of one image's latents. A column is some heads of a site, given by the site and their number. A stored output
    counts in each step that reuses it, a residual in each step that adds it.
    """
    held = [[_elements(output, site, heads, table) for site, heads in columns] for output in outputs]
    return np.array(held, dtype=np.float64) / table.elements


def _elements(output: SiteOutput, site: Site, heads: int, table: Table) -> int:
    if isinstance(output, ExtrapolatedOutput):
        return 2 * _elements(output.later, site, heads, table)
    residual = output.source.residual
    if output.lag:
        shared, tokens = output.share, site.tokens(table.tokens).total
    elif residual is not None:
        shared, tokens = residual.shared, site.tokens(table.tokens).visual
    else:
        return 0
    samples = 2 if table.branches.guided and not shared else 1
    return samples * heads * site.head_dim * site.sequences(table.tokens) * tokens
