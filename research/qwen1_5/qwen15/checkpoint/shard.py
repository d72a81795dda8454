"""Cut and join tensors for tensor parallelism. No files, no devices."""

from typing import Optional, Sequence, Tuple

import numpy as np


def bounds(size: int, rank: int, parts: int) -> Tuple[int, int]:
    """Where rank `rank` of `parts` starts and stops on an axis of `size`.

    Raises:
        ValueError: `parts` does not divide `size`, or there is no such rank.
    """
    if parts < 1 or not 0 <= rank < parts:
        raise ValueError(f"no rank {rank} among {parts}")
    if size % parts:
        raise ValueError(f"{size} is not divisible by {parts}")
    step = size // parts
    return rank * step, (rank + 1) * step


def cut(array: np.ndarray, axis: Optional[int], rank: int, parts: int) -> np.ndarray:
    """Rank `rank`'s slice of `array`; the array itself where `axis` is None.

    Returns:
        A C-contiguous array: a view where the slice is one (axis 0), a copy where it is not.
    """
    if axis is None:
        return array
    start, stop = bounds(array.shape[axis], rank, parts)
    return np.ascontiguousarray(array[(slice(None),) * axis + (slice(start, stop),)])


def join(arrays: Sequence[np.ndarray], axis: Optional[int]) -> np.ndarray:
    """The whole tensor from every rank's slice in rank order: the inverse of `cut`.

    Raises:
        ValueError: `axis` is None and the ranks, which should all hold the whole, differ.
    """
    if axis is not None:
        return np.concatenate(arrays, axis=axis)
    first = arrays[0]
    for rank, other in enumerate(arrays[1:], 1):
        # Bytes, not values: NaN is equal to itself here, and 0.0 differs from -0.0.
        if first.dtype != other.dtype or first.shape != other.shape or first.tobytes() != other.tobytes():
            raise ValueError(f"rank {rank} differs from rank 0, though every rank should hold the whole tensor")
    return first
