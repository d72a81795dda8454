"""The kernel library's operators on NumPy memory, called as MindSpore calls them, with weights that no cache holds."""

from __future__ import annotations

import ctypes
from typing import Callable, List, Sequence, Tuple

import numpy as np

from ..checkpoint.casting import from_float32
from ..checkpoint.tensors import SHORT_NAMES
from ..errors import EXIT_FAILED, UserError
from ..kernels import library

_STRIP = 2 ** 22


class Array:
    """Memory with the dtype it stands for: bfloat16 is kept as uint16 bits."""

    def __init__(self, memory: np.ndarray, dtype: str = ""):
        self.memory = memory
        self.dtype = dtype or str(memory.dtype)


class Pool:
    """Random numbers of one dtype from which weights are cut, one after another, over and over.

    Args:
        elements: how many; far more bytes than the caches hold, so that what is cut next has to come from memory.
        dtype: float32, float16 or bfloat16.
    """

    def __init__(self, elements: int, dtype: str):
        values = np.random.default_rng(0).standard_normal(_STRIP, np.float32) * np.float32(0.02)
        strip = from_float32(values, SHORT_NAMES[dtype])
        self._memory = np.empty(max(elements, _STRIP), strip.dtype)
        for start in range(0, self._memory.size, _STRIP):
            self._memory[start:start + _STRIP] = strip[:self._memory.size - start]
        self._dtype, self._next = dtype, 0

    def take_quantised(self, bits: int, group: int, rows: int, cols: int) -> List[Array]:
        """The next bytes as a quantised matrix (rows, cols) without zero points, with scales of float16."""
        integers = self.take_bytes(rows * cols * bits // 8).reshape(rows, -1)
        scale = np.full((rows, cols // group), 0.02 / 2 ** (bits - 1), np.float16)
        return [Array(integers.view(np.int8) if bits == 8 else integers), Array(scale)]

    def take_bytes(self, count: int) -> np.ndarray:
        """The next `count` bytes, from an element on."""
        item = self._memory.itemsize
        return self.take(-(-count // item)).memory.view(np.uint8)[:count]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self._memory.nbytes

    def take(self, *shape: int) -> Array:
        """The next matrix of this shape."""
        count = int(np.prod(shape))
        if self._next + count > self._memory.size:
            self._next = 0
        part = self._memory[self._next:self._next + count].reshape(shape)
        self._next += count
        return Array(part, self._dtype)


def prepare(name: str, inputs: Sequence[Array], output_shape: Tuple[int, ...]) -> Callable[[], np.ndarray]:
    """qwen15_<name> with these inputs as a function without arguments; every call writes, and gives, the same output.

    Raises (the function):
        UserError: the operator refused its inputs.
    """
    loaded = library.load()
    function = getattr(ctypes.CDLL(str(loaded.path)), f"qwen15_{name}")
    output = np.zeros(output_shape, np.float32)
    arrays: List[Array] = [*inputs, Array(output)]
    count = len(arrays)
    shapes = [(ctypes.c_int64 * max(1, a.memory.ndim))(*a.memory.shape) for a in arrays]
    arguments = (count, (ctypes.c_void_p * count)(*[a.memory.ctypes.data for a in arrays]),
                 (ctypes.c_int * count)(*[a.memory.ndim for a in arrays]),
                 (ctypes.c_void_p * count)(*[ctypes.addressof(s) for s in shapes]),
                 (ctypes.c_char_p * count)(*[a.dtype.encode() for a in arrays]), None, None)

    def call() -> np.ndarray:
        if function(*arguments) != 0:
            raise UserError(loaded.last_error, where=f"operator {name}", exit_code=EXIT_FAILED)
        return output

    call.keeps = (arrays, shapes)  # type: ignore[attr-defined]  # the addresses above are theirs
    return call
