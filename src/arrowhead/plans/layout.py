"""What is attended over: tokens, the module that attends, and how the two CFG branches share a batch."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pydantic


@dataclass(frozen=True)
class Grid:
    """Where visual tokens come from: frame by frame, in each row by row. An image is one frame."""

    frames: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not _whole(1, self.frames, self.rows, self.columns):
            raise ValueError(f"got {self}, wanted at least one of each, in whole numbers")

    @property
    def size(self) -> int:
        """How many tokens."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class Tokens:
    """A sequence of visual tokens with, perhaps, text tokens before or after them.

    `grid` is the visual ones', where known; `frames` are how many sequences they make where some site sees one frame.
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
        """Visual tokens that fill a grid."""
        grid = Grid(frames, rows, columns)
        return cls(grid.size, text, text_first, grid=grid)

    @property
    def image(self) -> "Tokens":
        """The visual ones alone."""
        return replace(self, text=0, text_first=False)

    @property
    def flat(self) -> "Tokens":
        """The same as a mere sequence."""
        return replace(self, grid=None)

    @property
    def total(self) -> int:
        """Length of the sequence."""
        return self.visual + self.text

    @property
    def visual_slice(self) -> slice:
        """Where the visual tokens stand."""
        return slice(self.text, self.total) if self.text_first else slice(0, self.visual)

    @property
    def text_slice(self) -> slice:
        """Where the text tokens stand; empty when there are none."""
        return slice(0, self.text) if self.text_first else slice(self.visual, self.total)


Kind = Literal["self_attention", "cross_attention", "feed_forward", "block"]


@dataclass(frozen=True)
class Site:
    """One module that a plan speaks of: its path in the transformer and the sizes its cost follows from.

    `joint` sites attend over text and image tokens, others over the image's alone. `projects_out` says which tokens have an
    output projection of the site's own. `over` says along what it attends: `space` sites have a sequence for each frame of a
    sample, `time` sites one for each place, whose tokens are frames. `heads_apart`: whether single heads' Q, K and V can be
    computed without the others'; it may change while a pipeline is used (LoRA), and is no part of what a plan is bound to.
    `kv_heads` heads of keys and values serve as many heads of queries each; None where every head has its own.

    `text_channels` are the text's at joint sites, 0 where they are the image's. `by_sample`: attention is called once for each
    sample, over that part of its text which is no padding; it counts as if none were. Where one layer projects for attention
    and for a feed-forward beside it, as in FLUX.2, the feed-forward is the site's, too: tokens are multiplied with its
    `weights` whatever heads do.

    Other kinds are computed or not, and have one head as wide as what they give; tokens are multiplied with so many `weights`,
    those of the text with `text_weights`. A `cross_attention` looks from the image at the text. A `block` gives what it adds to
    its input, and computes the sites `within` it, besides what its own weights say.
    """

    path: str
    heads: int
    head_dim: int
    channels: int
    joint: bool = False
    projects_out: Literal["all", "visual", "none"] = "all"
    separable_heads: Annotated[bool, pydantic.Field(alias="heads_apart")] = field(default=True, compare=False)  # in files
    kv_heads: int | None = None
    kind: Kind = "self_attention"
    weights: int = 0
    text_weights: int = 0
    within: tuple["Site", ...] = ()
    over: Literal["all", "space", "time"] = "all"
    text_channels: int = 0
    by_sample: bool = False

    def tokens(self, of_call: Tokens) -> Tokens:
        """What a sequence of the site's has, in a call of the transformer with these tokens."""
        grid = of_call.grid
        if self.over == "time":
            return Tokens(of_call.frames, grid=None if grid is None else Grid(of_call.frames, 1, 1))
        if self.over == "space":
            return Tokens(of_call.visual // of_call.frames, grid=None if grid is None else replace(grid, frames=1))
        own = replace(of_call, frames=1)
        return own if self.joint else own.image

    def sequences(self, of_call: Tokens) -> int:
        """Rows of the site's input for one sample."""
        return {"all": 1, "space": of_call.frames, "time": of_call.visual // of_call.frames}[self.over]

    @property
    def sees_text(self) -> bool:
        """Whether its cost depends on the text's length."""
        return self.joint or self.text_weights > 0 or any(site.sees_text for site in self.within)

    def contains(self, other: "Site") -> bool:
        """Whether the other site lies within this one."""
        return other.path.startswith(f"{self.path}.")

    def made_of(self, sites: Iterable["Site"]) -> bool:
        """Whether this is a block that computes some of these sites, and no other."""
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
    """Whether all are whole numbers of at least so much."""
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= least for value in values)


def relevant_tokens(tokens: Tokens, sites: Iterable[Site]) -> Tokens:
    """What of a call's tokens matters to these sites."""
    return tokens if any(site.sees_text for site in sites) else tokens.image


def outermost(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Those that lie within no other."""
    sites = tuple(sites)
    blocks = [site for site in sites if site.kind == "block"]
    return tuple(site for site in sites if not any(block.contains(site) for block in blocks))


BranchOrder = Literal["cond_first", "uncond_first", "two_calls"]
"""Both branches in one batch, the conditional one first or second; or each in a call of its own, the conditional one first."""


@dataclass(frozen=True)
class Branches:
    """How the CFG branches of one generation arrive; where it is not guided there is the conditional one alone."""

    order: BranchOrder
    guided: bool

    @property
    def calls(self) -> int:
        """Calls of the transformer in a step."""
        return 2 if self.guided and self.order == "two_calls" else 1

    @property
    def samples(self) -> int:
        """Transformer samples per generated image in a call."""
        return 2 if self.batched else 1

    @property
    def batched(self) -> bool:
        """Whether both branches come in one batch."""
        return self.guided and self.calls == 1

    def conditional(self, batch: int) -> slice:
        """The rows of the conditional branch in a batch of `batch` rows that holds it."""
        if not self.batched:
            return slice(0, batch)
        return slice(0, batch // 2) if self.order == "cond_first" else slice(batch // 2, batch)


ATTENTION_KINDS: frozenset[Kind] = frozenset({"self_attention"})
ALL_KINDS: frozenset[Kind] = frozenset({"self_attention", "cross_attention", "feed_forward", "block"})
