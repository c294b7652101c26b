"""Custom models: a torch module that is no pipeline, with an adapter that says where its attention is and how it is called."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Any, cast, get_args

import torch
from torch import nn

from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.models.custom_attention import Attention, AttentionIn, at_least_one
from arrowhead.models.custom_blocks import Block, require_pattern
from arrowhead.models.family import NONE
from arrowhead.plans.layout import BranchOrder, Tokens
from arrowhead.upstream import named_modules


@dataclass(frozen=True)
class Adapter:
    r"""The description of a custom model: a diffusion transformer, any `torch.nn.Module`, that no supported pipeline calls.

    The model's forward is called once for each denoising step, or twice where the CFG branches come one after the other. Its
    first argument are the latents, a tensor (B, …) or a list with one for each image; so is its output, or the output's first
    entry. The loop around the model may be any code, and may call `model.forward` directly.

    Args:
        attention: by regular expressions for whole paths (as in `model.named_modules()`), the self-attention modules, each kind
            with an `Attention`. Modules that no expression matches are computed in every step.
        functions: self-attention that is a function called in the code of other modules, each kind with an `AttentionIn`.
        tokens: `tokens(model, call)`, with the arguments of the model's call by name, gives the tokens of one sample: the
            visual ones, and the text ones where attention is joint. Boxes need their grid, see `Tokens.of_grid`.
        cfg: how the branches of classifier-free guidance come: in one batch, the conditional rows first (`cond_first`) or last
            (`uncond_first`), or in two calls, the conditional one first (`two_calls`). None: without guidance. Both branches
            start from the same latents, which are compared in the first two steps, so a wrong number of branches or calls is
            refused. Which branch comes first cannot be told from latents, and is taken as said.
        feed_forward: a regular expression for the paths of feed-forwards of visual tokens (B, N, C), which a budget may then
            reuse, too. By default there are none.
        cross_attention: by regular expressions for paths, modules that attend from the visual tokens (B, N, C) to the text,
            which a budget may then reuse, too; each with an expression for the paths, within it, of the linear layers that
            multiply the text tokens. `tokens` has to count the text.
        blocks: by regular expressions for paths, blocks, each kind with a `Block`, which a budget may then reuse whole.
        guidance_scale: the scale w of uncond + w · (cond - uncond), for the predicted errors of budgets.
        latent_channels: the number of channels of the output (dimension 1) that the sampler uses, where a variance follows
            them; None: all. Budgets predict errors of these alone.

    Raises:
        InputsInvalid: an argument is none of these. Whether the patterns match is checked when the adapter meets a model
            (UnsupportedPipeline).

    A model that is called as `model(x, t)`, with x (B, C, H, W) in patches of 2 × 2, conditional rows first:

        def tokens(model, call):
            height, width = call["x"].shape[-2:]
            return arrowhead.Tokens.of_grid(1, height // 2, width // 2)

        adapter = arrowhead.Adapter(
            attention={r"blocks\.\d+\.attn": arrowhead.Attention()},
            tokens=tokens,
            cfg="cond_first",
            feed_forward=r"blocks\.\d+\.mlp",
            guidance_scale=4.0,
        )
        plan = arrowhead.search(model, lambda: sample(model), adapter=adapter, threshold=0.1)
    """

    attention: Mapping[str, Attention] = field(default_factory=dict)
    tokens: Callable[[Any, Mapping[str, Any]], Tokens] = field(default=cast(Any, None))  # has to be given
    cfg: BranchOrder | None = None
    feed_forward: str = NONE
    guidance_scale: float = 1.0
    latent_channels: int | None = None
    _: KW_ONLY
    functions: Sequence[AttentionIn] = ()
    cross_attention: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.attention, Mapping) or not all(isinstance(a, Attention) for a in self.attention.values()):
            raise InputsInvalid(
                f"got attention={self.attention!r:.200}, wanted regular expressions for paths, each with an arrowhead.Attention"
            )
        if not isinstance(self.functions, list | tuple) or not all(isinstance(each, AttentionIn) for each in self.functions):
            raise InputsInvalid(f"got functions={self.functions!r:.200}, wanted a list of arrowhead.AttentionIn")
        object.__setattr__(self, "functions", tuple(self.functions))
        if not isinstance(self.blocks, Mapping) or not all(isinstance(block, Block) for block in self.blocks.values()):
            raise InputsInvalid(f"got blocks={self.blocks!r:.200}, wanted patterns for paths, each with an arrowhead.Block")
        if not isinstance(self.cross_attention, Mapping):
            raise InputsInvalid(
                f"got cross_attention={self.cross_attention!r:.200}, wanted patterns for paths of modules, each with one for "
                "its layers that multiply the text"
            )
        crossed = (*self.cross_attention, *self.cross_attention.values())
        functions = (each.pattern for each in self.functions)
        for pattern in (*self.attention, *functions, self.feed_forward, *crossed, *self.blocks):
            require_pattern(pattern)
        if not callable(self.tokens):
            raise InputsInvalid(f"got tokens={self.tokens!r:.200}, wanted tokens(model, call), which gives arrowhead.Tokens")
        if self.cfg is not None and not (isinstance(self.cfg, str) and self.cfg in get_args(BranchOrder)):
            raise InputsInvalid(
                f"got cfg={self.cfg!r:.200}, wanted one of {', '.join(get_args(BranchOrder))}, or None without guidance"
            )
        scale = self.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= torch.finfo(torch.float32).max:
            raise InputsInvalid(f"got guidance_scale={scale!r:.200}, wanted a finite number")
        if self.latent_channels is not None and not at_least_one(self.latent_channels):
            raise InputsInvalid(
                f"got latent_channels={self.latent_channels!r:.200}, wanted a number of 1 or more, or None for all channels"
            )


def matching_paths(pattern: str, root: nn.Module) -> list[str]:
    """The paths of modules that a pattern of an adapter matches.

    Raises:
        UnsupportedPipeline: there are none.
    """
    if not (found := [path for path, _ in named_modules(root) if re.fullmatch(pattern, path)]):
        raise UnsupportedPipeline(
            f"got an adapter with {pattern!r:.200}, which no path in a {type(root).__name__} matches; wanted a regular "
            "expression for whole paths, as model.named_modules() has them"
        )
    return found


def function_path(path: str, function: AttentionIn) -> str:
    """The path of the site that is a function's call in the module with this path."""
    return f"{path}.{function.function}()" if path else f"{function.function}()"


def require_separate(adapter: Adapter, root: nn.Module) -> None:
    """Check that an adapter names each module once, and no module within another one.

    Raises:
        UnsupportedPipeline: a module is named twice or lies within another one, or a pattern matches nothing.
    """
    patterns = [*adapter.attention, *adapter.cross_attention]
    patterns += [] if adapter.feed_forward == NONE else [adapter.feed_forward]
    functions = [function_path(path, each) for each in adapter.functions for path in matching_paths(each.pattern, root)]
    _require_separate(sorted([path for pattern in patterns for path in matching_paths(pattern, root)] + functions), root)
    _require_separate(sorted(path for pattern in adapter.blocks for path in matching_paths(pattern, root)), root)


def _require_separate(paths: list[str], root: nn.Module) -> None:
    named = set(paths)
    within = (path for path in paths if any(path[:place] in named for place, c in enumerate(path) if c == "."))
    if len(paths) > 1 and "" in named:
        wrong = f"the whole {type(root).__name__} and {paths[1]}"
    elif len(named) < len(paths):
        wrong = f"{next(path for path, other in pairwise(paths) if path == other)} twice"
    elif (inner := next(within, None)) is not None:
        wrong = f"{inner} and a module around it"
    else:
        return
    raise UnsupportedPipeline(
        f"got an adapter whose patterns name {wrong}; wanted modules apart from one another; only blocks may be around others"
    )


def tokens_by_adapter(adapter: Adapter, root: nn.Module, call: Mapping[str, Any]) -> Tokens:
    """The tokens that an adapter finds in a call of the model.

    Raises:
        InputsInvalid: its `tokens` raises an exception, or returns something else.
    """
    try:
        found = adapter.tokens(root, call)
    except Exception as error:
        raise InputsInvalid(
            f"got {type(error).__name__} ({error!s:.300}) from the adapter's tokens(model, call) with {', '.join(call)}; "
            "wanted arrowhead.Tokens"
        ) from error
    if not isinstance(found, Tokens):
        raise InputsInvalid(f"got a {type(found).__name__} from the adapter's tokens(model, call), wanted arrowhead.Tokens")
    return found


class CustomModel:
    """A torch module with its adapter, in the place of a pipeline: its call runs a callable that generates."""

    scheduler: Any = None
    """None, where pipelines have their scheduler: the loop around a custom model is any code."""

    def __init__(self, transformer: nn.Module, adapter: Adapter) -> None:
        self.transformer, self.adapter = transformer, adapter

    def __call__(self, generate: Callable[[], Any]) -> Any:
        """Generate once."""
        return generate()


def with_adapter(pipe: Any, adapter: Adapter | None) -> Any:
    """Returns the pipeline, or a custom model where there is an adapter.

    Raises:
        UnsupportedPipeline: a module without an adapter, or an adapter with something that is no module.
    """
    name = type(pipe).__name__
    if adapter is None:
        if isinstance(pipe, nn.Module):
            raise UnsupportedPipeline(
                f"got a {name}, a module, without an adapter; wanted a pipeline, or adapter=arrowhead.Adapter(...), which "
                "describes the module"
            )
        return pipe
    if not isinstance(adapter, Adapter) or not isinstance(pipe, nn.Module):
        raise UnsupportedPipeline(
            f"got a {name} with a {type(adapter).__name__}; wanted a torch.nn.Module with an arrowhead.Adapter; of a pipeline "
            "give its transformer"
        )
    return CustomModel(pipe, adapter)
