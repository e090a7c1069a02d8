"""Give memory back to the system: checkpoint pages that were read, and tensors that were freed."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
from torch import Tensor

_MADV_DONTNEED = 4
_M_MMAP_THRESHOLD = -3
_OF_FILE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))  # in an entry of /proc/self/pagemap


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
    """Whether the addresses, of whole pages, lie in one mapping of a file, and this process has written to none."""
    with open("/proc/self/maps") as lines:
        if not any(_is_file_with(line.split(), start, stop) for line in lines):
            return False
    # Not /proc/self/smaps, which says so too: it counts all pages that the process has, and takes as long.
    with open("/proc/self/pagemap", "rb", buffering=0) as entries:
        entries.seek(start // mmap.PAGESIZE * 8)
        found = np.frombuffer(entries.read((stop - start) // mmap.PAGESIZE * 8), dtype=np.uint64)
    own = (found & _PRESENT != 0) & (found & _OF_FILE == 0)
    written = own | (found & _SWAPPED != 0)  # written pages may have left the memory, and would be lost as well
    return len(found) == (stop - start) // mmap.PAGESIZE and not written.any()


def _is_file_with(fields: list[str], start: int, stop: int) -> bool:
    """Whether a line of /proc/self/maps is the mapping of a file with these addresses in it."""
    low, high = (int(bound, 16) for bound in fields[0].split("-"))
    return low <= start and stop <= high and len(fields) > 5 and fields[5].startswith("/")
