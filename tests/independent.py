"""Random tokens, columns and plans, and masks and lifetimes written a second time: uses nothing of src but the value types."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from hypothesis import settings
from hypothesis import strategies as st

from arrowhead.plans.cells import Arrow, Attend, Box, Cached, Cell, Full, Method, Radius, Reuse
from arrowhead.plans.layout import Grid, Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import Target

few = settings(max_examples=80, deadline=None)
RADII = (0, 1, 3, 20)
WHOLE = (("output",), ("slope",))  # entries of the whole site, rather than of heads

BOXES = (Box(1, 1, 2), Box(0, None, 1), Box(rows=2, columns=3))

token_layouts = st.builds(Tokens, visual=st.integers(1, 14), text=st.sampled_from([0, 0, 1, 2, 5]), text_first=st.booleans())


reaches = st.none() | st.integers(0, 5)
boxes = st.builds(Box, reaches, reaches, reaches)


@st.composite
def grid_layouts(draw: st.DrawFn) -> Tokens:
    """Small grids, with text or without."""
    sizes = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    tokens = Tokens.of_grid(*sizes, text=draw(st.sampled_from([0, 0, 1, 5])), text_first=draw(st.booleans()))
    return replace(tokens, frames=sizes[0])


def in_box(tokens: Tokens, box: Box) -> list[list[bool]]:
    """Which visual tokens see which, (V, V): by the distance of frames, and by blocks of rows and columns."""
    grid = tokens.grid
    assert grid is not None
    places = [(f, r, c) for f in range(grid.frames) for r in range(grid.rows) for c in range(grid.columns)]

    def near(a: int, b: int, reach: int | None, whole: bool) -> bool:
        if reach is None or a == b:
            return True
        return abs(a - b) <= reach if whole else reach > 0 and abs(a // reach - b // reach) <= 1

    reach = box.frames, box.rows, box.columns
    return [[all(near(a[n], b[n], reach[n], n == 0) for n in range(3)) for b in places] for a in places]


def dense_mask(tokens: Tokens, radius: Radius) -> torch.Tensor:
    """Boolean (N, N): |i − j| ≤ radius between visual tokens, everything where a text token is involved."""
    if isinstance(radius, Box):
        seen, first = torch.ones(tokens.total, tokens.total, dtype=torch.bool), tokens.text if tokens.text_first else 0
        seen[first : first + tokens.visual, first : first + tokens.visual] = torch.tensor(in_box(tokens, radius))
        return seen
    place = torch.arange(tokens.visual + tokens.text)  # (N,)
    first = tokens.text if tokens.text_first else 0
    text = (place < first) | (place >= first + tokens.visual)
    near = (place[:, None] - place[None, :]).abs() <= radius
    return near | text[:, None] | text[None, :]


def in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Rounds (…, N, D) to 255 levels in each block of tokens, of which the largest element is the outermost level."""
    parts = []
    for part in x.split(block, -2):
        unit = part.abs().amax((-1, -2), keepdim=True) / 127
        parts.append(torch.where(unit > 0, torch.round(part / unit) * unit, part))
    return torch.cat(parts, -2)


def in_int8(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys after encoding in int8, (…, N, D): in blocks of 128 and 64 tokens, keys without their mean."""
    q, k = q.float(), k.float()
    return in_blocks(q, 128).double(), in_blocks(k - k.mean(-2, keepdim=True), 64).double()


def by_head(cell: Attend, heads: int) -> tuple[Method, ...]:
    """What each head does."""
    return cell.method if isinstance(cell.method, tuple) else (cell.method,) * heads


def told_apart(column: tuple[Cell, ...]) -> int:
    """How many heads a column speaks of; 1 where it speaks of all at once."""
    return max((len(c.method) for c in column if isinstance(c, Attend) and isinstance(c.method, tuple)), default=1)


def begins_extrapolation(column: Sequence[Cell], step: int) -> bool:
    """Whether the output computed in a step is extrapolated, from the one computed before it and from it."""
    following = takewhile(lambda cell: isinstance(cell, Reuse), column[step + 1 :])
    return not isinstance(column[step], Reuse) and any(cell.extrapolate for cell in following)


def reads(column: Sequence[Cell], step: int, heads: int) -> set[tuple]:
    """What a step needs of earlier ones: ("output",), ("slope",), ("residual", radius, head) or ("head", head)."""
    cell = column[step]
    if isinstance(cell, Reuse):
        return {("output",), ("slope",)} if cell.extrapolate else {("output",)}
    methods = list(enumerate(by_head(cell, heads)))
    cached = {("head", head) for head, method in methods if isinstance(method, Cached)}
    slope_from = {("output",)} if begins_extrapolation(column, step) else set()
    return slope_from | cached | {("residual", m.radius, head) for head, m in methods if isinstance(m, Arrow) and m.residual}


def renews(cell: Cell, what: tuple, heads: int) -> bool:
    """Whether the cell replaces the entry of this name that an earlier step stored."""
    if isinstance(cell, Reuse) or what in WHOLE:
        return not isinstance(cell, Reuse)
    method = by_head(cell, heads)[what[-1]]
    return method == Full() if what[0] == "residual" else not isinstance(method, Cached)


def readers(column: tuple[Cell, ...], step: int, what: tuple, heads: int) -> list[Cell]:
    """The cells after `step` that read the entry of this name that is there."""
    found = []
    for later in range(step + 1, len(column)):
        found += [column[later]] * (what in reads(column, later, heads))
        if renews(column[later], what, heads):
            break
    return found


def made(column: tuple[Cell, ...], step: int, heads: int) -> dict[tuple, list[Cell]]:
    """The entries of this step that later cells read, with those cells."""
    later = set().union(*(reads(column, after, heads) for after in range(step + 1, len(column))))
    return {what: who for what in later if renews(column[step], what, heads) and (who := readers(column, step, what, heads))}


def for_one_branch(what: tuple, who: list[Cell]) -> bool:
    """Whether an entry is stored for the conditional branch alone: every reader shares CFG. A reused output serves both."""
    return what not in WHOLE and all(cell.share_cfg for cell in who)


@st.composite
def columns(
    draw: st.DrawFn, steps: int, heads: int | None = None, lines: bool = True, radii: Sequence[Radius] = RADII
) -> tuple[Cell, ...]:
    """A random column that can run. With `heads`, heads may differ.

    `lines`: some outputs are extrapolated. `radii` are those of the arrows.
    """
    column: list[Cell] = []
    for step in range(steps):
        if step and draw(st.integers(0, 3)) == 0:
            two = sum(isinstance(cell, Attend) for cell in column) > 1
            column.append(Reuse(draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) if lines and two else 0.0))
            continue
        before = [[by_head(c, heads or 1)[h] for c in column if isinstance(c, Attend)] for h in range(heads or 1)]
        if heads is not None and draw(st.booleans()):
            method = tuple(draw(_methods([seen], radii)) for seen in before)
        else:
            method = draw(_methods(before, radii))
        column.append(Attend(method, share_cfg=draw(st.booleans())))
    return tuple(column)


def _methods(before: list[list[Method]], choice: Sequence[Radius]) -> st.SearchStrategy[Method]:
    """The methods that heads can have which had these before, in steps that were computed: those that all of them can."""
    radii, precisions = st.sampled_from(choice), st.sampled_from(["native", "native", "int8"])
    kinds = [st.builds(Full, precisions), st.builds(Arrow, radii, st.just(False), precisions)]
    kinds += [st.builds(Arrow, radii, st.just(True), precisions)] * all(Full() in seen for seen in before)
    kinds += [st.just(Cached())] * all(before)  # each was computed once
    return st.one_of(kinds)


any_columns = st.tuples(st.integers(1, 9), st.sampled_from([None, 1, 2, 3])).flatmap(lambda sizes: columns(*sizes))

sites = st.builds(
    Site,
    path=st.just("blocks.0.attn"),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 16),
    channels=st.integers(1, 64),
    joint=st.booleans(),
    projects_out=st.sampled_from(["all", "visual", "none"]),
    separable_heads=st.booleans(),
    kv_heads=st.sampled_from([None, None, 1]),
    weights=st.sampled_from([0, 0, 100]),
    text_channels=st.sampled_from([0, 0, 7]),
    over=st.sampled_from(["all", "all", "space", "time"]),
).map(lambda site: site if site.over == "all" else replace(site, joint=False))


def tokens_of(site: Site, tokens: Tokens) -> Tokens:
    """The tokens of one sequence of a site: all if it is joint, else the image's, a frame's, or a position's frames."""
    frames, grid = tokens.frames, tokens.grid
    if site.over == "space":
        return Tokens(tokens.visual // frames, grid=grid and Grid(1, grid.rows, grid.columns))
    if site.over == "time":
        return Tokens(frames, grid=grid and Grid(frames, 1, 1))
    return replace(tokens, frames=1) if site.joint else Tokens(tokens.visual, grid=grid)


def sequences_of(site: Site, tokens: Tokens) -> int:
    """How many sequences a sample has."""
    return tokens.visual // tokens_of(site, tokens).visual


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that can run, over sites of different sizes."""
    steps, width = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    chosen = tuple(Site(**vars(draw(sites)) | {"path": f"blocks.{i}.attn"}) for i in range(width))
    calls, guided = draw(st.sampled_from([(1, False), (1, True), (2, True)]))
    tokens = draw(st.one_of(token_layouts, grid_layouts()))
    radii = RADII if tokens.grid is None else (*RADII[1:3], *BOXES)
    cells = tuple(zip(*[draw(columns(steps, site.heads, radii=radii)) for site in chosen], strict=True))
    target = Target("Transformer", "Scheduler", {"shift": draw(st.floats(0, 9)), "betas": None}, chosen)
    return Plan(cells, target, tokens, guided, calls=calls)
