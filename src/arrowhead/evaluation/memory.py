"""The most memory that something took: what torch allocated on a GPU, or on Linux what the process had resident."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

SAID = {
    "cuda": "the most that torch had allocated on the GPU, weights included",
    "cpu": "the most that the process had resident, weights and libraries included",
}
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peak:
    """From when this is made. On a CPU what is free is given back to the system first, so that no earlier peak is seen."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._begun = device, device.type == "cuda"
        if self._begun:
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            with suppress(OSError, AttributeError):  # another system, or another C library
                ctypes.CDLL(None).malloc_trim(0)
                _CLEAR.write_text("5")  # resets the high-water mark, see proc(5)
                self._begun = True

    def bytes(self) -> int | None:
        """So far; None where the system does not say."""
        if not self._begun:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
