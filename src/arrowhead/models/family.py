"""What has to be known about a family of models, and the ways in which families lay their tokens out and call for guidance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from arrowhead.plans.layout import BranchOrder, Kind, Tokens

NONE = r"(?!)"
"""A pattern that matches nothing."""


@dataclass(frozen=True)
class Family:
    """What has to be known about a transformer class and its pipelines.

    `name` is what people call it. `site_pattern` is a regular expression for the module paths of the attention sites,
    `joint_pattern` for those of them that attend over text and image together, `cross_pattern` for attention from the image
    to the text, `feed_forward_pattern` for the image's feed-forwards, `block_pattern` for whole blocks; `branch_order` gives
    each pipeline class's order of the CFG branches in its batch, which no shape reveals; `tokens` counts them from a call's
    arguments; `guided` tells from the pipeline call's arguments, and the pipeline's settings, whether there are both branches,
    `guidance_scale` how far apart they are driven, and `refused` what of them cannot be compressed. `per_sample_pattern` names
    layers of a block that multiply once for a sample rather than its tokens, `text_pattern` those that multiply the text's.
    `samples` is the transformer's argument with a latent for each sample; `returned` are the tokens at the beginning of its
    output that a pipeline goes on with, None where that is all. `left_alone` says what of the transformer is computed in every
    step, and `tested` which of the tests it goes through. `over` says along what sites attend, and `by_sample` how, see `Site`;
    `heads_apart` is False where all have to be projected. `unfit` tells what of a transformer does not fit. Where a pipeline
    may have a second transformer, `takes_over` tells from one that is running the step from which that one is called, and
    `later_guidance_scale` how far it drives the branches apart.
    """

    name: str
    transformer: str
    site_pattern: str
    branch_order: Mapping[str, BranchOrder]
    tokens: Callable[[Any, Mapping[str, Any]], Tokens]
    guided: Callable[[Mapping[str, Any]], bool]
    joint_pattern: str = ""
    cross_pattern: str = NONE
    feed_forward_pattern: str = r"transformer_blocks\.\d+\.ff"
    block_pattern: str = r"(single_)?transformer_blocks\.\d+"
    guidance_scale: Callable[[Mapping[str, Any]], float] = lambda call: float(call["guidance_scale"])
    per_sample_pattern: str = r"norm.*"
    text_pattern: str = r".*context.*"
    over: Literal["all", "space"] = "all"
    by_sample: bool = False
    separable_heads: bool = True
    refused: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    samples: str = "hidden_states"
    returned: Callable[[Mapping[str, Any]], int | None] = lambda _: None
    unfit: Callable[[Any], str | None] = lambda _: None
    takes_over: Callable[[Any], int | None] | None = None
    later_guidance_scale: Callable[[Mapping[str, Any]], float] | None = None
    left_alone: str = ""
    tested: Literal["all contracts", "essentials"] = "essentials"

    def knows(self, kind: Kind) -> bool:
        """Whether it has sites of this kind."""
        patterns: dict[Kind, str] = {
            "self_attention": self.site_pattern,
            "cross_attention": self.cross_pattern,
            "feed_forward": self.feed_forward_pattern,
            "block": self.block_pattern,
        }
        return patterns[kind] != NONE
