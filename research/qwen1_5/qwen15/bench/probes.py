"""What this machine can do now: bytes read and operations computed per second, on the kernels' own threads."""

from __future__ import annotations

import mmap
import time
from typing import Any, Dict, Optional

import numpy as np

from ..kernels import library

PROBE_BYTES = 2 ** 29
"""Far more than any cache holds, and read in 10 to 20 ms."""
_PASSES = 6
_PASS_S = 0.01
_FEW_REPEATS = 20_000


class Probes:
    """Probes of memory and arithmetic.

    Args:
        threads: how many the kernels run on from now on; None leaves it as it is.
    """

    def __init__(self, threads: Optional[int] = None):
        self._library = library.load()
        if threads is not None:
            self._library.threads = threads
        self.threads = self._library.threads
        self.kernels = self._library.kernels
        self._memory: Optional[np.ndarray] = None

    def bandwidth(self) -> float:
        """Bytes per second all threads read together: the best of several passes of each pattern."""
        if self._memory is None:
            pages = mmap.mmap(-1, PROBE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._memory = np.frombuffer(pages, np.uint8)
            self._memory[:] = 1  # unwritten pages would all map to the same page of zeros
        return max(self._library.bandwidth(self._memory, split) for _ in range(_PASSES) for split in (False, True))

    def peak(self, dtype: str) -> float:
        """Operations per second of multiply-adds on registers, as prefill does them for weights of `dtype`."""
        start_s = time.perf_counter()
        self._library.flops(dtype, _FEW_REPEATS)
        repeats = int(_FEW_REPEATS * _PASS_S / (time.perf_counter() - start_s)) + 1
        return max(self._library.flops(dtype, repeats) for _ in range(_PASSES))

    def limits(self, dtype: str) -> Dict[str, float]:
        """Both, as `rounds.limits` wants to have been probed."""
        return {"bandwidth": self.bandwidth(), "peak": self.peak(dtype)}

    def facts(self, model: str, dtype: str, rounds: int) -> Dict[str, Any]:
        """What a table's heading says of a model that was measured here in so many rounds."""
        return {"model": model, "dtype": dtype, "threads": self.threads, "rounds": rounds, "kernels": self.kernels}
