"""Random tokens, columns and plans, and the mask written a second time: shares nothing with src but the value types."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from arrowhead.layout import Site, Tokens
from arrowhead.methods import Arrow, Attend, Cell, Full, Reuse
from arrowhead.plan import Plan, Target

few = settings(max_examples=80, deadline=None)
RADII = (0, 1, 3, 20)

token_layouts = st.builds(Tokens, visual=st.integers(1, 14), text=st.sampled_from([0, 0, 1, 2, 5]), text_first=st.booleans())


def dense_mask(tokens: Tokens, radius: int) -> torch.Tensor:
    """Boolean (N, N): |i − j| ≤ radius between visual tokens, everything where a text token is involved."""
    place = torch.arange(tokens.visual + tokens.text)  # (N,)
    first = tokens.text if tokens.text_first else 0
    text = (place < first) | (place >= first + tokens.visual)
    near = (place[:, None] - place[None, :]).abs() <= radius
    return near | text[:, None] | text[None, :]


def is_full(cell: Cell) -> bool:
    return isinstance(cell, Attend) and isinstance(cell.method, Full)


def reads_residual(cell: Cell) -> bool:
    return isinstance(cell, Attend) and isinstance(cell.method, Arrow) and cell.method.residual


@st.composite
def columns(draw: st.DrawFn, steps: int) -> tuple[Cell, ...]:
    """One site's cells over the steps: any that has what it reads."""
    column: list[Cell] = []
    for _ in range(steps):
        kinds = ["full", "band"] + ["reuse"] * bool(column) + ["residual"] * any(is_full(cell) for cell in column)
        kind = draw(st.sampled_from(kinds))
        if kind == "reuse":
            column.append(Reuse())
        else:
            method = Full() if kind == "full" else Arrow(draw(st.sampled_from(RADII)), residual=kind == "residual")
            column.append(Attend(method, share_cfg=draw(st.booleans())))
    return tuple(column)


any_columns = st.integers(1, 9).flatmap(columns)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that can run, over sites of different sizes."""
    steps, width = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 16), st.integers(1, 64))  # heads, head_dim, channels
    sites = tuple(Site(f"blocks.{i}.attn1", *draw(sizes), joint=True) for i in range(width))
    cells = tuple(zip(*[draw(columns(steps)) for _ in sites], strict=True))
    target = Target("Transformer", "Scheduler", {"shift": draw(st.floats(0, 9)), "betas": None}, sites)
    return Plan(cells, target, draw(token_layouts), guided=draw(st.booleans()))
