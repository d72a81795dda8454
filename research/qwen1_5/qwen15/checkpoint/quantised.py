"""How a quantised matrix is stored: its companions' names, dtypes and shapes, and what they mean, in NumPy.

A matrix `P` [O, I] (O outputs, I inputs; `P` is the name it has unquantised) is

    P         int8  [O, I]     8 bits: a signed number
              uint8 [O, I/2]   4 bits: 32 inputs are a block of 16 bytes, eight little-endian 16-bit words; nibble k
                               (bits 4k to 4k + 3, k 0..3) of word l (0..7) is the block's value 8k + l
    P_scale   float16, bfloat16 or float32 [O, G]; G groups of I / G inputs, whole rows where G is 1
    P_zero    uint8 [O, G] (4 bits) or int8 [O, G] (8 bits); absent where every zero point is the middle, 8 or 0
    P_order   int32 [I]; only where columns are stored in another order: stored column j belongs to input order[j]

and means  w[:, order[j]] = scale * (q[:, j] - zero),  in float32. It describes itself: the bits follow from its dtype
and its shape against [O, I], the groups from its scale's shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Optional

import numpy as np

from ..errors import UserError
from .casting import FLOATS, to_float32
from .tensors import TensorInfo

BLOCK = 32
"""Inputs of a 4-bit block; I is a multiple of it, and so is a group."""
BLOCK_BYTES = 16
SCALE, ZERO, ORDER = "_scale", "_zero", "_order"
COMPANIONS = (SCALE, ZERO, ORDER)
MIDDLE = {4: 8, 8: 0}
"""The zero point of matrices that store none, by bits."""


@dataclass(frozen=True)
class Scheme:
    """How one matrix [O, I] is quantised.

    Attributes:
        bits: 4 or 8.
        groups: G, the scales of a row.
        group_size: inputs of a group, I / G.
        scale_dtype: 'F16', 'BF16' or 'F32'.
        has_zero: zero points are stored.
        has_order: columns are stored in another order.
    """

    bits: int
    groups: int
    group_size: int
    scale_dtype: str
    has_zero: bool = False
    has_order: bool = False

    def __str__(self) -> str:
        """As people name it: `int4, groups of 64`."""
        return f"int{self.bits}, " + ("whole rows" if self.groups == 1 else f"groups of {self.group_size}")

    def infos(self, name: str, shape: tuple[int, ...]) -> list[TensorInfo]:
        """The tensors that hold a matrix [O, I] of this name, the integers first."""
        outputs, inputs = shape
        columns = inputs if self.bits == 8 else inputs // 2
        integers = "I8" if self.bits == 8 else "U8"
        made = [TensorInfo.of(name, integers, (outputs, columns)),
                TensorInfo.of(name + SCALE, self.scale_dtype, (outputs, self.groups))]
        if self.has_zero:
            made.append(TensorInfo.of(name + ZERO, integers, (outputs, self.groups)))
        if self.has_order:
            made.append(TensorInfo.of(name + ORDER, "I32", (inputs,)))
        return made


def companion_of(name: str) -> Optional[str]:
    """The matrix that a companion's name belongs to: `P` for `P_scale`; None for any other name."""
    for suffix in COMPANIONS:
        if name.endswith(f"weight{suffix}"):
            return name[:-len(suffix)]
    return None


def scheme_of(infos: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...], where: str) -> Optional[Scheme]:
    """How the matrix `name` of a checkpoint is quantised, None when it is not.

    Args:
        infos: the checkpoint's tensors.
        name: of the matrix.
        shape: [O, I] that it should have.
        where: the checkpoint, for messages.

    Raises:
        UserError: integers without scales, scales without integers, or shapes and dtypes that contradict each other.
    """
    info = infos[name]
    companions = [suffix for suffix in COMPANIONS if name + suffix in infos]
    if info.dtype not in ("I8", "U8"):
        if companions and info.dtype in FLOATS:
            raise _damaged(f"{name} is {info.dtype}, not quantised, yet {name}{companions[0]} is there", where)
        return None
    if len(shape) != 2:
        raise _damaged(f"{name} is {info.dtype}, and only matrices are quantised", where)
    outputs, inputs = shape
    bits = 8 if info.dtype == "I8" else 4
    if inputs % BLOCK:
        raise _damaged(f"{name} is quantised, and its {inputs} inputs are not a multiple of {BLOCK}", where)
    stored = (outputs, inputs if bits == 8 else inputs // 2)
    if info.shape != stored:
        raise _damaged(f"{name} has shape {list(info.shape)} of {info.dtype}; {bits} bits for {list(shape)} make it "
                       f"{list(stored)}", where)
    if name + SCALE not in infos:
        raise _damaged(f"{name} is {info.dtype}, and {name}{SCALE} is missing", where)
    scale = infos[name + SCALE]
    if scale.dtype not in FLOATS or len(scale.shape) != 2 or scale.shape[0] != outputs or not scale.shape[1]:
        raise _damaged(f"{scale} is no scale of {name}, which has {outputs} rows", where)
    groups = scale.shape[1]
    if inputs % groups or (inputs // groups) % BLOCK:
        raise _damaged(f"{name}{SCALE} has {groups} groups; {inputs} inputs are not {groups} groups of a multiple of "
                       f"{BLOCK}", where)
    scheme = Scheme(bits, groups, inputs // groups, scale.dtype, name + ZERO in infos, name + ORDER in infos)
    for wanted in scheme.infos(name, shape)[2:]:
        found = infos[wanted.name]
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise _damaged(f"{found} should be {wanted.dtype} {list(wanted.shape)}", where)
    return scheme


def checked_order(order: np.ndarray, name: str, where: str) -> np.ndarray:
    """`P_order` as it was read, int32 [I].

    Args:
        name: of the matrix.

    Raises:
        UserError: it does not name every input once.
    """
    if not np.array_equal(np.sort(order), np.arange(len(order), dtype=order.dtype)):
        raise _damaged(f"{name}{ORDER} does not name each of the {len(order)} inputs once", where)
    return order


def _damaged(what: str, where: str) -> UserError:
    return UserError(what, where, "The checkpoint is damaged, mixed or of another model; convert it again.")


def pack(values: np.ndarray) -> np.ndarray:
    """4-bit values as they are stored: uint8 [O, I], each 0..15, to uint8 [O, I/2]."""
    outputs, inputs = values.shape
    quarters = values.reshape(outputs, inputs // BLOCK, 4, 8).astype(np.uint16)
    words = quarters[:, :, 0] | quarters[:, :, 1] << 4 | quarters[:, :, 2] << 8 | quarters[:, :, 3] << 12
    return words.astype("<u2", copy=False).view(np.uint8).reshape(outputs, inputs // 2)


def unpack(packed: np.ndarray) -> np.ndarray:
    """4-bit values from their stored form: uint8 [O, I/2] to uint8 [O, I], each 0..15."""
    outputs, nbytes = packed.shape
    words = np.ascontiguousarray(packed).view("<u2").reshape(outputs, nbytes // BLOCK_BYTES, 1, 8)
    shifts = np.arange(0, 16, 4, dtype=np.uint16).reshape(1, 1, 4, 1)
    return ((words >> shifts) & np.uint16(15)).astype(np.uint8).reshape(outputs, nbytes * 2)


def dequantise(weight: np.ndarray, scale: np.ndarray, scale_dtype: str, zero: Optional[np.ndarray] = None,
               order: Optional[np.ndarray] = None) -> np.ndarray:
    """What a quantised matrix means, float32 [O, I]: the definition that all else is measured against.

    Args:
        weight: int8 [O, I], or uint8 [O, I/2] packed.
        scale: [O, G], of `scale_dtype` (BF16 as uint16 bits).
        scale_dtype: 'F16', 'BF16' or 'F32'.
        zero: [O, G] of the integers' dtype; the middle if not given.
        order: int32 [I]; the inputs that the stored columns belong to.
    """
    bits = 8 if weight.dtype == np.int8 else 4
    values = weight if bits == 8 else unpack(weight)
    outputs, inputs = values.shape
    groups = scale.shape[1]
    middle = np.float32(MIDDLE[bits]) if zero is None else zero.astype(np.float32)[:, :, None]
    grouped = values.reshape(outputs, groups, inputs // groups).astype(np.float32)
    grouped -= middle
    grouped *= to_float32(scale, scale_dtype)[:, :, None]
    matrix = grouped.reshape(outputs, inputs)
    if order is None:
        return matrix
    ordered = np.empty_like(matrix)
    ordered[:, order] = matrix
    return ordered
