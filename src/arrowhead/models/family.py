"""The facts about a family of models: one transformer class and the pipelines that call it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from arrowhead.plans.layout import BranchOrder, Kind, Tokens

NONE = r"(?!)"
"""A regular expression that matches nothing."""


def channels_before_variance(transformer: Any) -> int | None:
    """The latents' channels where the output has as many channels of a variance after them, by the config; else None."""
    config = transformer.config
    return int(config.in_channels) if getattr(config, "out_channels", None) == 2 * config.in_channels else None


@dataclass(frozen=True)
class Family:
    """What is known of a transformer class and its pipelines.

    Patterns are regular expressions. Those of sites match the whole path of a module in the transformer; the two of layers
    match the whole path of a linear layer within its block. Functions of a call get its arguments by name, defaults included:
    `tokens`, `latents_argument` and `output_tokens` those of the transformer's call, the others those of the pipeline's.

    Attributes:
        name: what people call the family.
        transformer: the name of the transformer's class.
        site_pattern: the self-attention sites.
        branch_order: by the name of each pipeline's class, the order of its CFG branches; tests/test_cfg_order.py compares it
            with what the pipelines do.
        tokens: `tokens(transformer, call)`, the tokens of a sample.
        guided: whether the call has both CFG branches; its arguments have the pipeline's config, and the pipeline as `pipe`.
        joint_pattern: those of the sites that work on text and visual tokens together.
        cross_pattern: the cross-attention sites, from the image to the text.
        feed_forward_pattern: the feed-forward sites of the visual tokens.
        block_pattern: the blocks.
        stack: the names of the lists of blocks that run one after another, see the kind `stack`; None: all lists of blocks.
        guidance_scale: the scale that CFG is combined with: uncond + scale · (cond - uncond).
        per_sample_pattern: the layers of a block that run once for a sample, not for each token.
        text_pattern: the layers of a block that run for the text tokens alone.
        over: the axis that self-attention sites attend along, see `Site.over`.
        by_sample: attention is called once for each sample, see `Site.by_sample`.
        separable_heads: Q, K and V of single heads can be computed alone where the layers allow it, see `Site.separable_heads`.
        unsupported_call: the option of a pipeline's call that no plan goes with, for the error; None where there is none.
        guidance_changes: the option by which guidance is another one in some steps, likewise. Searches refuse it.
        beside: whether a call of the transformer stands beside the steps' own, and runs in full.
        unsupported_transformer: the part of a transformer that no plan goes with, likewise.
        latents_argument: the transformer's argument that holds a latent for each sample.
        output_tokens: the number of tokens at the beginning of the output that the pipeline uses, or a slice; None: all.
        latent_channels: the channels of the output (dimension 1) that a sampler uses, where others follow; None: all of them.
        second_from: where a pipeline may have a second transformer, the step from which the pipeline, in the midst of its call,
            runs that one; None where it never does.
        second_guidance_scale: the scale while the second transformer runs.
        left_alone: what is computed in every step, for `supported()`.
        tested: which of the tests the family goes through, for `supported()`.
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
    stack: tuple[str, ...] | None = None
    guidance_scale: Callable[[Mapping[str, Any]], float] = lambda call: float(call["guidance_scale"])
    per_sample_pattern: str = r"norm.*"
    text_pattern: str = r".*context.*"
    over: Literal["all", "space"] = "all"
    by_sample: bool = False
    separable_heads: bool = True
    unsupported_call: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    guidance_changes: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    beside: Callable[[Mapping[str, Any]], bool] = lambda _: False
    unsupported_transformer: Callable[[Any], str | None] = lambda _: None
    latents_argument: str = "hidden_states"
    output_tokens: Callable[[Mapping[str, Any]], int | slice | None] = lambda _: None
    latent_channels: Callable[[Any], int | None] = channels_before_variance
    second_from: Callable[[Any], int | None] | None = None
    second_guidance_scale: Callable[[Mapping[str, Any]], float] | None = None
    left_alone: str = ""
    tested: Literal["all contracts", "essentials"] = "essentials"

    def has(self, kind: Kind) -> bool:
        """Whether the family has sites of this kind."""
        patterns: dict[Kind, str] = {
            "self_attention": self.site_pattern,
            "cross_attention": self.cross_pattern,
            "feed_forward": self.feed_forward_pattern,
            "block": self.block_pattern,
            "stack": self.block_pattern,
        }
        return patterns[kind] != NONE
