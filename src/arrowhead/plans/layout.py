"""What a plan is measured against: the tokens of a call, the sites of a transformer, and the CFG branches of a generation."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pydantic


@dataclass(frozen=True)
class Grid:
    """The grid that visual tokens are cut from: frame by frame, in a frame row by row. An image has one frame.

    Raises:
        ValueError: a size is not a whole number of at least 1.
    """

    frames: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not _whole(1, self.frames, self.rows, self.columns):
            raise ValueError(f"got {self}, wanted at least one of each, in whole numbers")

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class Tokens:
    """The token sequence of one sample: V = `visual` visual tokens, and T = `text` text tokens after or before them.

    `text_first`: the text tokens come before the visual ones. `grid` is the visual tokens' grid, where it is known: boxes need
    it. `frames` is above 1 only for video models some sites of which attend within one frame, or along time (see `Site.over`):
    the visual tokens are then that number of equal sequences.

    Raises:
        ValueError: sizes are no whole numbers, or contradict one another.

    >>> tokens = Tokens(visual=1024, text=77)
    >>> tokens.total, tokens.visual_slice, tokens.text_slice
    (1101, slice(0, 1024, None), slice(1024, 1101, None))
    """

    visual: int
    text: int = 0
    text_first: bool = False
    frames: int = 1
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if not _whole(1, self.visual) or not _whole(0, self.text):
            raise ValueError(
                f"got {self.visual!r} visual and {self.text!r} text tokens, wanted at least 1 and 0, in whole numbers"
            )
        if not _whole(1, self.frames) or self.visual % self.frames:
            raise ValueError(f"got {self.frames!r} frames of {self.visual} visual tokens, wanted frames of one size")
        if not isinstance(self.text_first, bool) or not isinstance(self.grid, Grid | None):
            raise ValueError(
                f"got text_first={self.text_first!r} and grid={self.grid!r}, wanted True or False, and a Grid or None"
            )
        if self.grid is not None and self.grid.size != self.visual:
            raise ValueError(f"got {self.visual} visual tokens on a {self.grid}, wanted {self.grid.size}")
        if self.grid is not None and self.frames not in (1, self.grid.frames):
            raise ValueError(f"got {self.frames} sequences on a {self.grid}, wanted one for each frame, or one of all")

    @classmethod
    def of_grid(cls, frames: int, rows: int, columns: int, *, text: int = 0, text_first: bool = False) -> "Tokens":
        """Returns the tokens of a grid of `frames` × `rows` × `columns` visual tokens, with `text` text tokens.

        >>> Tokens.of_grid(1, 32, 32, text=77).visual
        1024
        """
        grid = Grid(frames, rows, columns)
        return cls(grid.size, text, text_first, grid=grid)

    @property
    def image(self) -> "Tokens":
        """The visual tokens alone."""
        return Tokens(self.visual, frames=self.frames, grid=self.grid)

    @property
    def flat(self) -> "Tokens":
        """The same tokens without a grid."""
        return replace(self, grid=None)

    @property
    def total(self) -> int:
        """The length of the sequence, N = V + T."""
        return self.visual + self.text

    @property
    def visual_slice(self) -> slice:
        """The slice of the sequence that holds the visual tokens."""
        return slice(self.text, self.total) if self.text_first else slice(0, self.visual)

    @property
    def text_slice(self) -> slice:
        """The slice of the sequence that holds the text tokens; empty where there are none."""
        return slice(0, self.text) if self.text_first else slice(self.visual, self.total)


Kind = Literal["self_attention", "cross_attention", "feed_forward", "block", "stack"]


@dataclass(frozen=True)
class Site:
    """One module that a plan has cells for: its path in the transformer, and the sizes that its FLOPs and bytes follow from.

    Attributes:
        path: the module's name in the transformer, such as "transformer_blocks.0.attn". Of attention that is a function in a
            module, the module's name and the function's, such as "double_blocks.0.attention()". A stack has the
            names of the lists of its blocks, joined by "+".
        heads: heads of queries, H. Sites of other kinds than self-attention have 1.
        head_dim: channels of a head, D. Sites of other kinds have the width of their output.
        channels: channels of the visual tokens at the input and output.
        joint: the site attends over text and visual tokens; other sites attend over the visual tokens alone.
        projects_out: the tokens that the site's output projection multiplies; "outside": Q, K, V and the output are projected
            outside of the module, or not at all.
        separable_heads: Q, K and V of single heads can be computed without those of the others. A LoRA can change this while
            a pipeline is used, so it is no part of what a plan is bound to. Called "heads_apart" in files.
        kv_heads: heads of keys and values, a divisor of `heads`, where several heads of queries share them; else None.
        kind: self-attention, cross-attention from the image to the text, feed-forward, a whole block, or a stack: all blocks of
            a transformer, one after another. The output of a block or a stack is what it adds to its input; that of a stack is
            of the visual tokens alone, unless `joint`.
        weights: weights, besides those of the Q, K, V and output projections, that multiply each of the site's tokens. A
            self-attention has such weights where one layer also projects for the feed-forward beside it (FLUX.2).
        text_weights: weights of a site of another kind that multiply each text token of the call.
        within: the sites inside a block; the blocks of a stack.
        over: the axis that the site attends along: all tokens of a sample; "space", one frame, so that a sample has one
            sequence for each frame; "time", one position of all frames, so that a sample has one sequence for each position.
        text_channels: channels of the text tokens at a joint site, where they are not `channels`; else 0.
        by_sample: attention is called once for each sample, over its text without the padding (Mochi). FLOPs and bytes are
            counted as if no text were padding.

    Raises:
        ValueError: a size is not a whole number, or too small.
    """

    path: str
    heads: int
    head_dim: int
    channels: int
    joint: bool = False
    projects_out: Literal["all", "visual", "none", "outside"] = "all"
    separable_heads: Annotated[bool, pydantic.Field(alias="heads_apart")] = field(default=True, compare=False)
    kv_heads: int | None = None
    kind: Kind = "self_attention"
    weights: int = 0
    text_weights: int = 0
    within: tuple["Site", ...] = ()
    over: Literal["all", "space", "time"] = "all"
    text_channels: int = 0
    by_sample: bool = False

    def tokens(self, of_call: Tokens) -> Tokens:
        """The tokens of one sequence of the site, in a call of the transformer with the tokens `of_call`."""
        grid = of_call.grid
        if self.over == "time":
            return Tokens(of_call.frames, grid=None if grid is None else Grid(of_call.frames, 1, 1))
        if self.over == "space":
            return Tokens(of_call.visual // of_call.frames, grid=None if grid is None else replace(grid, frames=1))
        sequence = replace(of_call, frames=1)
        return sequence if self.joint else sequence.image

    def sequences(self, of_call: Tokens) -> int:
        """How many sequences, rows of the site's input, one sample has in a call with the tokens `of_call`."""
        return {"all": 1, "space": of_call.frames, "time": of_call.visual // of_call.frames}[self.over]

    @property
    def module_path(self) -> str:
        """The path of the module that the site is, or, of a function, of the module that calls it."""
        return self.path.rpartition(".")[0] if self.is_function else self.path

    @property
    def is_function(self) -> bool:
        """Whether the site is the call of a function, and no module."""
        return self.path.endswith("()")

    @property
    def sees_text(self) -> bool:
        """Whether the site's FLOPs depend on the length of the text."""
        return self.joint or self.text_weights > 0 or any(site.sees_text for site in self.within)

    def contains(self, other: "Site") -> bool:
        """Whether the other site lies within this one."""
        return other.path.startswith(tuple(f"{path}." for path in self.path.split("+")))

    def made_of(self, sites: Iterable["Site"]) -> bool:
        """Whether the site is a block, and the sites within it are all among `sites`, and all of those in it."""
        return self.kind == "block" and len(self.within) > 0 and {*self.within} == {*filter(self.contains, sites)}

    def __post_init__(self) -> None:
        # the order in which torch lists modules is no part of what a plan is bound to
        object.__setattr__(self, "within", tuple(sorted(self.within, key=lambda site: site.path)))
        if not _whole(1, self.heads, self.head_dim, self.channels):
            raise ValueError(f"got {self}, wanted sizes of at least 1, in whole numbers")
        if not _whole(0, self.weights, self.text_weights, self.text_channels):
            raise ValueError(f"got {self}, wanted weights and text_channels of at least 0, in whole numbers")
        if self.kv_heads is not None and (not _whole(1, self.kv_heads) or self.heads % self.kv_heads):
            raise ValueError(f"got {self}, wanted a divisor of heads as kv_heads")


def _whole(least: int, *values: Any) -> bool:
    """Whether all values are whole numbers of at least `least`."""
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= least for value in values)


def relevant_tokens(tokens: Tokens, sites: Iterable[Site]) -> Tokens:
    """The tokens that these sites' FLOPs depend on: those of a call, without the text where no site sees it."""
    return tokens if any(site.sees_text for site in sites) else tokens.image


def outermost(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites that lie within no other of them."""
    sites = tuple(sites)
    outer = [site for site in sites if site.kind in ("block", "stack")]
    return tuple(site for site in sites if not any(block.contains(site) for block in outer))


def stack_around(sites: Iterable[Site]) -> dict[Site, Site]:
    """The sites of self-attention that lie within a stack which is one of these sites, too, each with that stack."""
    sites = tuple(sites)
    stacks = [site for site in sites if site.kind == "stack"]
    return {site: stack for stack in stacks for site in sites if site.kind == "self_attention" and stack.contains(site)}


def counted_once(sites: Iterable[Site]) -> tuple[Site, ...]:
    """These sites, with stacks from which the attention is left out that is one of these sites: their FLOPs add up."""
    sites = tuple(sites)
    inner = stack_around(sites)

    def without_inner(stack: Site) -> Site:
        blocks = (replace(block, within=tuple(s for s in block.within if s not in inner)) for block in stack.within)
        return replace(stack, within=tuple(blocks))

    return tuple(without_inner(site) if site in inner.values() else site for site in sites)


BranchOrder = Literal["cond_first", "uncond_first", "two_calls"]
"""Where the CFG branches are: in one batch, with the conditional branch first or second; or in two calls, that branch first."""


@dataclass(frozen=True)
class Branches:
    """How one generation brings its CFG branches. Without guidance there is the conditional branch alone."""

    order: BranchOrder
    guided: bool

    @property
    def calls(self) -> int:
        """How often the transformer is called in a step: 1 or 2."""
        return 2 if self.guided and self.order == "two_calls" else 1

    @property
    def samples(self) -> int:
        """Rows of a call's batch per generated image: 1 or 2."""
        return 2 if self.batched else 1

    @property
    def batched(self) -> bool:
        """Whether both branches are in one batch, the CFG batch."""
        return self.guided and self.calls == 1

    @property
    def unguided(self) -> "Branches":
        """The conditional branch alone."""
        return replace(self, guided=False)

    def conditional(self, batch: int) -> slice:
        """The conditional branch's rows of a batch of `batch` rows.

        >>> Branches("uncond_first", guided=True).conditional(4)
        slice(2, 4, None)
        """
        if not self.batched:
            return slice(0, batch)
        return slice(0, batch // 2) if self.order == "cond_first" else slice(batch // 2, batch)


ATTENTION_KINDS: frozenset[Kind] = frozenset({"self_attention"})
ALL_KINDS: frozenset[Kind] = frozenset({"self_attention", "cross_attention", "feed_forward", "block"})
"""The kinds of sites that are one module."""
