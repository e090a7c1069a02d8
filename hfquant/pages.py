"""Give memory back to the system: checkpoint pages that were read, and tensors that were freed."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_MADV_DONTNEED = 4
_M_MMAP_THRESHOLD = -3


def release_mapped(tensor: Tensor) -> None:
    """Drop the resident pages of a tensor that is a view of a file mapping; the file keeps the data.

    Does nothing for tensors in ordinary memory, where dropping pages would erase them, and outside Linux. Only pages
    that belong to this tensor alone are touched.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if stop > start and _is_unwritten_file(start, stop):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)


def return_what_is_freed() -> None:
    """Have the GNU C library give large tensors back to the system when they are freed, until the process ends.

    It would keep those of up to 32 MiB for later, in holes that grow to a multiple of what is alive.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # other C libraries have none
            mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _is_unwritten_file(start: int, stop: int) -> bool:
    """Whether the addresses lie in one mapping of a file that this process has not written to."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            fields = line.split()
            if "-" in fields[0]:
                low, high = (int(bound, 16) for bound in fields[0].split("-"))
                inside = low <= start and stop <= high and len(fields) > 5 and fields[5].startswith("/")
            elif inside and fields[0] == "Anonymous:" and fields[1] != "0":
                return False
            elif inside and fields[0] == "Swap:":  # written pages may have left the memory, and would be lost as well
                return fields[1] == "0"
    return False
