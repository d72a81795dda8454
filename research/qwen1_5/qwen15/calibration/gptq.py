"""Rounding a matrix so that later columns make up for what earlier ones lose (GPTQ), in NumPy and LAPACK.

For y = W x over the activations x of a calibration text, the squared error of a row depends on W through
H = sum x x^T alone. Columns are rounded one after another; what rounding column i costs is taken off the columns behind
it in the proportions that lose least, which are rows of the Cholesky factor of H^-1 (Frantar et al., 2022,
arXiv:2210.17323).
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np

from ..checkpoint.quantised import Scheme
from ..conversion.quantise import inverse_of, levels, nearest_scale, nearest_zero

DAMPING = 0.01
"""What is added to H's diagonal, against its mean: columns that the text hardly moved are rounded to nearest."""
BLOCK = 128
"""Columns after which all that follow learn of the errors; a multiple of every group."""


class Rounded(NamedTuple):
    """A matrix in integers.

    Attributes:
        values: int8 [O, I], or uint8 [O, I] of 0..15, not packed.
        scale: float16 [O, G].
        zero: uint8 [O, G], None where the integers are symmetric.
        dense: float32 [O, I]; what they mean.
    """

    values: np.ndarray
    scale: np.ndarray
    zero: Optional[np.ndarray]
    dense: np.ndarray


class Moments:
    """H = sum x x^T over activations, [I, I] float64.

    Args:
        inputs: I.
    """

    def __init__(self, inputs: int):
        self.total = np.zeros((inputs, inputs), np.float64, order="F")
        self.tokens = 0

    def add(self, x: np.ndarray) -> None:
        """Take in activations (T, I) float32."""
        self.total += x.T @ x
        self.tokens += len(x)

    def factor(self) -> np.ndarray:
        """The upper Cholesky factor of the inverse of H, damped: float64 [I, I]. H itself is used up.

        Raises:
            ArithmeticError: H is not finite.
        """
        from scipy.linalg import lapack

        diagonal = np.einsum("ii->i", self.total)
        mean = float(diagonal.mean())
        if not np.isfinite(mean):
            raise ArithmeticError("activations are not finite")
        damping = DAMPING * mean or 1.0
        while True:
            diagonal += damping
            kept = diagonal.copy()
            factor, failed = lapack.dpotrf(self.total, lower=0, clean=0, overwrite_a=1)
            if not failed:
                break
            # Rounding made it indefinite. The lower half is untouched: rebuild the upper half from it.
            upper = np.triu_indices(len(kept), 1)
            self.total[upper] = self.total.T[upper]
            diagonal[:] = kept
            damping *= 10
        inverse, failed = lapack.dpotri(factor, lower=0, overwrite_c=1)
        if not failed:
            inverse, failed = lapack.dpotrf(inverse, lower=0, clean=1, overwrite_a=1)
        if failed:
            raise ArithmeticError("activations leave no inverse")
        return inverse


def compensated(weight: np.ndarray, factor: np.ndarray, scheme: Scheme) -> Rounded:
    """Round a matrix column by column.

    Args:
        weight: float32 [O, I].
        factor: what `Moments.factor` gave, [I, I].
        scheme: bits and groups; 8 bits are symmetric, 4 have zero points.

    Raises:
        ValueError: values that no scale of float16 stands for.
    """
    outputs, inputs = weight.shape
    columns = np.ascontiguousarray(weight.T)  # (I, O): a column is one piece of memory
    values = np.empty((inputs, outputs), np.int8 if scheme.bits == 8 else np.uint8)
    scales = np.empty((outputs, scheme.groups), np.float16)
    zeros = np.empty((outputs, scheme.groups), np.uint8) if scheme.bits == 4 else None
    low, high = levels(scheme.bits)
    scale = zero = inverse = np.zeros(outputs, np.float32)
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        here = factor[first:last, first:last].astype(np.float32)
        errors = np.empty((last - first, outputs), np.float32)
        for i in range(first, last):
            if i % scheme.group_size == 0:
                group = i // scheme.group_size
                members = columns[i:i + scheme.group_size].T[:, None, :]
                scales[:, group] = nearest_scale(members, scheme.bits)[:, 0]
                scale = scales[:, group].astype(np.float32)
                inverse = inverse_of(scales[:, group])
                if zeros is not None:
                    zeros[:, group] = nearest_zero(members, inverse[:, None])[:, 0]
                    zero = zeros[:, group].astype(np.float32)
            rounded = np.clip(np.rint(columns[i] * inverse) + zero, low, high)
            values[i] = rounded
            rounded -= zero
            rounded *= scale
            row = here[i - first]
            error = (columns[i] - rounded) / row[i - first]
            errors[i - first] = error
            columns[i] = rounded
            columns[i + 1:last] -= row[i + 1 - first:, None] * error
        if last < inputs:
            columns[last:] -= factor[first:last, last:].astype(np.float32).T @ errors
    return Rounded(np.ascontiguousarray(values.T), scales, zeros, np.ascontiguousarray(columns.T))
