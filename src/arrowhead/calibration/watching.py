"""Watches one run of a custom model: how it is called, which of its modules attend, and by which functions."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from arrowhead.calibration.isolation import preserve_rng
from arrowhead.engine.attention_hook import is_attention
from arrowhead.engine.changes import Changes
from arrowhead.engine.compile_boundary import force_eager
from arrowhead.errors import InputsInvalid
from arrowhead.upstream import named_modules

CALLS = 4
"""The number of calls of the model whose arguments are kept: two steps of two calls."""
FUNCTION = re.compile(r"att", re.IGNORECASE)
"""What the names of functions contain that may be attention by a kernel, which torch does not see."""


@dataclass(frozen=True)
class Attended:
    """One call of attention: in the code of the module at `path`, through the functions `through`, outermost first.

    `how`: by torch's attention ("torch"), by a softmax that is written out ("softmax"), or by a function that torch does not
    see ("function"). `q` and `k` are shapes: (B, H, N, D) for torch's, the scores' (B, H, N, M) for a softmax, or those of the
    function's first two arguments. `function_q` is the shape of the queries that the outermost function is given.
    """

    path: str
    how: str
    q: tuple[int, ...]
    k: tuple[int, ...]
    through: tuple[str, ...]
    function_q: tuple[int, ...] | None


@dataclass
class Called:
    """The first call of a module: the shapes of its outputs, and, of the first module of each kind, the call itself."""

    outputs: tuple[tuple[int, ...] | None, ...]
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    out: Any = None
    times: int = 1


@dataclass
class Watched:
    """What one run showed. `calls` are the arguments of the model's calls by name, `layers` the inputs' shapes of layers."""

    model: nn.Module
    calls: list[dict[str, Any]] = field(default_factory=list)
    out: Any = None
    attended: list[Attended] = field(default_factory=list)
    modules: dict[str, Called] = field(default_factory=dict)
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    moved: Tensor | None = None  # the tokens of the first attention that the latents reach

    @property
    def latents(self) -> Any:
        """The first argument of the first call."""
        return next(iter(self.calls[0].values()))


def kind_of(path: str) -> str:
    """A regular expression for the paths of all modules of a kind: numbers stand for any numbers."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in path.split(".")) if path else ""


def watch(model: nn.Module, run: Callable[[], Any]) -> Watched:
    """Run once, and watch the model's calls; the first call of the model is looked into.

    Raises:
        InputsInvalid: the run does not call the model, or its first argument is no latents.
    """
    watched, own = Watched(model), model.forward
    signature = inspect.signature(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        first = not watched.calls
        if len(watched.calls) < CALLS:
            watched.calls.append({name: _kept(value) for name, value in bound.arguments.items()})
        if not first:
            return own(*args, **kwargs)
        if as_batch(watched.latents) is None:
            raise _not_watched(f"a {type(watched.latents).__name__} that is no latents as the first argument")
        with _looked_into(watched):
            out = watched.out = own(*args, **kwargs)
        watched.moved = _moved(watched, own, args, kwargs)
        return out

    changes = Changes()
    before = vars(model).get("forward")
    with changes, force_eager():
        preserve_rng(None, next(model.parameters()).device, changes)
        model.forward = forward
        try:
            run()
        finally:
            if before is None:
                del model.forward
            else:
                model.forward = before
            changes.undo()
    if not watched.calls:
        raise _not_watched("no call of the model")
    return watched


def _not_watched(got: str) -> InputsInvalid:
    return InputsInvalid(
        f"got {got} in the run, wanted calls of model(latents, ...), with latents (B, ...) or a list; watch the module that is "
        "called in each step"
    )


def as_batch(latents: Any) -> Tensor | None:
    """Latents as one tensor (B, ...); None where they are none."""
    if isinstance(latents, list) and latents and all(isinstance(each, Tensor) for each in latents):
        latents = torch.stack(latents) if len({each.shape for each in latents}) == 1 else None
    return latents if isinstance(latents, Tensor) and latents.ndim > 2 and latents.is_floating_point() else None


def _kept(value: Any) -> Any:
    """An argument as it is now: the loop may write into it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_kept(each) for each in value] if isinstance(value, list) else value


@contextmanager
def _looked_into(watched: Watched) -> Iterator[None]:
    root, kinds = watched.model, set[str]()
    handles = []

    def after(path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if isinstance(module, nn.Linear):
            watched.layers.setdefault(path, tuple(args[0].shape) if args else ())
        elif path in watched.modules:
            watched.modules[path].times += 1
        else:
            outs = out if isinstance(out, tuple) else (out,)
            called = watched.modules[path] = Called(tuple(tuple(o.shape) if isinstance(o, Tensor) else None for o in outs))
            if kind_of(path) not in kinds:
                kinds.add(kind_of(path))
                called.arguments, called.out = (args, kwargs), out

    for path, module in named_modules(root):
        if module is not root:
            handles.append(
                module.register_forward_hook(lambda m, a, k, o, path=path: after(path, m, a, k, o), with_kwargs=True)
            )
    seen, before = _Seen(watched), sys.getprofile()
    try:
        with seen:
            sys.setprofile(seen.profile)
            yield
    finally:
        sys.setprofile(before)
        for handle in handles:
            handle.remove()
    known = {each.path for each in watched.attended}
    watched.attended += [each for path, each in seen.functions.items() if path not in known]


class _Seen(TorchFunctionMode):
    """Notes calls of torch's attention, of softmax over scores, and of functions that may be attention, with their places."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self._watched = watched
        self._paths = {id(module): path for path, module in named_modules(watched.model)}
        self.functions: dict[str, Attended] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if is_attention(function):
            named = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self._note("torch", named["query"], named["key"], inspect.currentframe())
        elif name == "softmax" and args and args[0].ndim == 4:
            self._note("softmax", args[0], args[0], inspect.currentframe())
        return function(*args, **(kwargs or {}))

    def _note(self, how: str, q: Tensor, k: Tensor, frame: FrameType | None) -> None:
        if (where := self._where(frame)) is not None:
            path, through, given = where
            self._watched.attended.append(Attended(path, how, tuple(q.shape), tuple(k.shape), through, given))

    def _where(self, frame: FrameType | None) -> tuple[str, tuple[str, ...], tuple[int, ...] | None] | None:
        """The module whose code is running, and the functions between it and this frame that are given three tensors."""
        through: list[str] = []
        given = None
        while frame is not None:
            if (path := self._paths.get(id(frame.f_locals.get("self")))) is not None:
                return path, tuple(reversed(through)), given
            tensors = _three_tensors(frame)
            if tensors is not None:
                through.append(_name_in_caller(frame))
                given = tuple(tensors[0].shape)
            frame = frame.f_back
        return None

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        """Notes a function of Python that is given queries, keys and values, as `sys.setprofile` calls it."""
        if event != "call" or not FUNCTION.search(frame.f_code.co_name) or "self" in frame.f_locals:
            return
        if (tensors := _three_tensors(frame)) is None or tensors[0].ndim != 4:
            return
        if (where := self._where(frame)) is not None:
            path, through, given = where
            q, k, _v = tensors
            self.functions.setdefault(path, Attended(path, "function", tuple(q.shape), tuple(k.shape), through, given))


def _three_tensors(frame: FrameType) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first three arguments of a function, where these are tensors of one rank, as queries, keys and values are."""
    code = frame.f_code
    found = [frame.f_locals.get(name) for name in code.co_varnames[:3]] if code.co_argcount >= 3 else []
    if len(found) < 3 or not all(isinstance(each, Tensor) and each.ndim in (3, 4) for each in found):
        return None
    q, k, v = found
    return (q, k, v) if q.ndim == k.ndim == v.ndim and k.shape[:2] == v.shape[:2] else None  # type: ignore[union-attr, return-value]


def _name_in_caller(frame: FrameType) -> str:
    """The name by which the code around a frame calls its function."""
    caller, code = frame.f_back, frame.f_code
    if caller is not None and code.co_name not in caller.f_code.co_names:
        for name in caller.f_code.co_names:
            if getattr(inspect.unwrap(caller.f_globals.get(name, int)), "__code__", None) is code:
                return name
    return code.co_name


class _Queries(TorchFunctionMode):
    """Keeps, of each call of attention, one number for each of its queries, (B, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_attention(function):
            self.found.append((args[0] if args else kwargs["query"]).detach().double().sum((1, 3)))
        elif getattr(function, "__name__", "") == "softmax" and args and args[0].ndim == 4:
            self.found.append(args[0].detach().double().diagonal(dim1=-2, dim2=-1).sum(1))  # each query with its own key
        return function(*args, **(kwargs or {}))


def _moved(watched: Watched, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens (N) of the first attention that the latents reach change with them: the visual ones."""
    name, found = next(iter(watched.calls[0])), []
    for moved in (False, True):
        arguments, named = list(args), dict(kwargs)
        if moved and name in named:
            named[name] = _changed(named[name])
        elif moved:
            arguments[0] = _changed(arguments[0])
        with torch.no_grad(), _Queries() as queries:
            own(*arguments, **named)
        found.append(queries.found)
    pairs = [(a, b) for a, b in zip(*found, strict=False) if a.shape == b.shape]
    return next((moved for a, b in pairs if bool((moved := ((a - b).abs() > 0).any(0)).any())), None)


def _changed(latents: Any) -> Any:
    return [_changed(each) for each in latents] if isinstance(latents, list) else latents + torch.randn_like(latents)
