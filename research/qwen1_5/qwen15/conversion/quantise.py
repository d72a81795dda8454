"""Our own quantisation: a float checkpoint seen in the stored form of `checkpoint.quantised`, rounded to nearest.

    int8   symmetric: scale = max |w| / 127 of a group, q = round(w / scale)
    int4   with zero points: scale = (hi - lo) / 15 where lo <= 0 <= hi are a group's ends, zero = round(-lo / scale),
           q = round(w / scale) + zero, kept within 0..15

Scales are float16, rounded up so that no value falls outside. The embedding table and the head are int8 in groups of 32
or left as they are: they cost little there, and much in 4 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Iterable, Mapping, Optional, Protocol

import numpy as np

from .. import naming
from ..checkpoint.casting import FLOATS, to_float32
from ..checkpoint.quantised import BLOCK, SCALE, ZERO, Scheme, dequantise, pack
from ..checkpoint.quantised_settings import CONFIG_KEY, OURS
from ..checkpoint.reader import Checkpoint
from ..checkpoint.tensors import LONG_NAMES, TensorInfo
from ..checkpoint.view import Made, View, block_of
from ..config.hf_config import HfConfig
from ..errors import UserError
from ..naming import Weight

DEFAULT_GROUPS = {8: 128, 4: 64}
VOCABULARY_GROUP = 32
_LARGEST_SCALE = 65504.0
_WORK_FACTOR = 16
"""Bytes for each value while it is quantised: a float32 and some temporaries."""
_LARGEST_ERROR = {8: 0.5, 4: 1.0}
"""What rounding can cost, in scales: half a step; at 4 bits half more, where a rounded zero point moves the ends."""


class Chosen(Protocol):
    """Integers of the layers that something else has chosen than rounding to nearest: a calibration."""

    def describe(self) -> Mapping[str, object]:
        """What config.json says of it."""

    def note(self) -> str:
        """What a user is told beforehand."""

    def memory_bytes(self, config: HfConfig) -> int:
        """Memory that choosing takes, about."""

    def make(self, source: Checkpoint, config: HfConfig, recipe: Recipe) -> None:
        """Choose, before the first row is asked for."""

    def rows(self, name: str, layer: int, first: int, last: int) -> np.ndarray:
        """Rows of a tensor of the stored form, whose name is Hugging Face's."""

    def kept(self) -> str:
        """What an interrupted run has left, in words; empty where there is nothing."""

    def close(self, done: bool) -> None:
        """Let go of what is kept, which is of no more use where the result is whole (`done`)."""


@dataclass(frozen=True)
class Recipe:
    """How to quantise.

    Attributes:
        bits: 8 or 4, of the linears.
        group_size: inputs of a group; a matrix whose inputs it does not divide gets the largest group that does.
        keep_head: leave embedding and head as they are.
        chosen: the integers of the layers' matrices; None rounds to nearest.
    """

    bits: int
    group_size: int
    keep_head: bool = False
    chosen: Optional[Chosen] = None

    def scheme(self, weight: Weight) -> Optional[Scheme]:
        """How a weight [O, I] is stored, None where it stays as it is.

        Raises:
            UserError: its inputs are not a multiple of 32.
        """
        if len(weight.shape) != 2:
            return None
        bits, group = self.bits, self.group_size
        if weight.cut == naming.VOCAB:
            if self.keep_head:
                return None
            bits, group = 8, VOCABULARY_GROUP
        inputs = weight.shape[1]
        if inputs % BLOCK:
            raise UserError(f"{weight.hf} has {inputs} inputs; only multiples of {BLOCK} can be quantised",
                            "--quantize", "Convert this model without --quantize.")
        group = math.gcd(group, inputs)
        return Scheme(bits, inputs // group, group, "F16", has_zero=bits == 4)

    def changes(self) -> dict[str, object]:
        """What config.json says about it, by key."""
        said = {"quant_method": OURS, "bits": self.bits, "group_size": self.group_size, "sym": self.bits == 8,
                "embedding_bits": None if self.keep_head else 8}
        return {CONFIG_KEY: said if self.chosen is None else {**said, "calibration": dict(self.chosen.describe())}}


def quantised(source: Checkpoint, weights: Iterable[Weight], recipe: Recipe) -> View:
    """The checkpoint with its matrices quantised, under its own (Hugging Face's) names.

    Raises:
        UserError: a matrix cannot be quantised. Values that cannot be are found when they are read.
    """
    made: dict[str, Made] = {}
    for weight in weights:
        scheme = recipe.scheme(weight)
        if scheme is None:
            continue
        rows = _Rows(source, weight, scheme)
        functions = {"": rows.integers, SCALE: rows.scale, ZERO: rows.zero}
        for info in scheme.infos(weight.hf, weight.shape):
            make = functions[info.name[len(weight.hf):]]
            if recipe.chosen is not None and weight.layer is not None:
                make = partial(recipe.chosen.rows, info.name, weight.layer)
            made[info.name] = Made(info, make, _WORK_FACTOR * weight.shape[1])
    return View(source, made)


# ---- rounding ----

def levels(bits: int) -> tuple[int, int]:
    """The least and the largest integer: -127, 127 at 8 bits, 0, 15 at 4."""
    return (-127, 127) if bits == 8 else (0, 15)


def nearest_scale(groups: np.ndarray, bits: int) -> np.ndarray:
    """Scales of groups of weights: float32 [n, G, group] -> float16 [n, G].

    Raises:
        ValueError: a value is not finite, or too large.
    """
    high, low = groups.max(axis=2), groups.min(axis=2)
    if bits == 8:
        exact = np.maximum(high, -low) / np.float32(127)
    else:
        exact = (np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(15)
    if not np.isfinite(exact).all():
        raise ValueError("holds NaN or infinite values, which integers cannot represent")
    if (exact > _LARGEST_SCALE).any():
        raise ValueError("holds values too large for scales in float16")
    scale = exact.astype(np.float16)
    short = scale.astype(np.float32) < exact
    scale[short] = np.nextafter(scale[short], np.float16(np.inf))
    return scale


def inverse_of(scale: np.ndarray) -> np.ndarray:
    """1 / scale, float32 [n, G]; 0 where the scale is: all values of the group are 0 then."""
    wide = scale.astype(np.float32)
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)


def nearest_zero(groups: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Zero points of 4 bits: groups float32 [n, G, group] and 1 / scale [n, G] -> uint8 [n, G]."""
    low = np.minimum(groups.min(axis=2), 0)
    return np.clip(np.rint(-low * inverse), 0, 15).astype(np.uint8)


def unfit(name: str, error: ValueError, where: str) -> UserError:
    """What is told of a matrix whose values `nearest_scale` refuses."""
    damaged = "NaN" in str(error)
    return UserError(f"{name} {error}", where, "The source is damaged; download it again." if damaged else
                     "Convert this model without --quantize.")


def check_float(source: Checkpoint, info: TensorInfo) -> None:
    """Refuse a tensor of integers, which cannot be quantised. Raises a UserError."""
    if info.dtype not in FLOATS:
        raise UserError(f"{info.name} is {info.dtype}; only {', '.join(LONG_NAMES.values())} can be quantised",
                        source.path)


@dataclass(frozen=True)
class _Rows:
    """Rows of one matrix, quantised."""

    source: Checkpoint
    weight: Weight
    scheme: Scheme

    def groups(self, first: int, last: int) -> np.ndarray:
        """float32 [n, G, group]."""
        info = self.source.infos[self.weight.hf]
        check_float(self.source, info)
        values = to_float32(block_of(self.source, info.name, (first, last), (0, info.shape[1])), info.dtype)
        return values.reshape(last - first, self.scheme.groups, self.scheme.group_size)

    def scale(self, first: int, last: int) -> np.ndarray:
        return self._scale(self.groups(first, last))

    def _scale(self, groups: np.ndarray) -> np.ndarray:
        """float16 [n, G]."""
        try:
            return nearest_scale(groups, self.scheme.bits)
        except ValueError as error:
            raise unfit(self.weight.hf, error, self.source.path) from None

    def zero(self, first: int, last: int) -> np.ndarray:
        groups = self.groups(first, last)
        return nearest_zero(groups, inverse_of(self._scale(groups)))

    def integers(self, first: int, last: int) -> np.ndarray:
        groups = self.groups(first, last)
        inverse = inverse_of(self._scale(groups))
        values = groups * inverse[:, :, None]
        np.rint(values, out=values)
        low, high = levels(self.scheme.bits)
        if self.scheme.bits == 8:
            np.clip(values, low, high, out=values)
            return values.astype(np.int8).reshape(last - first, -1)
        values += nearest_zero(groups, inverse)[:, :, None]
        np.clip(values, low, high, out=values)
        return pack(values.astype(np.uint8).reshape(last - first, -1))


def dense_rows(stored: Checkpoint, name: str, scheme: Scheme, first: int, last: int,
               order: Optional[np.ndarray] = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a quantised matrix as floats, float32 [n, I], and their scales as they are stored, [n, G].

    Args:
        stored: the stored form.
        name: the matrix in it.
        scheme: how it is stored.
        first, last: which rows.
        order: the group of each input, where the scheme has one.
    """
    parts = [block_of(stored, name + suffix, (first, last), (0, stored.infos[name + suffix].shape[1]))
             for suffix in ("", SCALE) + ((ZERO,) if scheme.has_zero else ())]
    zero = parts[2] if scheme.has_zero else None
    return dequantise(parts[0], parts[1], scheme.scale_dtype, zero, order), parts[1]


@dataclass(frozen=True)
class Error:
    """What quantising one matrix cost.

    Attributes:
        name: Hugging Face's.
        scheme: how it is stored.
        largest: the largest error, against the largest value.
        mean: the mean error, against the mean magnitude.
    """

    name: str
    scheme: Scheme
    largest: float
    mean: float

    def __str__(self) -> str:
        return f"{self.name} {self.scheme}: largest error {100 * self.largest:.3f} %, mean {100 * self.mean:.3f} %"


def error_of(source: Checkpoint, weight: Weight, result: Checkpoint, name: str, scheme: Scheme,
             bounded: bool) -> Error:
    """Compare a stored quantised matrix with the one it was made from.

    Args:
        source: the floats, under Hugging Face's names.
        weight: which.
        result: the stored form: a checkpoint that was written, or what was compared with it bit for bit.
        name: of the matrix in it.
        scheme: how it is stored.
        bounded: it was rounded to nearest. A calibrated one may be further off, for the good of its products.

    Raises:
        UserError: an error is larger than rounding can make it: something is wrong with the result.
    """
    rows = _Rows(source, weight, scheme)
    step = max(1, 2 ** 20 // weight.shape[1])
    worst = largest = total = magnitude = 0.0
    for first in range(0, weight.shape[0], step):
        last = min(first + step, weight.shape[0])
        wanted = rows.groups(first, last)
        found, scales = dense_rows(result, name, scheme, first, last)
        off = np.abs(found.reshape(wanted.shape) - wanted)
        allowed = to_float32(scales, scheme.scale_dtype)[:, :, None] * np.float32(_LARGEST_ERROR[scheme.bits] * 1.001)
        if bounded and (off > allowed).any():
            row, group, column = (int(at[0]) for at in np.nonzero(off > allowed))
            raise UserError(f"{name} is off by {off[row, group, column]:.3g} in row {first + row}, rounding makes "
                            f"{allowed[row, group, 0]:.3g} at most", result.path, "Nothing was put in place.")
        worst, largest = max(worst, float(off.max())), max(largest, float(np.abs(wanted).max()))
        total += float(off.sum(dtype=np.float64))
        magnitude += float(np.abs(wanted).sum(dtype=np.float64))
    return Error(weight.hf, scheme, worst / largest if largest else 0.0, total / magnitude if magnitude else 0.0)
