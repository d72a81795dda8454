"""A checkpoint seen in another form: tensors that are made of the stored ones, some rows at a time, when read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Union

import numpy as np

from .reader import Checkpoint, TensorFile
from .tensors import NUMPY_DTYPES, TensorInfo, element_count, itemsize

ROW_STEP = 32
"""Rows are asked for from a multiple of this on, so that no word of packed zero points is cut."""
_BLOCK_BYTES = 4 * 2 ** 20


@dataclass(frozen=True)
class Made:
    """A tensor that is made when it is read.

    Attributes:
        info: its name, dtype and shape.
        rows: (first, last) -> the rows first:last of it, seen as a matrix, of NumPy's dtype for `info.dtype`.
        work_bytes: memory that making one row takes, where that is more than the row itself.
    """

    info: TensorInfo
    rows: Callable[[int, int], np.ndarray]
    work_bytes: int = 0


class View(Checkpoint):
    """Some of a checkpoint's tensors as they are, and some that are made.

    Args:
        source: the checkpoint.
        made: by name.
        hidden: names of stored tensors that are not shown.
    """

    def __init__(self, source: Checkpoint, made: Mapping[str, Made], hidden: frozenset[str] = frozenset()):
        self.source = source
        self.path, self.notes, self.files, self.others = source.path, source.notes, source.files, source.others
        self.made = dict(made)
        self.infos = {name: info for name, info in source.infos.items() if name not in hidden and name not in made}
        self.infos.update({name: made.info for name, made in self.made.items()})
        self._block: Optional[tuple[str, int, np.ndarray]] = None

    def file_of(self, name: str) -> TensorFile:
        return self.source.file_of(name)

    def read(self, name: str, axis: Optional[int] = None, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
        if name not in self.made:
            return self.source.read(name, axis, start, stop)
        info = self.infos[name]
        whole: np.ndarray = np.empty(info.shape, NUMPY_DTYPES[info.dtype])
        self.read_into(name, 0, whole)
        if axis is not None:
            whole = np.ascontiguousarray(whole[(slice(None),) * axis + (slice(start, stop),)])
        whole.flags.writeable = False
        return whole

    def read_into(self, name: str, offset: int, buffer: Union[memoryview, np.ndarray]) -> None:
        if name not in self.made:
            self.source.read_into(name, offset, buffer)
            return
        view = np.frombuffer(memoryview(buffer).cast("B"), np.uint8)  # type: ignore[arg-type]
        row_bytes = _row_bytes(self.infos[name])
        while view.size:
            row = offset // row_bytes
            first, block = self._rows(name, row)
            begin = offset - first * row_bytes
            part = block.reshape(-1).view(np.uint8)[begin:begin + view.size]
            view[:part.size] = part
            view, offset = view[part.size:], offset + part.size

    def _rows(self, name: str, row: int) -> tuple[int, np.ndarray]:
        """(first row, rows) of a block of a made tensor that holds `row`; the last one is kept, for the next strip."""
        info = self.infos[name]
        if self._block is not None:
            kept, first, block = self._block
            if kept == name and first <= row < first + len(block):
                return first, block
        first = row - row % ROW_STEP
        each = max(_row_bytes(info), self.made[name].work_bytes)
        count = max(1, _BLOCK_BYTES // each // ROW_STEP) * ROW_STEP
        rows = info.shape[0] if info.shape else 1
        block = np.ascontiguousarray(self.made[name].rows(first, min(rows, first + count)))
        if block.dtype != NUMPY_DTYPES[info.dtype]:
            raise TypeError(f"{name} was made as {block.dtype}, it is {info.dtype}")
        self._block = (name, first, block)
        return first, block


def _row_bytes(info: TensorInfo) -> int:
    return element_count(info.shape[1:]) * itemsize(info.dtype)


def block_of(checkpoint: Checkpoint, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """A rectangle of a stored matrix, (first, last) of rows and columns; reads no more than that.

    Returns:
        A C-contiguous array of NumPy's dtype for the tensor's.
    """
    info = checkpoint.infos[name]
    width, size = info.shape[1], itemsize(info.dtype)
    made: np.ndarray = np.empty((rows[1] - rows[0], columns[1] - columns[0]), NUMPY_DTYPES[info.dtype])
    if columns == (0, width):
        checkpoint.read_into(name, rows[0] * width * size, made)
        return made
    for row in range(len(made)):
        checkpoint.read_into(name, ((rows[0] + row) * width + columns[0]) * size, made[row])
    return made
