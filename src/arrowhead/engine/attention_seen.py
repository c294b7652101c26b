"""Where in a model torch's attention is called, for errors that say so."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from arrowhead.engine.attention_hook import is_attention
from arrowhead.upstream import named_modules


def running_module(root: nn.Module) -> str | None:
    """The path of the innermost module in `root` whose code is running; None where there is none."""
    paths, frame = {id(module): path for path, module in named_modules(root)}, inspect.currentframe()
    while frame is not None:
        if (path := paths.get(id(frame.f_locals.get("self")))) is not None:
            return path
        frame = frame.f_back
    return None


class _AttentionSeen(TorchFunctionMode):
    """Notes which modules of `root` are running when torch's attention is called."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.paths: dict[str, None] = {}
        self._root = root

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_attention(function) and (path := running_module(self._root)) is not None:
            self.paths.setdefault(path)
        return function(*args, **(kwargs or {}))


@contextmanager
def attention_seen(root: nn.Module) -> Iterator[dict[str, None]]:
    """Gives, when the block has ended, the paths of the modules in `root` whose code called torch's attention within it."""
    with _AttentionSeen(root) as seen:
        yield seen.paths


def listed(paths: Sequence[str], most: int = 3) -> str:
    """The first of some paths, and the number of the others."""
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
