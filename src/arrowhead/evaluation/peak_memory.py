"""Peak memory of a block of code: torch's allocations on a GPU, or on Linux the resident memory of the process."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

DESCRIPTIONS = {
    "cuda": "the most that torch had allocated on the GPU, weights included",
    "cpu": "the most that the process had resident, weights and libraries included",
}
"""What the number means, by type of device."""
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Measures the peak since it was constructed.

    On a CPU, free memory is returned to the system and the kernel's high-water mark is reset first, so that an earlier peak
    does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._known = device, device.type == "cuda"
        if self._known:
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            with suppress(OSError, AttributeError):  # another system, or another C library
                ctypes.CDLL(None).malloc_trim(0)
                _CLEAR.write_text("5")  # resets the high-water mark, see proc(5)
                self._known = True

    def bytes(self) -> int | None:
        """The peak so far, in bytes; None if the system does not report it."""
        if not self._known:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
