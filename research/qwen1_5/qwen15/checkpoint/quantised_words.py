"""Integers of 4 and 8 bits in the 32-bit words of GPTQ, AWQ and compressed-tensors, lowest bits first."""

from __future__ import annotations

import numpy as np

AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""AWQ's word holds the value of column c of its eight in nibble AWQ_PLACES[c]."""
_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}
"""Bits of an integer -> a word whose integers are all 1."""


def unpack_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, C], packed along the first axis, to uint8 [R x 32 / bits, C]."""
    rows, columns = words.shape
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(rows, columns, 4).transpose(0, 2, 1)
    if bits == 8:
        return np.ascontiguousarray(octets).reshape(rows * 4, columns)
    values = np.empty((rows, 4, 2, columns), np.uint8)
    np.bitwise_and(octets, 15, out=values[:, :, 0])
    np.right_shift(octets, 4, out=values[:, :, 1])
    return values.reshape(rows * 8, columns)


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack_rows`: uint8 [R x 32 / bits, C] to int32 [R, C]."""
    columns = values.shape[1]
    if bits == 8:
        octets = values.reshape(-1, 4, columns)
    else:
        pairs = values.reshape(-1, 4, 2, columns)
        octets = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return np.ascontiguousarray(octets.transpose(0, 2, 1)).reshape(len(octets), columns * 4).view("<i4")


def unpack_columns(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, C], packed along the second axis, to uint8 [R, C x 32 / bits]."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    values = np.empty((*octets.shape, 2), np.uint8)
    np.bitwise_and(octets, 15, out=values[..., 0])
    np.right_shift(octets, 4, out=values[..., 1])
    return values.reshape(len(octets), -1)


def pack_columns(values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack_columns`: uint8 [R, C x 32 / bits] to int32 [R, C]."""
    octets = values if bits == 8 else values[:, 0::2] | values[:, 1::2] << 4
    return np.ascontiguousarray(octets).view("<i4")


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """int32 [R, C] of AWQ's GEMM layout to uint8 [R, 8 C], each 0..15."""
    nibbles = unpack_columns(words, 4).reshape(len(words), -1, 8)
    return nibbles[:, :, AWQ_PLACES].reshape(len(words), -1)


def pack_awq(values: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_awq`: uint8 [R, 8 C] to int32 [R, C]."""
    nibbles = np.empty((len(values), values.shape[1] // 8, 8), np.uint8)
    nibbles[:, :, AWQ_PLACES] = values.reshape(nibbles.shape)
    return pack_columns(nibbles.reshape(values.shape), 4)


def plus_ones(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 words whose integers are one more, by one addition a word: what overflows is carried into the next."""
    return (np.ascontiguousarray(words).view(np.uint32) + _ONES[bits]).view(np.int32)


def minus_ones(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `plus_ones`: a 0 borrows from the next."""
    return (np.ascontiguousarray(words).view(np.uint32) - _ONES[bits]).view(np.int32)


def overflowing_words(words: np.ndarray, bits: int) -> int:
    """How many int32 words [R, C] have an integer, the last one apart, from which one more would be carried."""
    values = unpack_columns(words, bits).reshape(-1, 32 // bits)
    return int((values[:, :-1] == 2 ** bits - 1).any(axis=1).sum())
