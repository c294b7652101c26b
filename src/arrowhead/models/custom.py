"""Custom models: a torch module that is no pipeline, with an adapter that says where its attention is and how it is called."""

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
"""A forward that replaces a module's: `forward(module, attend, *args, **kwargs)`, with the arguments of the module's call."""


@dataclass(frozen=True)
class Attention:
    """One kind of self-attention module in a custom model: its sizes, and how its queries, keys and values are reached.

    Without `forward`, a module with one of diffusers' attention processors is reached in the processor, and any other module at
    its call of `torch.nn.functional.scaled_dot_product_attention`. A module that multiplies queries and keys without that
    function needs a `forward`, or a `FusedQKV` where it has the parts that a `FusedQKV` names.

    Args:
        heads: the number of heads H, or the name of the module's attribute that holds it.
        head_dim: channels of a head, D. None: all the module's linear layers together are taken for the projections of Q, K,
            V and output, and D follows from their sizes.
        channels: channels of the module's input, C. None: those of its first linear layer.
        over: the axis that the module attends along. A row of its input (rows, N, C) is a sample (`all`), one frame of a sample
            (`space`), or one position of a sample in all frames (`time`); the rows of a sample follow one another.
        joint: whether the module attends over text and visual tokens together.
        projections: whether the module projects Q, K, V and its output. False: they are projected elsewhere. FLOPs then count
            the linear layers that there are in the module, if any, and `head_dim` has to be given.
        forward: `forward(module, attend, *args, **kwargs)`, which replaces the module's forward. It computes the same, and
            calls `attend(q, k, v, attn_mask=None, scale=None)` for the softmax attention: q, k, v and the result are
            (rows, H, N, D), of the same dtype. The results of both forwards are compared on the first input.

    Raises:
        InputsInvalid: an argument is none of these.

    >>> Attention(heads="n_head", over="space").heads
    'n_head'

    A module that does not call `scaled_dot_product_attention`:

        def forward(module, attend, x):  # x: (rows, N, C)
            q, k, v = (layer(x).unflatten(-1, (8, -1)).transpose(1, 2) for layer in (module.q, module.k, module.v))
            return module.out(attend(q, k, v).transpose(1, 2).flatten(2))

        attention = arrowhead.Attention(heads=8, forward=forward)
    """

    heads: str | int = "num_heads"
    head_dim: int | None = None
    channels: int | None = None
    over: Over = "all"
    joint: bool = False
    forward: Forward | None = None
    projections: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.heads, str) or _at_least_one(self.heads)):
            raise InputsInvalid(f"got heads={self.heads!r:.200}, wanted a number of 1 or more, or the attribute that says it")
        for name in ("head_dim", "channels"):
            if (value := getattr(self, name)) is not None and not _at_least_one(value):
                raise InputsInvalid(f"got {name}={value!r:.200}, wanted a number of 1 or more, or None for what the layers say")
        if not isinstance(self.over, str) or self.over not in get_args(Over):
            raise InputsInvalid(f"got over={self.over!r:.200}, wanted one of {', '.join(get_args(Over))}")
        if not isinstance(self.joint, bool):
            raise InputsInvalid(f"got joint={self.joint!r:.200}, wanted True or False")
        if not isinstance(self.projections, bool):
            raise InputsInvalid(f"got projections={self.projections!r:.200}, wanted True or False")
        if not self.projections and self.head_dim is None:
            raise InputsInvalid("got projections=False without head_dim, wanted the channels of a head, which no layers tell")
        if self.forward is not None and not callable(self.forward):
            raise InputsInvalid(f"got forward={self.forward!r:.200}, wanted forward(module, attend, *args, **kwargs), or None")

    def head_count(self, module: nn.Module) -> int:
        """The number of the module's heads.

        Raises:
            UnsupportedPipeline: the module has no such attribute, or the attribute is no number of 1 or more.
        """
        found = self.heads if isinstance(self.heads, int) else _attribute(module, self.heads, _whole_numbers(module))
        if not _at_least_one(found):
            raise UnsupportedPipeline(
                f"got a {type(module).__name__} whose {self.heads!r} is {found!r:.200}; wanted a number of 1 or more; name the "
                f"attribute that says it, or the number, as arrowhead.Attention(heads=...){_whole_numbers(module)}"
            )
        return int(found)

    def replacement_forward(self) -> Forward | None:
        """The forward that replaces a module's; None where the module's own runs."""
        return self.forward


@dataclass(frozen=True)
class FusedQKV(Attention):
    """Self-attention with one linear layer for Q, K and V, described by the names of the module's parts.

    The module computes, from its input x (rows, N, C): `qkv(x)` with columns in the order (3, H, D), norms and rotary
    embeddings of Q and K, softmax attention, and the output projection. A forward that calls these parts replaces the module's,
    and the results of both are compared on the first input. The arguments of `Attention` apply, except `forward` and
    `projections`.

    Args:
        qkv: the name of the layer for Q, K and V in the module; the other names likewise.
        q_norm: the norm of queries (rows, H, N, D). There is none where the name is None, or the module lacks such a part.
        k_norm: the norm of keys, likewise.
        rotary: the rotary embedding, called with queries and with keys (rows, H, N, D), likewise.
        rotary_first: whether the rotary embedding comes before the norms.
        proj: the name of the output projection.

    Raises:
        InputsInvalid: an argument is none of these.

    >>> FusedQKV(q_norm="q_norm", k_norm="k_norm", rotary="rope").qkv
    'qkv'
    """

    forward: None = field(default=None, init=False)
    projections: bool = field(default=True, init=False)
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
            raise InputsInvalid(
                f"got {wrong!r:.200}, wanted names of a module's parts, or None for norms and rotary that it lacks"
            )
        if not isinstance(self.rotary_first, bool):
            raise InputsInvalid(f"got rotary_first={self.rotary_first!r:.200}, wanted True or False")

    def replacement_forward(self) -> Forward:
        """The forward that calls the module's parts."""
        return self._forward_by_parts

    def _forward_by_parts(self, module: nn.Module, attend: Callable[..., Tensor], x: Tensor, *_: Any, **__: Any) -> Tensor:
        heads = self.head_count(module)
        q, k, v = _attribute(module, self.qkv)(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (rows, H, N, D) each
        norms, rotary = (self.q_norm, self.k_norm), (self.rotary, self.rotary)
        for q_part, k_part in (rotary, norms) if self.rotary_first else (norms, rotary):
            q, k = _optional_part(module, q_part)(q), _optional_part(module, k_part)(k)
        return _attribute(module, self.proj)(attend(q, k, v).transpose(1, 2).flatten(2))  # (rows, N, H·D) to (rows, N, C)


def _optional_part(module: nn.Module, name: str | None) -> Callable[[Tensor], Tensor]:
    """A part of a module; the identity where the module has none of that name. A wrong name shows in the comparison."""
    part: Callable[[Tensor], Tensor] | None = None if name is None else getattr(module, name, None)
    return (lambda tensor: tensor) if part is None else part


def _attribute(module: nn.Module, name: str, there: str | None = None) -> Any:
    """An attribute that an adapter names; `there` says which ones the module has, by default its parts."""
    if not hasattr(module, name):
        there = (
            f"; its parts are {', '.join(part for part, _ in module.named_children()) or 'none'}" if there is None else there
        )
        raise UnsupportedPipeline(
            f"got a {type(module).__name__} without {name!r:.200}; wanted what arrowhead.Attention names{there:.400}"
        )
    return getattr(module, name)


def _whole_numbers(module: nn.Module) -> str:
    """The whole numbers of 1 or more among a module's attributes, for an error."""
    found = [f"{name}={value}" for name, value in vars(module).items() if name[0] != "_" and _at_least_one(value)]
    return f"; its whole numbers are {', '.join(found) or 'none'}"


@dataclass(frozen=True)
class Adapter:
    r"""The description of a custom model: a diffusion transformer, any `torch.nn.Module`, that no supported pipeline calls.

    The model's forward is called once for each denoising step, or twice where the CFG branches come one after the other. Its
    first argument are the latents, a tensor (B, …) or a list with one for each image; so is its output, or the output's first
    entry. The loop around the model may be any code, and may call `model.forward` directly.

    Args:
        attention: by regular expressions for whole paths (as in `model.named_modules()`), the self-attention modules, each kind
            with an `Attention`. Modules that no expression matches are computed in every step.
        tokens: `tokens(model, call)`, with the arguments of the model's call by name, gives the tokens of one sample: the
            visual ones, and the text ones where attention is joint. Boxes need their grid, see `Tokens.of_grid`.
        cfg: how the branches of classifier-free guidance come: in one batch, the conditional rows first (`cond_first`) or last
            (`uncond_first`), or in two calls, the conditional one first (`two_calls`). None: without guidance. Both branches
            start from the same latents, which are compared in the first two steps, so a wrong number of branches or calls is
            refused. Which branch comes first cannot be told from latents, and is taken as said.
        feed_forward: a regular expression for the paths of feed-forwards of visual tokens (B, N, C), which a budget may then
            reuse, too. By default there are none.
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
                f"got cfg={self.cfg!r:.200}, wanted one of {', '.join(get_args(BranchOrder))}, or None without guidance"
            )
        scale = self.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= torch.finfo(torch.float32).max:
            raise InputsInvalid(f"got guidance_scale={scale!r:.200}, wanted a finite number")
        if self.latent_channels is not None and not _at_least_one(self.latent_channels):
            raise InputsInvalid(
                f"got latent_channels={self.latent_channels!r:.200}, wanted a number of 1 or more, or None for all channels"
            )


def _at_least_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require_pattern(pattern: Any) -> None:
    try:
        if isinstance(pattern, str) and re.compile(pattern):
            return
        why = "no text"
    except (re.error, OverflowError, RecursionError) as error:
        why = str(error)
    raise InputsInvalid(f"got the pattern {pattern!r:.200} ({why}), wanted a regular expression for paths of modules")


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


def require_separate(adapter: Adapter, root: nn.Module) -> None:
    """Check that an adapter names each module once, and no module within another one.

    Raises:
        UnsupportedPipeline: a module is named twice or lies within another one, or a pattern matches nothing.
    """
    patterns = [*adapter.attention, *([] if adapter.feed_forward == NONE else [adapter.feed_forward])]
    paths = sorted(path for pattern in patterns for path in matching_paths(pattern, root))
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
