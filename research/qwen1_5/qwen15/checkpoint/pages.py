"""Memory in huge pages (2 MB), where the system has them."""

import mmap
from contextlib import suppress

import numpy as np

_HUGE_PAGE_BYTES = 2 * 2 ** 20


def ask_for_huge_pages(memory: mmap.mmap) -> None:
    """Have what is touched for the first time from now on lie in huge pages, where system and file system can.

    What the system has of a mapped file in small pages already stays there.
    """
    with suppress(AttributeError, OSError):  # another system, or a kernel without
        memory.madvise(mmap.MADV_HUGEPAGE)


def huge(nbytes: int) -> np.ndarray:
    """Memory for reading and writing files, uint8 [nbytes], in huge pages where the system has them.

    A request to the disk names the pieces of memory that it is gathered from, and takes so many and no more: in
    ordinary pages that is every 4 KiB, and a large write falls apart into many small requests.
    """
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ask_for_huge_pages(memory)
    every = np.frombuffer(memory, np.uint8)
    begin = -every.ctypes.data % _HUGE_PAGE_BYTES
    return every[begin:begin + nbytes]
