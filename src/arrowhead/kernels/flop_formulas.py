"""Formulas by which torch's counter of FLOPs, FlopCounterMode, knows attention on the CPU and the fused kernel.

The counter copies the formulas that are registered when it is made, and knows neither. Its module takes long to import, and
imports triton. So the formulas are registered when the module is imported, or at once where it has been.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arrowhead.upstream import CPU_ATTENTION

COUNTER = "torch.utils.flop_counter"


class _CounterFinder(MetaPathFinder):
    """Finds the counter's module as Python does, and registers the formulas after it has been imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Python's own spec of the counter's module; None for every other module."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == COUNTER else None
        loader: Any = spec and spec.loader
        if loader is not None:
            executed = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                executed(module)
                _register(module)

            loader.exec_module = exec_module
        return spec


@torch.library.custom_op("arrowhead::count_pairs", mutates_args=())
def count_pairs(q: Tensor, pairs: int) -> None:
    """Does nothing: it tells a counter of the pairs that a compiled kernel computes, which runs without counters.

    `q` has D channels, and `pairs` are those of all its samples and heads.
    """


def register() -> None:
    """Let every counter that is made from now on know the formulas."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    elif not any(isinstance(finder, _CounterFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CounterFinder())


def _register(counter: Any) -> None:
    if CPU_ATTENTION not in counter.flop_registry:
        counter.register_flop_formula(CPU_ATTENTION)(_attention_flops)
        counter.register_flop_formula(torch.ops.arrowhead.count_pairs)(_pairs_flops)
    if torch.version.cuda is not None:
        with suppress(ImportError):  # without a triton that fits, the fused kernel does not run either
            import_module("arrowhead.kernels.triton.ops")


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Both matmuls, masked pairs included."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _pairs_flops(q: torch.Size, pairs: int, **_: Any) -> int:
    return 4 * q[-1] * pairs
