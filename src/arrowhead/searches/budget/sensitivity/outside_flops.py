"""FLOPs of a pipeline's first step, as torch counts them, without those that the recording adds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


class FirstPassFlops:
    """Counts the FLOPs of the first pass: its figure stands for all."""

    def __init__(self) -> None:
        self._whole: FlopCounterMode | None = None
        self._added: list[FlopCounterMode] = []
        self._counts = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is multiplied within the block, if it is the first one."""
        if self._whole is not None:
            yield
            return
        self._whole, self._counts = flop_counter(), True
        try:
            with self._whole:
                yield
        finally:
            self._counts = False

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave out what is multiplied within the block, which the pipeline itself does not compute."""
        if not self._counts:
            yield
            return
        self._added.append(flop_counter())
        with self._added[-1]:
            yield

    @property
    def total(self) -> int:
        """The FLOPs of the pass itself, of all images."""
        if self._whole is None:
            return 0
        return self._whole.get_total_flops() - sum(added.get_total_flops() for added in self._added)


def flop_counter() -> "FlopCounterMode":
    """PyTorch's counter, which knows attention on a CPU by `kernels.flop_formulas`."""
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 - it imports triton where there is one

    return FlopCounterMode(display=False)
