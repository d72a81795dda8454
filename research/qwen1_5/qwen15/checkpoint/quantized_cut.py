"""How a quantised matrix is cut over ranks: the integers by rows or by blocks of columns, scales and zero points with
them.

Along the outputs (axis 0) every tensor but the order is cut by rows. Along the inputs (axis 1) the integers are cut by
columns, scales and zero points by groups. Where a cut falls inside a group, the slices have finer groups, each with the
scale of the group that it lies in: the numbers stay what they were.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Optional

import numpy as np

from ..errors import UserError
from .quantized import BLOCK, ORDER, SCALE, ZERO, Scheme


def slice_scheme(scheme: Scheme, shape: tuple[int, ...], axis: Optional[int], parts: int, name: str,
                 where: str) -> Scheme:
    """How one rank's slice of a matrix is quantised.

    Args:
        scheme, shape: of the whole matrix [O, I].
        axis: that is cut, None for none.
        parts: ranks; `parts` divides the axis.
        name, where: of the matrix and its checkpoint, for messages.

    Raises:
        UserError: the slices would not be whole blocks, or the columns are in an order of their own (desc_act).
    """
    if axis != 1 or parts == 1:
        return scheme
    inputs = shape[1]
    if scheme.has_order:
        raise UserError(f"{name} is quantised with its columns in an order of their own (desc_act), and each of "
                        f"{parts} ranks would need columns of the others", where,
                        "Run one process, or take a model that was quantised without desc_act.")
    width = inputs // parts
    if width % BLOCK:
        fitting = [n for n in range(2, parts) if inputs % n == 0 and inputs // n % BLOCK == 0]
        raise UserError(f"{name} is quantised, and its {inputs} inputs cut over {parts} ranks make {width}, which is "
                        f"not a multiple of {BLOCK}", where,
                        f"Run {' or '.join(map(str, [1, *fitting]))} ranks.")
    group = math.gcd(scheme.group_size, width)
    return replace(scheme, groups=width // group, group_size=group)


def slice_columns(tensor: str, array: np.ndarray, scheme: Scheme, shape: tuple[int, ...], rank: int,
                  parts: int) -> np.ndarray:
    """The part of one of a matrix's tensors that belongs to a rank, where the matrix is cut along its inputs.

    Args:
        tensor: its name, the matrix's own or a companion's (not the order: see `slice_scheme`).
        array: all of its columns, and any of its rows.
        scheme, shape: of the whole matrix.

    Returns:
        A C-contiguous array.
    """
    if tensor.endswith(ORDER):
        raise ValueError(f"{tensor} cannot be cut")
    if tensor.endswith((SCALE, ZERO)):
        finer = math.gcd(scheme.group_size, shape[1] // parts)
        array = np.repeat(array, scheme.group_size // finer, axis=1)
    width = array.shape[1] // parts
    return np.ascontiguousarray(array[:, rank * width:(rank + 1) * width])
