"""Twins of the kernels in NumPy float64, and a way to call an operator's C function without MindSpore."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Callable, List, Optional, Sequence

import numpy as np
from kernels_remote import COMMAND, load
from qwen15.checkpoint import quantised

F16, F32, BF16 = "float16", "float32", "bfloat16"


class Stored:
    """An array as the kernels see it: bfloat16 kept as uint16 bits, with the values it stands for in float64."""

    def __init__(self, values: np.ndarray, dtype: str):
        self.dtype = dtype
        if dtype == BF16:
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
            self.memory = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        else:
            self.memory = np.ascontiguousarray(values).astype(dtype)

    @property
    def values(self) -> np.ndarray:
        if self.dtype == BF16:
            return (self.memory.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self.memory.astype(np.float64)

    @property
    def shape(self):
        return self.memory.shape

    def among_nans(self, skipped: int) -> "Stored":
        """The same values `skipped` elements behind the beginning of a cache line, with NaN before and after them."""
        nan = Stored(np.full(1, np.nan), self.dtype).memory[0]
        line = 64 // self.memory.itemsize
        room = np.full(self.memory.size + 4 * line, nan, self.memory.dtype)
        first = -room.ctypes.data % 64 // self.memory.itemsize + line + skipped % line
        placed = room[first:first + self.memory.size].reshape(self.memory.shape)
        placed[...] = self.memory
        copy = Stored(np.zeros(1), self.dtype)
        copy.memory = placed
        return copy


class Quantised:
    """A random quantised matrix (O, I): `parts` as the kernels see it, `values` in float64 in stored order.

    Args:
        bits: 8 or 4.
        group: columns of a group, 0 for whole rows.
        zero: zero points of its own, instead of the middle.
        order: columns are stored in another order.
    """

    def __init__(self, rng: np.random.Generator, shape, bits: int, group: int = 0, scale_dtype: str = F16,
                 zero: bool = False, order: bool = False, size: float = 0.05):
        (rows, cols), low = shape, 0 if bits == 4 else -128
        groups = cols // (group or cols)
        self.shape, self.dtype = shape, f"int{bits}"
        q = rng.integers(low, low + 2 ** bits, shape)
        scale = Stored(rng.standard_normal((rows, groups)) * size / 2 ** (bits - 2), scale_dtype)
        middle = np.full((rows, groups), 8 if bits == 4 else 0)
        zeros = rng.integers(low, low + 2 ** bits, middle.shape) if zero else middle
        small = np.uint8 if bits == 4 else np.int8
        integers = quantised.pack(q.astype(np.uint8)) if bits == 4 else q.astype(np.int8)
        self.parts: List[object] = [integers, scale] + ([zeros.astype(small)] if zero else [])
        self.order: Optional[np.ndarray] = rng.permutation(cols).astype(np.int32) if order else None
        if self.order is not None:
            self.parts.append(self.order)
        self.values = ((q.reshape(rows, groups, -1) - zeros[:, :, None]) * scale.values[:, :, None]).reshape(shape)

    @property
    def memory(self) -> np.ndarray:
        return self.parts[0]


def flat(inputs: Sequence[object]) -> List[object]:
    """Inputs with every quantised matrix as the tensors it consists of."""
    return [part for value in inputs for part in (value.parts if isinstance(value, Quantised) else [value])]


def call(operator: str, inputs: Sequence[object], output_shape: Sequence[int], *how: int) -> np.ndarray:
    """Run qwen15_<operator> as MindSpore would; inputs are Stored or int32/float32 arrays. Raises RuntimeError on its
    complaint.

    `how` goes to a driver (kernels_driver.cpp): how many threads call at once, and how often each.
    """
    output = np.full(output_shape, np.nan, np.float32)
    _run(getattr(load()._handle, f"qwen15_{operator}"), inputs, output, *how)
    return output


def decode_kept(inputs: Sequence[object], rows: np.ndarray, logits_shape: Sequence[int]):
    """The operator decoder on `inputs`, then a `BoundStep` on the weights it has kept: (logits, largest)."""
    library = load()
    logits, largest = np.full(logits_shape, np.nan, np.float32), np.zeros(len(rows), np.int32)
    if os.environ.get(COMMAND):
        _run(functools.partial(library._handle.decode_kept, rows, logits, largest), inputs, np.empty_like(logits))
        return logits, largest
    number = library.open_binding()
    try:
        _run(library._handle.qwen15_decoder, [*inputs[:7], np.array([number], np.int32), *inputs[8:]], logits.copy())
        return logits, bound_decode(library, number, rows, logits)
    finally:
        library.close_binding(number)


def bound_decode(library, number: int, rows: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """One step on what is kept under a number: the largest logit's id of each row."""
    step = library.bound_step(number, len(rows), rows.shape[1] - 3, logits)
    step.rows[:] = rows
    step.run()
    return step.largest


def _run(function: Callable, inputs: Sequence[object], output: np.ndarray, *how: int) -> None:
    arrays, names = [], []
    for value in flat(inputs):
        memory, dtype = (value.memory, value.dtype) if isinstance(value, Stored) else (np.ascontiguousarray(value),
                                                                                       str(value.dtype))
        arrays.append(memory)
        names.append(dtype.encode())
    arrays.append(output)
    names.append(b"float32")
    n = len(arrays)
    shapes = [(ctypes.c_int64 * max(1, a.ndim))(*a.shape) for a in arrays]
    result = function(
        n, (ctypes.c_void_p * n)(*[a.ctypes.data for a in arrays]), (ctypes.c_int * n)(*[a.ndim for a in arrays]),
        (ctypes.c_void_p * n)(*[ctypes.addressof(s) for s in shapes]), (ctypes.c_char_p * n)(*names), None, None, *how)
    if result != 0:
        raise RuntimeError(load().last_error)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as activations meet a weight of this dtype: rounded to bfloat16 for bfloat16, else as they are."""
    return Stored(x, BF16).values if dtype == BF16 else x


def rmsnorm(x: np.ndarray, weight: Stored, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight.values


def linear(x: np.ndarray, w) -> np.ndarray:
    if isinstance(w, Quantised) and w.order is not None:
        x = x[:, w.order]
    return rounded(x, w.dtype) @ w.values.T


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x (T, heads, D), cos and sin (T, D)."""
    half = x.shape[-1] // 2
    turned = np.concatenate((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, None] + turned * sin[:, None]


def attention(q: np.ndarray, keys: Stored, values: Stored, query_lens, context_lens, tables) -> np.ndarray:
    """q (T, H*D) against the caches (num_blocks, block_size, K, D), sequence by sequence, token by token."""
    _, block_size, kv_heads, dim = keys.shape
    heads = q.shape[1] // dim
    out = np.zeros(q.shape)
    k_all, v_all = keys.values, values.values
    token = 0
    for queries, context, table in zip(query_lens, context_lens, tables):
        slots = [table[i // block_size] * block_size + i % block_size for i in range(context)]
        k = k_all.reshape(-1, kv_heads, dim)[slots]
        v = v_all.reshape(-1, kv_heads, dim)[slots]
        for i in range(queries):
            visible = context - queries + i + 1
            for h in range(heads):
                g = h // (heads // kv_heads)
                s = k[:visible, g] @ q[token, h * dim:(h + 1) * dim] / np.sqrt(dim)
                p = np.exp(s - s.max())
                out[token, h * dim:(h + 1) * dim] = p @ v[:visible, g] / p.sum()
            token += 1
    return out


class Batch:
    """A ragged batch over a paged cache with scattered blocks: `query_lens` new tokens on top of `cached` ones per
    sequence."""

    def __init__(self, rng: np.random.Generator, query_lens: Sequence[int], cached: Sequence[int], block_size: int,
                 spare_blocks: int = 3):
        self.query_lens = np.array(query_lens, np.int32)
        self.context_lens = self.query_lens + np.array(cached, np.int32)
        needed = [-(-int(c) // block_size) for c in self.context_lens]
        self.num_blocks = sum(needed) + spare_blocks
        free = list(rng.permutation(self.num_blocks))
        self.tables = np.full((len(needed), max(needed) + 1), -1, np.int32)
        for b, count in enumerate(needed):
            self.tables[b, :count] = [free.pop() for _ in range(count)]
        self.positions = np.concatenate([np.arange(c - q, c) for q,
                                         c in zip(self.query_lens, self.context_lens)]).astype(np.int32)
        owner = np.repeat(np.arange(len(needed)), self.query_lens)
        self.slots = (self.tables[owner, self.positions // block_size] * block_size + self.positions %
                      block_size).astype(np.int32)

    @property
    def tokens(self) -> int:
        return int(self.query_lens.sum())


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest wanted value."""
    return float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))


def tolerance(weights: str, cache: str = F32) -> float:
    """float32 sums of some thousand products; with bfloat16 an activation can round the other way than its twin's
    does."""
    if weights.startswith("int"):
        weights = F32
    if cache == BF16:
        return 1.5e-2  # q and the softmax weights are rounded too
    return 3e-3 if weights == BF16 else 3e-5
