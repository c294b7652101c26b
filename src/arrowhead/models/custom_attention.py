"""How the attention of a custom model is described: its modules, and functions that its modules call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, get_args

from torch import Tensor, nn

from arrowhead.errors import InputsInvalid, UnsupportedPipeline

Over = Literal["all", "space", "time"]
Forward = Callable[..., Any]
"""A forward that replaces a module's: `forward(module, attend, *args, **kwargs)`, with the arguments of the module's call."""
Layout = Literal["BHND", "BNHD"]
"""The order of batch, heads, tokens and channels in the tensors that an attention function takes and gives."""
SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class CalledFunction:
    """A function that a module calls, by its name. `layout` is that of its tensors, where it is the attention itself.

    Without `layout` torch's attention is called within the function.
    """

    name: str
    layout: Layout | None


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
        function: the name of the function that the module's code calls for softmax attention, in place of torch's, such as
            `flash_attention` or `memory_efficient_attention`. Its first three parameters are q, k and v; it gives what q is.
        layout: the order of the dimensions of the function's tensors: "BNHD", as in flash-attn and xformers, or "BHND".

    Raises:
        InputsInvalid: an argument is none of these.

    >>> Attention(function="flash_attention", layout="BNHD").function
    'flash_attention'
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
    function: str | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        _require_sizes(self)
        if (self.function is None) != (self.layout is None) or not isinstance(self.function, str | None):
            raise InputsInvalid(
                f"got function={self.function!r:.200} with layout={self.layout!r:.200}, wanted the function's name with the "
                "order of its dimensions, BNHD or BHND; or neither, where torch's attention is called"
            )
        if self.function is not None and self.forward is not None:
            raise InputsInvalid(f"got function={self.function!r:.200} with a forward, wanted one of them")
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
        return _head_count(self.heads, module, "arrowhead.Attention")

    def called_function(self) -> CalledFunction | None:
        """The function that is the module's attention; None where torch's is."""
        return None if self.function is None else CalledFunction(self.function, self.layout)

    def replacement_forward(self) -> Forward | None:
        """The forward that replaces a module's; None where the module's own runs."""
        return self.forward


@dataclass(frozen=True)
class FusedQKV(Attention):
    """Self-attention with one linear layer for Q, K and V, described by the names of the module's parts.

    The module computes, from its input x (rows, N, C): `qkv(x)` with columns in the order (3, H, D), norms and rotary
    embeddings of Q and K, softmax attention, and the output projection. A forward that calls these parts replaces the module's,
    and the results of both are compared on the first input. The arguments of `Attention` apply, except `forward`,
    `projections`, `function` and `layout`.

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
    function: None = field(default=None, init=False)
    layout: None = field(default=None, init=False)
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


@dataclass(frozen=True)
class AttentionIn:
    r"""Self-attention that is a function, called in the code of a module which is no attention module, such as a block.

    The site is the call of the function. Reuse repeats what the function gave, so that the projections around it are computed
    in every step. Nothing but the module sees another function: the module gets a class of its own, whose functions are clones.

    Args:
        pattern: a regular expression for whole paths of the modules whose code calls the function once. Functions of the same
            file that this code calls belong to it; methods of other modules do not.
        function: the function's name, as the code has it: `attention` for `attention(q, k, v)` and `ops.attention(q, k, v)`.
        heads: the number of heads H, or the name of the module's attribute that holds it, with dots for parts of parts.
        head_dim: channels of a head, D, or the attribute that holds it. None: the input of the module's first linear layer has
            H · D channels.
        over: the axis that is attended along, see `Attention`.
        joint: whether text and visual tokens are attended together.
        layout: None where the function calls torch's `scaled_dot_product_attention` with queries, keys and values as they are
            attended. Where the function is the attention, the order of the dimensions of its tensors, "BNHD" or "BHND".

    Raises:
        InputsInvalid: an argument is none of these.

    FLUX from its own source, whose blocks project queries, keys and values, and call `attention(q, k, v, pe=pe)`:

    >>> AttentionIn(r"double_blocks\.\d+", function="attention", joint=True).heads
    'num_heads'
    """

    pattern: str
    function: str = SDPA
    heads: str | int = "num_heads"
    head_dim: str | int | None = None
    over: Over = "all"
    joint: bool = False
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.function, str) or not self.function.isidentifier():
            raise InputsInvalid(f"got function={self.function!r:.200}, wanted the name of a function, without dots")
        _require_sizes(self)

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """The number of heads, and the channels of each.

        Raises:
            UnsupportedPipeline: the module does not say them.
        """
        heads = _head_count(self.heads, module, "arrowhead.AttentionIn")
        found: Any = self.head_dim
        if isinstance(found, str):
            found = _attribute(module, found, _whole_numbers(module))
        elif found is None:
            first = next((layer for layer in module.modules() if isinstance(layer, nn.Linear)), None)
            found = first.in_features // heads if first is not None and first.in_features % heads == 0 else None
        if not at_least_one(found):
            raise UnsupportedPipeline(
                f"got a {type(module).__name__} with {found!r:.200} for the channels of each of {heads} heads; wanted a number "
                f"of 1 or more; say arrowhead.AttentionIn(head_dim=...){_whole_numbers(module)}"
            )
        return heads, int(found)

    def called_function(self) -> CalledFunction:
        """The function."""
        return CalledFunction(self.function, self.layout)


def _require_sizes(attention: Attention | AttentionIn) -> None:
    """Check the arguments that both have."""
    if not (isinstance(attention.heads, str) or at_least_one(attention.heads)):
        raise InputsInvalid(f"got heads={attention.heads!r:.200}, wanted a number of 1 or more, or the attribute that says it")
    for name in ("head_dim", "channels"):
        value = getattr(attention, name, None)
        named = isinstance(attention, AttentionIn) and isinstance(value, str)
        if value is not None and not at_least_one(value) and not named:
            raise InputsInvalid(f"got {name}={value!r:.200}, wanted a number of 1 or more, or None for what the layers say")
    if not isinstance(attention.over, str) or attention.over not in get_args(Over):
        raise InputsInvalid(f"got over={attention.over!r:.200}, wanted one of {', '.join(get_args(Over))}")
    if not isinstance(attention.joint, bool):
        raise InputsInvalid(f"got joint={attention.joint!r:.200}, wanted True or False")
    if attention.layout is not None and not (isinstance(attention.layout, str) and attention.layout in get_args(Layout)):
        raise InputsInvalid(f"got layout={attention.layout!r:.200}, wanted one of {', '.join(get_args(Layout))}, or None")


def _head_count(heads: str | int, module: nn.Module, described: str) -> int:
    found = heads if isinstance(heads, int) else _attribute(module, heads, _whole_numbers(module))
    if not at_least_one(found):
        raise UnsupportedPipeline(
            f"got a {type(module).__name__} whose {heads!r} is {found!r:.200}; wanted a number of 1 or more; name the "
            f"attribute that says it, or the number, as {described}(heads=...){_whole_numbers(module)}"
        )
    return int(found)


def _optional_part(module: nn.Module, name: str | None) -> Callable[[Tensor], Tensor]:
    """A part of a module; the identity where the module has none of that name. A wrong name shows in the comparison."""
    part: Callable[[Tensor], Tensor] | None = None if name is None else getattr(module, name, None)
    return (lambda tensor: tensor) if part is None else part


def _attribute(module: nn.Module, name: str, there: str | None = None) -> Any:
    """An attribute that an adapter names; `there` says which ones the module has, by default its parts."""
    try:
        return attrgetter(name)(module)
    except AttributeError:
        there = (
            f"; its parts are {', '.join(part for part, _ in module.named_children()) or 'none'}" if there is None else there
        )
        raise UnsupportedPipeline(
            f"got a {type(module).__name__} without {name!r:.200}; wanted what the adapter names{there:.400}"
        ) from None


def _whole_numbers(module: nn.Module) -> str:
    """The whole numbers of 1 or more among a module's attributes, for an error."""
    found = [f"{name}={value}" for name, value in vars(module).items() if name[0] != "_" and at_least_one(value)]
    return f"; its whole numbers are {', '.join(found) or 'none'}"


def at_least_one(value: Any) -> bool:
    """Whether a value is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
