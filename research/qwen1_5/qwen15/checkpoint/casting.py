"""Change the dtype of weights, counting what does not survive; bfloat16 travels as its bits in uint16."""

import functools
from dataclasses import dataclass
from typing import Iterator, Tuple

import numpy as np

from .tensors import NUMPY_DTYPES

FLOATS = ("F32", "F16", "BF16")
_CHUNK_ELEMENTS = 1 << 17
"""Elements converted at once, so that what lies between stays in the processor's cache."""


@dataclass(frozen=True)
class Count:
    """What casts did to `values` numbers: became 0 without being 0, became infinite without being infinite."""

    tensors: int = 0
    values: int = 0
    to_zero: int = 0
    overflowed: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.tensors + other.tensors, self.values + other.values, self.to_zero + other.to_zero,
                     self.overflowed + other.overflowed)

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.to_zero} values became 0, {self.overflowed} overflowed"


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Exact float32 values of an array of dtype 'F32', 'F16' or 'BF16' (uint16 bits)."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to nearest even in `dtype`; NaN stays NaN."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's mantissa over into infinity or zero: keep its sign and set the quiet bit instead.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


@functools.lru_cache(maxsize=None)
def _table(source: str, target: str) -> np.ndarray:
    """What each of the 65536 numbers of a 16-bit dtype becomes: several times faster than working it out."""
    every: np.ndarray = np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPES[source])
    return from_float32(to_float32(every, source), target)


def _cast(chunk: np.ndarray, source: str, target: str) -> np.ndarray:
    if source == "F32":
        return from_float32(chunk, target)
    # No index can be out of range, and mode "clip" skips the check.
    return _table(source, target).take(chunk.view(np.uint16), mode="clip")


_BITS = {"F32": (np.uint32, 0x7FFFFFFF, 0x7F800000), "F16": (np.uint16, 0x7FFF, 0x7C00),
         "BF16": (np.uint16, 0x7FFF, 0x7F80)}
"""Unsigned integers of a dtype's width, all bits but the sign, and infinity."""


def _zeros_and_infinities(array: np.ndarray, dtype: str) -> Tuple[int, int]:
    unsigned, magnitude, infinity = _BITS[dtype]
    bits = array.view(unsigned) & unsigned(magnitude)
    return bits.size - int(np.count_nonzero(bits)), int(np.count_nonzero(bits == infinity))


def cast(array: np.ndarray, source: str, target: str) -> Tuple[np.ndarray, Count]:
    """`array` of dtype `source` as `target`, both of FLOATS, and what the cast did."""
    out: np.ndarray = np.empty(array.shape, NUMPY_DTYPES[target])
    flat_out = out.reshape(-1)
    to_zero = overflowed = 0
    for start, chunk in _chunks(array):
        flat_out[start:start + chunk.size] = made = _cast(chunk, source, target)
        # Zeros stay zero, infinities stay infinite and NaN stays NaN: any more of them afterwards are the cast's doing.
        before, after = _zeros_and_infinities(chunk, source), _zeros_and_infinities(made, target)
        to_zero, overflowed = to_zero + after[0] - before[0], overflowed + after[1] - before[1]
    return out, Count(1, array.size, to_zero, overflowed)


def exact(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """`array` as `target` where that loses nothing: the same dtype, or float32 from a 16-bit one."""
    if source == target:
        return array
    if target != "F32":
        raise ValueError(f"{source} -> {target} is not exact")
    out = np.empty(array.shape, np.float32)
    flat = out.reshape(-1)
    for start, chunk in _chunks(array):
        flat[start:start + chunk.size] = to_float32(chunk, source)
    return out


def non_finite(array: np.ndarray, dtype: str) -> Tuple[int, int]:
    """How many (NaN, infinite) values an array of dtype 'F32', 'F16' or 'BF16' has.

    A float whose exponent is all ones is NaN or infinite; as a signed integer such a positive number is at least the
    exponent's mask, as an unsigned one such a negative number at least mask and sign. So two maxima are enough.
    """
    unsigned, without_sign, exponent = _BITS[dtype]
    signed, sign = np.int32 if unsigned is np.uint32 else np.int16, without_sign + 1
    flat = array.reshape(-1).view(unsigned)
    nan = infinite = 0
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        block = flat[start:start + _CHUNK_ELEMENTS]
        if block.view(signed).max() >= exponent or block.max() >= (exponent | sign):
            magnitude = block & unsigned(without_sign)
            nan += int(np.count_nonzero(magnitude > exponent))
            infinite += int(np.count_nonzero(magnitude == exponent))
    return nan, infinite


def to_tensor(array: np.ndarray, dtype: str):
    """A MindSpore Tensor over the same memory (aligned and contiguous arrays are not copied)."""
    import mindspore
    from mindspore.common import np_dtype

    if not (array.flags.c_contiguous and array.flags.aligned):
        array = np.array(array, order="C")
    return mindspore.Tensor.from_numpy(array.view(np_dtype.bfloat16) if dtype == "BF16" else array)


def _chunks(array: np.ndarray) -> Iterator[Tuple[int, np.ndarray]]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        yield start, flat[start:start + _CHUNK_ELEMENTS]
