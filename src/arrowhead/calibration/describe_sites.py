"""Which sites a watched run shows: attention by modules and functions, cross-attention, feed-forwards and blocks, as code."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arrowhead.calibration.watching import Attended, Called, Watched, as_batch, kind_of
from arrowhead.engine.adapter_checks import RowsAlone
from arrowhead.engine.changes import Changes
from arrowhead.engine.site_calls import ForwardSiteCall, ModuleCall, SiteCall
from arrowhead.engine.wrappers import Interception
from arrowhead.errors import ArrowheadError
from arrowhead.models.custom import Adapter, CustomModel
from arrowhead.models.custom_attention import SDPA, Attention, AttentionIn, FusedQKV
from arrowhead.models.find import find
from arrowhead.plans.layout import Site, Tokens
from arrowhead.upstream import named_modules

HEADS = ("num_heads", "heads", "n_heads", "num_attention_heads", "n_head", "nheads")
NORMS = (("q_norm", "k_norm"), ("norm_q", "norm_k"), ("ln_q", "ln_k"), ("query_norm", "key_norm"))


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one sample: numbers of visual and text tokens and of frames, and the code that counts them."""

    visual: int
    text: int
    frames: int
    code: str


@dataclass
class Found:
    """The sites as code, by patterns for their paths; `functions` have theirs in the code. `frames`: some attend in them."""

    attention: dict[str, str] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    cross_attention: dict[str, str] = field(default_factory=dict)
    feed_forward: str = ""
    blocks: dict[str, str] = field(default_factory=dict)
    frames: bool = False


def raw(text: str) -> str:
    """A regular expression as Python spells it."""
    return f'r"{text}"'


def sites_code(watched: Watched, layout: TokenLayout, guided: bool, notes: list[str]) -> Found:
    """The sites of a watched run. `guided`: both branches come in one batch. What is left out is noted."""
    return _Sites(watched, layout, guided, notes).found()


class _Sites:
    def __init__(self, watched: Watched, layout: TokenLayout, guided: bool, notes: list[str]) -> None:
        self._watched, self._layout, self._guided, self._notes = watched, layout, guided, notes
        latents = as_batch(watched.latents)
        assert latents is not None
        self._samples = len(latents)
        self._by_module: dict[str, str] = {}
        self._by_function: dict[str, str] = {}
        self._crossed: dict[str, str] = {}
        self._works: dict[tuple[str, str], str | None] = {}

    def found(self) -> Found:
        """All kinds of sites."""
        by_path: dict[str, list[Attended]] = {}
        for each in self._watched.attended:
            by_path.setdefault(each.path, []).append(each)
        for path, events in by_path.items():
            self._attention(path, events)
        feed_forward = {path: "" for path in self._watched.modules if self._is_feed_forward(path)}
        outermost = {path: "" for path in feed_forward if not any(path.startswith(f"{other}.") for other in feed_forward)}
        blocks = {path: code for path in self._watched.modules if (code := self._block(path, [*outermost])) is not None}
        result = Found(frames=any("over=" in code for code in [*self._by_module.values(), *self._by_function.values()]))
        result.attention = dict(self._patterns(self._by_module))
        result.functions = [code.replace("PATTERN", raw(pattern)) for pattern, code in self._patterns(self._by_function)]
        result.cross_attention = dict(self._patterns(self._crossed))
        result.feed_forward = "|".join(pattern for pattern, _ in self._patterns(outermost))
        result.blocks = dict(self._patterns(blocks))
        return result

    def _patterns(self, found: Mapping[str, str]) -> list[tuple[str, str]]:
        """Patterns that match these paths and no others, each with the code that the paths have in common."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for path, code in found.items():
            grouped.setdefault((kind_of(path), code), []).append(path)
        every = [path for path, _ in named_modules(self._watched.model)]
        return [
            (kind if {*paths} == {p for p in every if re.fullmatch(kind, p)} else "|".join(map(re.escape, paths)), code)
            for (kind, code), paths in grouped.items()
        ]

    def _note(self, path: str, what: str) -> None:
        cls = type(self._watched.model.get_submodule(path)).__name__
        self._notes.append(f"{kind_of(path) or 'the model itself'} ({cls}): {what}; left out.".replace("\\.", "."))

    def _attention(self, path: str, events: Sequence[Attended]) -> None:
        event = events[0]
        queries, keys = lengths(event)
        if queries != keys or event.q[0] != events[-1].q[0] or event.k != events[-1].k:
            self._cross_attention(path, keys)
        elif len(events) > 1 or (path in self._watched.modules and self._watched.modules[path].times > 1):
            self._note(path, "it attends several times in one call of the model")
        elif (over := self._over(path, event.q[0], queries)) is not None:
            self._self_attention(path, event, over)

    def _over(self, path: str, rows: int, tokens: int) -> str | None:
        """The code for the axis, and for whether text is among the tokens; None where neither fits."""
        layout, samples = self._layout, self._samples
        space = layout.visual // layout.frames
        if rows == samples and tokens == layout.visual + layout.text:
            return ", joint=True" if layout.text else ""
        if rows == samples and tokens == layout.visual:
            return ""
        in_space = (rows, tokens) == (samples * layout.frames, space)
        along_time = (rows, tokens) == (samples * space, layout.frames)
        if in_space and along_time:
            self._notes.append(
                f"Whether {kind_of(path)} attends in space or along time: there are as many frames as places in one; space was "
                "taken; watch a run with another number of frames."
            )
        if in_space or along_time:
            return f', over="{"space" if in_space else "time"}"'
        self._note(path, f"it attends over {tokens} tokens in {rows} rows, which are neither all tokens nor frames")
        return None

    def _self_attention(self, path: str, event: Attended, over: str) -> None:
        module = self._watched.model.get_submodule(path)
        layout = function_layout(module, event)
        heads, width = head_sizes(event, layout)
        said = f"heads={_attribute_with(module, heads)!r}{over}"
        tried = [f"arrowhead.{code}" for code in module_codes(module, event, layout, said, heads, width)]
        whys = []
        for code in tried:
            if (why := self._why_not(path, Adapter({re.escape(path): _made(code)}, self._tokens), code)) is None:
                self._by_module[path] = code
                return
            whys.append(why)
        function = event.through[0] if event.through else SDPA if event.how == "torch" else None
        if function is not None:
            at = f", layout={layout!r}" if layout else ""
            first = next((layer for layer in module.modules() if isinstance(layer, nn.Linear)), None)
            told = width is None or (first is not None and first.in_features == heads * width)
            size = "" if told else f", head_dim={width}"
            code = f"arrowhead.AttentionIn(PATTERN, function={function!r}, {said}{size}{at})"
            made = _made(code.replace("PATTERN", repr(re.escape(path))))
            if (why := self._why_not(path, Adapter(functions=[made], tokens=self._tokens), code)) is None:
                self._by_function[path] = code
                return
            whys.append(why)
        self._note(path, whys[-1] if whys else "it multiplies queries and keys itself; give an arrowhead.Attention a forward")

    def _tokens(self, *_: Any) -> Tokens:
        return Tokens(self._layout.visual, self._layout.text, frames=self._layout.frames)

    def _why_not(self, path: str, adapter: Adapter, code: str) -> str | None:
        """Why an adapter's site at this path does not work in the call that was watched; None where it does."""
        key = kind_of(path), code
        if key not in self._works:
            self._works[key] = self._tried(path, adapter)
        return self._works[key]

    @torch.no_grad()
    def _tried(self, path: str, adapter: Adapter) -> str | None:
        calls: list[SiteCall] = []

        def around(call: SiteCall) -> Any:
            calls.append(call)
            return call.native()

        module, called = self._watched.model.get_submodule(path), self._watched.modules.get(path)
        if called is None or called.arguments is None:
            return "its forward was never called"
        args, kwargs = called.arguments
        try:
            changes = Changes()
            with changes, changes:
                Interception(find(CustomModel(self._watched.model, adapter)), around).install(changes)
                module(*args, **kwargs)
                if not calls or not isinstance(calls[0], ForwardSiteCall):
                    return "the function was never called"
                hooked, own = calls[0].run(lambda attention: attention.native()), calls[0].native()
        except ArrowheadError as error:
            return str(error)
        same = isinstance(hooked, Tensor) and isinstance(own, Tensor) and torch.allclose(hooked, own, rtol=1e-2, atol=1e-3)
        return None if same else "its attention could not be hooked"

    def _cross_attention(self, path: str, keys: int) -> None:
        layers = self._layers(path)
        text = [name for name, shape in layers.items() if shape[-2:-1] == (keys,)]
        called = self._watched.modules.get(path)
        whole = called is not None and called.times == 1 and called.outputs[0] is not None
        if not (whole and text and len(text) < len(layers) and called.outputs[0][:2] == (self._samples, self._layout.visual)):  # type: ignore[union-attr, index]
            self._note(path, "cross-attention whose layers for the text are not told by the number of their tokens")
        elif self._runs_alone(path):
            self._crossed[path] = raw("|".join(map(re.escape, text)))
        else:
            self._note(path, "cross-attention that cannot run for the rows of one CFG branch alone")

    def _layers(self, path: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs of the linear layers within a module."""
        within = f"{path}." if path else ""
        return {name.removeprefix(within): s for name, s in self._watched.layers.items() if name.startswith(within)}

    def _runs_alone(self, path: str) -> bool:
        """Whether a module can run for half of its rows, as it has to where the branches share; asked of its kind's first."""
        first = next((p for p, c in self._watched.modules.items() if kind_of(p) == kind_of(path) and c.arguments), None)
        if not self._guided or first is None:
            return True
        key = kind_of(path), "alone"
        if key not in self._works:
            module, (args, kwargs) = (
                self._watched.model.get_submodule(first),
                self._watched.modules[first].arguments or ((), {}),
            )
            call = ModuleCall(Site(first, 1, 1, 1), module, module.forward, args, kwargs)
            try:
                RowsAlone(nullcontext)(call, slice(0, call.batch // 2))
                self._works[key] = None
            except ArrowheadError as error:
                self._works[key] = str(error)
        return self._works[key] is None

    @property
    def _attending(self) -> list[str]:
        return [*self._by_module, *self._by_function]

    def _is_feed_forward(self, path: str) -> bool:
        """Whether a module beside attention, with two linear layers or more, works on the visual tokens."""
        parent, called, layers = path.rpartition(".")[0], self._watched.modules[path], self._layers(path)
        beside = any(f"{each}.".startswith(f"{parent}.") for each in self._attending) if parent else False
        beside = beside or any(path.startswith(f"{each}.") for each in self._by_function)
        around = any(each == path or each.startswith(f"{path}.") for each in [*self._attending, *self._crossed])
        within = any(path.startswith(f"{each}.") for each in [*self._by_module, *self._crossed])
        if not beside or around or within or called.times > 1 or len(layers) < 2:
            return False
        tokens = self._samples, self._layout.visual
        out = called.outputs[0] if len(called.outputs) == 1 else None
        return out is not None and len(out) == 3 and out[:2] == tokens and all(shape[:2] == tokens for shape in layers.values())

    def _block(self, path: str, feed_forward: Sequence[str]) -> str | None:
        """The code of a numbered module around attention, whose outputs continue its inputs; None where it is none."""
        called = self._watched.modules[path]
        inner = [each for each in self._attending if each == path or each.startswith(f"{path}.")]
        if not path.rpartition(".")[2].isdigit() or not inner or path in self._by_module or called.times > 1:
            return None
        first = next(p for p, c in self._watched.modules.items() if kind_of(p) == kind_of(path) and c.arguments)
        inputs = continued(self._watched.model.get_submodule(first), self._watched.modules[first])
        if inputs is None or len(inputs) != len(called.outputs):
            return None
        visual, text = self._layout.visual, self._layout.text
        counts = [out[1] for out in called.outputs if out is not None and len(out) == 3]
        sites = [*self._by_module, *self._crossed, *feed_forward]
        own = {
            name: shape
            for name, shape in self._layers(path).items()
            if not f"{path}.{name}".startswith(tuple(f"{site}." for site in sites))
        }
        per_sample = [name for name, shape in own.items() if len(shape) == 2 or shape[1] == 1]
        of_text = [name for name, shape in own.items() if name not in per_sample and text and shape[1] == text]
        known = {visual, text, visual + text if any(n == visual + text for n in counts) or len(counts) == 1 else visual}
        strange = [name for name, shape in own.items() if name not in per_sample and shape[1] not in known]
        if sum(counts) not in (visual, visual + text) or strange:
            self._note(path, f"a block whose layers {', '.join(strange) or 'and outputs'} have other tokens")
            return None
        if not self._runs_alone(path):
            self._note(path, "a block that cannot run for the rows of one CFG branch alone")
            return None
        parts = [f"inputs={inputs if len(inputs) > 1 else inputs[0]!r}"]
        parts += ["joint=True"] if text and sum(counts) == visual + text else []
        parts += [f"text={raw('|'.join(map(re.escape, of_text)))}"] if of_text else []
        parts += [f"per_sample={raw('|'.join(map(re.escape, per_sample)))}"] if per_sample else []
        return f"arrowhead.Block({', '.join(parts)})"


def lengths(event: Attended) -> tuple[int, int]:
    """The numbers of queries and of keys."""
    if event.how == "softmax":
        return event.q[2], event.q[3]
    axis = 2 if event.how == "torch" or event.q[1] < event.q[2] else 1
    return event.q[axis], event.k[axis]


def function_layout(module: nn.Module, event: Attended) -> str | None:
    """The layout of the function's tensors, where the function is the attention itself."""
    given = event.function_q
    if event.how == "torch" or given is None or len(given) != 4:
        return None
    if event.how == "softmax":
        return "BNHD" if given[2] == event.q[1] and given[1] == event.q[2] else "BHND"
    heads = [value for name in HEADS if isinstance(value := getattr(module, name, None), int)]
    return "BHND" if given[1] in heads and given[2] not in heads else "BNHD"


def head_sizes(event: Attended, layout: str | None) -> tuple[int, int | None]:
    """The number of heads, and the channels of each where they are seen."""
    if event.how == "torch":
        return event.q[1], event.q[3]
    given = event.function_q
    if given is not None and len(given) == 4:
        return given[2 if layout == "BNHD" else 1], given[3]
    return event.q[1], None


def module_codes(module: nn.Module, event: Attended, layout: str | None, said: str, heads: int, width: int | None) -> list[str]:
    """Code that may describe a module as an attention module: it has to have the four projections."""
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    weights = sum(layer.in_features * layer.out_features for layer in linears.values())
    first = next(iter(linears.values()), None)
    if (
        first is None
        or weights % (4 * first.in_features * heads)
        or weights != 4 * first.in_features * heads * (width or weights // (4 * first.in_features * heads))
    ):
        return []
    if event.how == "torch":
        return [f"Attention({said})"]
    if event.through:
        return [f"Attention({said}, function={event.through[0]!r}, layout={layout!r})"]
    fused = next((name for name, layer in linears.items() if layer.out_features == 3 * layer.in_features), None)
    out = next((name for name in linears if name != fused), None)
    if fused is None or out is None or len(linears) != 2:
        return []
    parts = "" if fused == "qkv" else f", qkv={fused!r}"
    parts += "" if out == "proj" else f", proj={out!r}"
    q, k = next((pair for pair in NORMS if all(hasattr(module, name) for name in pair)), (None, None))
    norms = f", q_norm={q!r}, k_norm={k!r}" if q else ""
    rotary = [
        name
        for name in {**vars(module), **dict(module.named_children())}
        if re.search("rot|rope", name) and callable(getattr(module, name))
    ]
    turned = [f", rotary={name!r}{first}" for name in rotary for first in ("", ", rotary_first=True")]
    return [f"FusedQKV({said}{parts}{more}{turn})" for turn in ["", *turned] for more in ([norms, ""] if norms else [""])]


def continued(module: nn.Module, called: Called) -> tuple[str | int, ...] | None:
    """For each output of a block, the argument that it is most like of those with its shape; None where one has none."""
    args, kwargs = called.arguments or ((), {})
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    given: dict[str | int, Any] = {names[i] if i < len(names) else i: value for i, value in enumerate(args)}
    given.update(kwargs)
    tokens = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim == 3}
    outs = called.out if isinstance(called.out, tuple) else (called.out,)
    found: list[str | int | None] = []
    for out in outs:
        free = [name for name in tokens if name not in found]
        alike = [name for name in free if isinstance(out, Tensor) and tokens[name].shape == out.shape]
        found.append(max(alike, key=lambda name: _likeness(out, tokens[name]), default=None) if out is not None else None)
    for place, out in enumerate(outs):
        if out is None:
            found[place] = next((name for name in tokens if name not in found), None)
    return tuple(found) if all(name is not None for name in found) else None  # type: ignore[arg-type]


def _likeness(out: Tensor, given: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(out.flatten().float(), given.flatten().float(), 0))


def _attribute_with(module: nn.Module, value: int) -> str | int:
    """The attribute of a module, or of a part of it, that holds the number of heads; the number where there is none."""
    for path, part in module.named_modules():
        for name in HEADS:
            if vars(part).get(name) == value:
                return f"{path}.{name}" if path else name
    return value


def _made(code: str) -> Any:
    """What a line of the code makes."""
    makers: dict[str, Callable[..., Any]] = {"Attention": Attention, "AttentionIn": AttentionIn, "FusedQKV": FusedQKV}
    return eval(code.replace("arrowhead.", ""), makers)  # code that was put together here
