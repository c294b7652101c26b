"""What is attended over: tokens, the module that attends, and how the two CFG branches share a batch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Tokens:
    """A sequence of visual tokens with, perhaps, text tokens before or after them."""

    visual: int
    text: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        if self.visual < 1 or self.text < 0:
            raise ValueError(f"got {self.visual} visual and {self.text} text tokens, wanted at least 1 and 0")

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
    output projection of the site's own. `heads_apart`: whether single heads' Q, K and V can be computed without the others'; it
    may change while a pipeline is used (LoRA), and is no part of what a plan is bound to. `kv_heads` heads of keys and values
    serve as many heads of queries each; None where every head has its own.

    Where one layer projects for attention and for a feed-forward beside it, as in FLUX.2, the feed-forward is the site's, too:
    tokens are multiplied with its `weights` whatever heads do.

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
    heads_apart: bool = field(default=True, compare=False)
    kv_heads: int | None = None
    kind: Kind = "self_attention"
    weights: int = 0
    text_weights: int = 0
    within: tuple["Site", ...] = ()

    def tokens(self, of_call: Tokens) -> Tokens:
        """What the site attends over, in a call of the transformer with these tokens."""
        return of_call if self.joint else Tokens(of_call.visual)

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
        if min(self.heads, self.head_dim, self.channels) < 1:
            raise ValueError(f"got {self}, wanted sizes of at least 1")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"got {self}, wanted a divisor of heads as kv_heads")


def seen(tokens: Tokens, sites: Iterable[Site]) -> Tokens:
    """What of a call's tokens matters to these sites."""
    return tokens if any(site.sees_text for site in sites) else Tokens(tokens.visual)


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
