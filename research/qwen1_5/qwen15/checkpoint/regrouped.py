"""Quantised matrices with finer groups, so that a cut over ranks falls between groups; and the way back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Mapping, Optional

import numpy as np

from ..errors import UserError
from .quantised import BLOCK, SCALE, ZERO, Scheme
from .reader import Checkpoint
from .tensors import NUMPY_DTYPES, TensorInfo
from .view import Made, View, block_of


def finer(scheme: Scheme, name: str, inputs: int, parts: int, where: str) -> Scheme:
    """The scheme with which a matrix can be cut over `parts` ranks along its inputs: the same where groups divide.

    Raises:
        UserError: the cut lands inside a block of 32 inputs, or the columns are stored in another order.
    """
    if scheme.has_order:
        raise UserError(f"{name} stores its columns in another order (desc_act), so it cannot be cut along its inputs "
                        f"over {parts} ranks", where, "Run it on one rank, or take one made with desc_act false.")
    if inputs % parts or inputs // parts % BLOCK:
        raise UserError(f"{name} is quantised and has {inputs} inputs; over {parts} ranks that is {inputs / parts:g}, "
                        f"not a multiple of {BLOCK}", where, "Take fewer ranks, or the unquantised model.")
    group_size = math.gcd(scheme.group_size, inputs // parts)
    return replace(scheme, groups=inputs // group_size, group_size=group_size)


def coarser(scheme: Scheme, inputs: int, group_size: int) -> Scheme:
    """The scheme that a matrix had before it was cut over ranks.

    Args:
        scheme: as the slices have it, taken together.
        inputs: I.
        group_size: of the whole checkpoint, 0 for whole rows; where it does not divide I, the largest that does was
            taken.
    """
    size = math.gcd(group_size or inputs, inputs)
    return replace(scheme, groups=inputs // size, group_size=size) if size % scheme.group_size == 0 else scheme


def regrouped(source: Checkpoint, schemes: Mapping[str, tuple[Scheme, Scheme]]) -> Checkpoint:
    """A checkpoint with the scales and zero points of some matrices repeated, or the repeated ones taken together.

    Args:
        source: in the stored form.
        schemes: matrix -> how it is stored, and how it shall be; the groups of one divide those of the other.
    """
    made = {}
    for name, (old, new) in schemes.items():
        if old.groups == new.groups:
            continue
        for suffix in (SCALE, ZERO) if old.has_zero else (SCALE,):
            info = source.infos[name + suffix]
            shape = (info.shape[0], new.groups)
            made[info.name] = Made(TensorInfo.of(info.name, info.dtype, shape),
                                   _repeater(source, info, old.groups, new.groups))
    return View(source, made) if made else source


def _repeater(source: Checkpoint, info: TensorInfo, old: int, new: int):
    def rows(first: int, last: int) -> np.ndarray:
        stored = block_of(source, info.name, (first, last), (0, old))
        if new > old:
            return np.repeat(stored, new // old, axis=1)
        every = stored.reshape(last - first, new, old // new)
        if (every != every[:, :, :1]).any():
            raise UserError(f"{info.name} has {old} groups that are not {new} groups repeated", source.path,
                            "The slices are not of the checkpoint that their sidecars describe.")
        return np.ascontiguousarray(every[:, :, 0])

    return rows


class Joined(View):
    """The slices of several ranks as one checkpoint.

    Args:
        ranks: in order.
        axes: tensor -> the axis along which it is cut, None where every rank has the whole.
    """

    def __init__(self, ranks: list[Checkpoint], axes: Mapping[str, Optional[int]]):
        made = {}
        for name, axis in axes.items():
            info = ranks[0].infos[name]
            shape = tuple(size * (len(ranks) if i == axis else 1) for i, size in enumerate(info.shape))
            made[name] = Made(TensorInfo.of(name, info.dtype, shape), _joiner(ranks, info, axis))
        super().__init__(ranks[0], made)
        self.files = [file for rank in ranks for file in rank.files]


def _joiner(ranks: list[Checkpoint], info: TensorInfo, axis: Optional[int]):
    rows_of_one = info.shape[0] if info.shape else 1
    row_bytes = info.nbytes // rows_of_one if rows_of_one else 0
    columns = info.shape[1:] or ()

    def part(rank: Checkpoint, first: int, last: int) -> np.ndarray:
        rows: np.ndarray = np.empty((last - first, *columns), NUMPY_DTYPES[info.dtype])
        rank.read_into(info.name, first * row_bytes, rows)
        return rows

    def rows(first: int, last: int) -> np.ndarray:
        if axis == 1:
            return np.concatenate([part(rank, first, last) for rank in ranks], axis=1)
        if axis == 0:
            pieces = []
            for number, rank in enumerate(ranks):
                begin, end = max(first, number * rows_of_one), min(last, (number + 1) * rows_of_one)
                if begin < end:
                    pieces.append(part(rank, begin - number * rows_of_one, end - number * rows_of_one))
            return np.concatenate(pieces)
        copies = [part(rank, first, last) for rank in ranks]
        for rank, other in zip(ranks[1:], copies[1:]):
            if other.tobytes() != copies[0].tobytes():
                raise UserError(f"differs from {ranks[0].path}, though both should hold the same of it",
                                f"{rank.path}: {info.name}", "The slices are not of one checkpoint.")
        return copies[0]

    return rows
