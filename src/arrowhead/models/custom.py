"""Describe a module of one's own: where its attention is, how it is reached, how its tokens and CFG branches come."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from arrowhead.errors import InputsInvalid, UnsupportedPipeline
from arrowhead.models.family import NONE
from arrowhead.plans.layout import BranchOrder, Tokens
from arrowhead.upstream import named_modules

Over = Literal["all", "space", "time"]
Forward = Callable[..., Any]
"""A forward in place of a module's own: its arguments are the module, `attend`, and what the module is called with."""


@dataclass(frozen=True)
class Attention:
    """One kind of attention module: how to reach its queries, keys and values, and what they look at.

    A module with a processor of diffusers is reached there; else wherever its forward calls
    `F.scaled_dot_product_attention`; a module that multiplies by itself needs a `forward`, or to be told as `FusedQKV`.

    Args:
        heads: how many, or the module's attribute that says it.
        head_dim: None: what follows from the module's linear layers, taken for those of Q, K, V and output.
        channels: of its input. None: those of its first linear layer.
        over: what a row of its input (rows, N, C) is: `all` tokens of a sample, one frame (`space`), or one place (`time`);
            rows of a sample follow one another.
        joint: whether it attends over text and image together.
        forward: `forward(module, attend, *args, **kwargs)` in place of the module's own: the same, but for
            `attend(q, k, v, attn_mask=None, scale=None)` where its softmax was, (rows, H, N, D) each. It is compared with the
            module's own on the first input.
    """

    heads: str | int = "num_heads"
    head_dim: int | None = None
    channels: int | None = None
    over: Over = "all"
    joint: bool = False
    forward: Forward | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.heads, str) or _counts(self.heads)):
            raise InputsInvalid(f"got heads={self.heads!r}, wanted a number of 1 or more, or the attribute that says it")
        for name in ("head_dim", "channels"):
            if (value := getattr(self, name)) is not None and not _counts(value):
                raise InputsInvalid(f"got {name}={value!r}, wanted a number of 1 or more, or None for what the layers say")
        if not isinstance(self.over, str) or self.over not in get_args(Over):
            raise InputsInvalid(f"got over={self.over!r}, wanted one of {', '.join(get_args(Over))}")
        if not isinstance(self.joint, bool):
            raise InputsInvalid(f"got joint={self.joint!r}, wanted True or False")
        if self.forward is not None and not callable(self.forward):
            raise InputsInvalid(f"got forward={self.forward!r}, wanted forward(module, attend, *args, **kwargs), or None")

    def head_count(self, module: nn.Module) -> int:
        """The module's heads.

        Raises:
            UnsupportedPipeline: it does not say how many.
        """
        found = self.heads if isinstance(self.heads, int) else _named(module, self.heads)
        if not _counts(found):
            raise UnsupportedPipeline(
                f"got a {type(module).__name__} whose {self.heads!r} is {found!r:.200}; wanted a number of 1 or more; name the "
                "attribute that says it, or the number, as arrowhead.Attention(heads=...)"
            )
        return int(found)

    def replacement_forward(self) -> Forward | None:
        """What takes the place of a module's forward, if anything has to."""
        return self.forward


@dataclass(frozen=True)
class FusedQKV(Attention):
    """Attention by one linear layer for Q, K and V, whose columns are (3, H, D), and a softmax of its own, told by its parts.

    Args:
        qkv: the layer's name in the module, as the names that follow.
        q_norm: the norm of each head's queries, where a module has it.
        k_norm: that of its keys.
        rotary: what turns queries and keys, called with each, (rows, H, N, D), where a module has it.
        rotary_first: whether that comes before the norms.
        proj: the output projection.
    """

    forward: None = field(default=None, init=False)
    qkv: str = "qkv"
    q_norm: str | None = None
    k_norm: str | None = None
    rotary: str | None = None
    rotary_first: bool = False
    proj: str = "proj"

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {"qkv": self.qkv, "proj": self.proj}
        parts = {name: value for name in ("q_norm", "k_norm", "rotary") if (value := getattr(self, name)) is not None}
        if wrong := {name: value for name, value in (named | parts).items() if not isinstance(value, str)}:
            raise InputsInvalid(f"got {wrong}, wanted names of a module's parts, or None for norms and rotary that it lacks")
        if not isinstance(self.rotary_first, bool):
            raise InputsInvalid(f"got rotary_first={self.rotary_first!r}, wanted True or False")

    def replacement_forward(self) -> Forward:
        """The module put together from its parts."""
        return self._put_together

    def _put_together(self, module: nn.Module, attend: Callable[..., Tensor], x: Tensor, *_: Any, **__: Any) -> Tensor:
        heads = self.head_count(module)
        q, k, v = _named(module, self.qkv)(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (rows, H, N, D) each
        norms, turns = (self.q_norm, self.k_norm), (self.rotary, self.rotary)
        for names in (turns, norms) if self.rotary_first else (norms, turns):
            q, k = (_part(module, name)(own) for name, own in zip(names, (q, k), strict=True))
        return _named(module, self.proj)(attend(q, k, v).transpose(1, 2).flatten(2))


def _part(module: nn.Module, name: str | None) -> Callable[[Tensor], Tensor]:
    """A module without it does nothing in its place, for all that is known; that it does what it should is checked."""
    part: Callable[[Tensor], Tensor] | None = None if name is None else getattr(module, name, None)
    return (lambda own: own) if part is None else part


def _named(module: nn.Module, name: str) -> Any:
    if not hasattr(module, name):
        raise UnsupportedPipeline(f"got a {type(module).__name__} without {name!r}; wanted what arrowhead.Attention names")
    return getattr(module, name)


@dataclass(frozen=True)
class Adapter:
    """What has to be known about a `torch.nn.Module` of one's own, so that plans can be searched for and put on it.

    The module's forward is a diffusion model's: one call for each denoising step, or two where the CFG branches come one after
    the other. Its sampler may be any loop, and may call `model.forward` directly.

    Args:
        attention: regular expressions for the paths of attention modules, each with how that kind is reached. Whatever is not
            named is left alone.
        tokens: `tokens(model, call)`, of a call's arguments by name, the visual tokens of a sample, and its text tokens where
            attention is joint; with their grid, `Tokens.of_grid`, where there are to be boxes.
        cfg: how the branches of classifier-free guidance come: in one batch, the conditional one first (`cond_first`) or last
            (`uncond_first`), or in `two_calls` of the model, the conditional one first. None without guidance.
        feed_forward: a regular expression for the feed-forwards, (B, N, C) each, where a budget may skip them, too.
        guidance_scale: how far apart the branches are driven, which budgets go by.
        latent_channels: how many of the output's channels (the second dimension) are a direction to go, where the others are a
            variance; None: all. Budgets go by these alone.
    """

    attention: Mapping[str, Attention]
    tokens: Callable[[Any, Mapping[str, Any]], Tokens]
    cfg: BranchOrder | None = None
    feed_forward: str = NONE
    guidance_scale: float = 1.0
    latent_channels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.attention, Mapping) or not all(isinstance(a, Attention) for a in self.attention.values()):
            raise InputsInvalid(
                f"got attention={self.attention!r:.200}, wanted regular expressions for paths, each with an arrowhead.Attention"
            )
        for pattern in (*self.attention, self.feed_forward):
            _require_pattern(pattern)
        if not callable(self.tokens):
            raise InputsInvalid(f"got tokens={self.tokens!r:.200}, wanted tokens(model, call), which gives arrowhead.Tokens")
        if self.cfg is not None and not (isinstance(self.cfg, str) and self.cfg in get_args(BranchOrder)):
            raise InputsInvalid(
                f"got cfg={self.cfg!r}, wanted one of {', '.join(get_args(BranchOrder))}, or None without guidance"
            )
        scale = self.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= torch.finfo(torch.float32).max:
            raise InputsInvalid(f"got guidance_scale={scale!r}, wanted a finite number")
        if self.latent_channels is not None and not _counts(self.latent_channels):
            raise InputsInvalid(
                f"got latent_channels={self.latent_channels!r}, wanted a number of 1 or more, or None for all channels"
            )


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require_pattern(pattern: Any) -> None:
    try:
        if isinstance(pattern, str) and re.compile(pattern):
            return
        why = "no text"
    except (re.error, OverflowError, RecursionError) as error:
        why = str(error)
    raise InputsInvalid(f"got the pattern {pattern!r:.200} ({why}), wanted a regular expression for paths of modules")


def matching(pattern: str, root: nn.Module) -> list[str]:
    """The paths that a pattern of an adapter names.

    Raises:
        UnsupportedPipeline: there are none.
    """
    if not (found := [path for path, _ in named_modules(root) if re.fullmatch(pattern, path)]):
        raise UnsupportedPipeline(
            f"got an adapter with {pattern!r}, which no path in a {type(root).__name__} matches; wanted a regular expression "
            "for whole paths, as model.named_modules() has them"
        )
    return found


def require_apart(adapter: Adapter, root: nn.Module) -> None:
    """Check that each module is named once, and none lies within another: it would be left out twice.

    Raises:
        UnsupportedPipeline: it is not so, or a pattern names nothing.
    """
    patterns = [*adapter.attention, *([] if adapter.feed_forward == NONE else [adapter.feed_forward])]
    paths = sorted(path for pattern in patterns for path in matching(pattern, root))
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
        f"got an adapter whose patterns name {wrong}; wanted attention modules and feed-forwards apart from one another"
    )


def tokens_of(adapter: Adapter, root: nn.Module, call: Mapping[str, Any]) -> Tokens:
    """What an adapter says of a call.

    Raises:
        InputsInvalid: it fails, or says something else.
    """
    try:
        found = adapter.tokens(root, call)
    except Exception as error:
        raise InputsInvalid(
            f"got {type(error).__name__} ({error}) from the adapter's tokens(model, call) with {', '.join(call)}; wanted "
            "arrowhead.Tokens"
        ) from error
    if not isinstance(found, Tokens):
        raise InputsInvalid(f"got a {type(found).__name__} from the adapter's tokens(model, call), wanted arrowhead.Tokens")
    return found


class CustomModel:
    """A module with its adapter, which stands where a pipeline does; its call generates by whatever callable it is given."""

    def __init__(self, transformer: nn.Module, adapter: Adapter) -> None:
        self.transformer, self.adapter = transformer, adapter

    def __call__(self, generate: Callable[[], Any]) -> Any:
        """Generate once."""
        return generate()


def with_adapter(pipe: Any, adapter: Adapter | None) -> Any:
    """What stands for a pipeline: itself, or a module with its adapter.

    Raises:
        UnsupportedPipeline: a module comes without an adapter, or an adapter with what is no module.
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
