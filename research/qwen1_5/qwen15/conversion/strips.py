"""Move tensors from checkpoints into files strip by strip: join, look for NaN, cast, cut, write; read back to compare.

A strip is a few MiB of whole rows. It is what bounds the memory, whatever the size of a tensor or a model: two strips
are in flight, one being read while the other is written.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from ..checkpoint.casting import FLOATS, Count, cast, non_finite
from ..checkpoint.file_writer import FileWriter
from ..checkpoint.pages import huge
from ..checkpoint.reader import Checkpoint
from ..checkpoint.tensors import LONG_NAMES, NUMPY_DTYPES, element_count, itemsize
from ..errors import EXIT_FAILED, UserError

STRIP_BYTES = 4 * 2 ** 20


@dataclass(frozen=True)
class Region:
    """A rectangle of a tensor seen as a matrix [rows, columns]: its first axis, and all the others as one."""

    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True)
class Part:
    """Where a region of a tensor is read from: the tensor `name` of an open checkpoint."""

    checkpoint: Checkpoint
    name: str
    region: Region


@dataclass(frozen=True)
class Destination:
    """Where a region of a tensor is written to: the tensor `name` of file number `file`."""

    file: int
    name: str
    region: Region


@dataclass(frozen=True)
class Move:
    """One whole tensor on its way.

    Attributes:
        label: the tensor's name in messages.
        shape: of the whole tensor.
        dtype, target_dtype: what it is and what it becomes.
        parts: regions that cover the tensor; several with the same region must have the same contents.
        destinations: who gets which region.
    """

    label: str
    shape: Tuple[int, ...]
    dtype: str
    target_dtype: str
    parts: Tuple[Part, ...]
    destinations: Tuple[Destination, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor as it is read."""
        return element_count(self.shape) * itemsize(self.dtype)

    @property
    def columns(self) -> int:
        """Columns of the tensor seen as a matrix."""
        return element_count(self.shape[1:]) if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix."""
        return self.shape[0] if self.shape else 1


def whole(shape: Tuple[int, ...]) -> Region:
    """The region that is everything."""
    return Region(0, shape[0] if shape else 1, 0, element_count(shape[1:]) if len(shape) > 1 else 1)


@dataclass
class Tally:
    """What a transfer did.

    Attributes:
        casts: (from, to) -> what became of the values.
        non_finite: tensor -> (NaN, infinite) values in the source, for the tensors that have any.
    """

    casts: Dict[Tuple[str, str], Count] = field(default_factory=dict)
    non_finite: Dict[str, Tuple[int, int]] = field(default_factory=dict)

    def add_cast(self, move: Move, count: Count) -> None:
        """Count a cast, whole or in part."""
        key = (move.dtype, move.target_dtype)
        self.casts[key] = self.casts.get(key, Count()) + count

    def lines(self) -> List[str]:
        """One line for every cast, in words."""
        return [f"{LONG_NAMES[old]} -> {LONG_NAMES[new]}: {count.tensors} tensors, {count.values} values, "
                f"{count.to_zero} became 0, {count.overflowed} overflowed to inf"
                for (old, new), count in sorted(self.casts.items())]


def _strips(move: Move, buffer: Callable[[int], np.ndarray]) -> Iterator[Tuple[int, np.ndarray]]:
    """(first row, [rows, columns]) of a tensor, top to bottom, in memory that `buffer(bytes)` lends."""
    row_bytes = move.columns * itemsize(move.dtype)
    step = max(1, STRIP_BYTES // max(1, row_bytes))
    for row in range(0, move.rows, step):
        rows = min(step, move.rows - row)
        strip: np.ndarray = buffer(rows * row_bytes).view(NUMPY_DTYPES[move.dtype]).reshape(rows, move.columns)
        _fill(move, row, strip)
        yield row, strip


def _fill(move: Move, row: int, strip: np.ndarray) -> None:
    rows, width = strip.shape[0], itemsize(move.dtype)
    filled: Dict[Region, Part] = {}
    for part in move.parts:
        region = part.region
        first, last = max(row, region.row), min(row + rows, region.row + region.rows)
        if first >= last or not region.columns:
            continue
        offset = (first - region.row) * region.columns * width
        place = strip[first - row:last - row, region.column:region.column + region.columns]
        if region in filled:
            other = np.empty(place.shape, place.dtype)
            part.checkpoint.read_into(part.name, offset, other)
            if not np.array_equal(_bits(other), _bits(np.ascontiguousarray(place))):
                raise UserError(f"differs from {filled[region].checkpoint.path}, though both should hold the same of "
                                "it", f"{part.checkpoint.path}: {part.name}",
                                "The slices are not of one checkpoint, or it was trained on differently by every rank.")
            continue
        filled[region] = part
        if place.flags.c_contiguous:
            part.checkpoint.read_into(part.name, offset, place)
        else:
            block = np.empty(place.shape, place.dtype)
            part.checkpoint.read_into(part.name, offset, block)
            place[...] = block


def _bits(array: np.ndarray) -> np.ndarray:
    """For comparing: NaN equals itself, and 0.0 differs from -0.0."""
    return array.reshape(-1).view(np.uint8)


def _outgoing(move: Move, row: int, strip: np.ndarray) -> Iterator[Tuple[Destination, int, np.ndarray]]:
    """(destination, byte offset within it, contiguous array) of one strip."""
    rows, width = strip.shape[0], strip.dtype.itemsize
    for destination in move.destinations:
        region = destination.region
        first, last = max(row, region.row), min(row + rows, region.row + region.rows)
        if first < last and region.columns:
            block = strip[first - row:last - row, region.column:region.column + region.columns]
            yield destination, (first - region.row) * region.columns * width, np.ascontiguousarray(block)


class _Lender:
    """Two buffers in turn, so that one can be written from while the other is filled."""

    def __init__(self) -> None:
        self._buffers: List[Optional[np.ndarray]] = [None, None]
        self._turn = 0

    def __call__(self, nbytes: int) -> np.ndarray:
        self._turn ^= 1
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.size < nbytes:
            buffer = self._buffers[self._turn] = huge(max(nbytes, STRIP_BYTES))
        return buffer[:nbytes]


def transfer(moves: Sequence[Move], writers: Dict[int, FileWriter], tally: Tally, allow_overflow: bool,
             advance: Callable[[int], object]) -> None:
    """Write the tensors, in the order in which the files want them.

    Args:
        moves: the tensors.
        writers: file number -> writer, for every file that a destination names.
        tally: filled in.
        allow_overflow: let values that a narrower dtype cannot hold become infinite.
        advance: told the bytes of every strip that was read.

    Raises:
        UserError: reading or writing failed, replicas differ, or a cast overflowed.
    """
    lender = _Lender()
    pending: Optional["Future[None]"] = None
    with ThreadPoolExecutor(1) as pool:
        try:
            for move in moves:
                if move.dtype != move.target_dtype:
                    tally.add_cast(move, Count(tensors=1))
                for row, strip in _strips(move, lender):
                    nbytes = strip.nbytes
                    ready = _convert(move, strip, tally, allow_overflow)
                    if pending is not None:
                        pending.result()
                    pending = pool.submit(_write, move, row, ready, writers)
                    advance(nbytes)
        finally:
            if pending is not None:
                pending.result()


def _write(move: Move, row: int, strip: np.ndarray, writers: Dict[int, FileWriter]) -> None:
    for destination, _, block in _outgoing(move, row, strip):
        writers[destination.file].feed(destination.name, block.data.cast("B"))


def _convert(move: Move, strip: np.ndarray, tally: Tally, allow_overflow: bool) -> np.ndarray:
    if move.dtype in FLOATS and strip.size:
        nan, infinite = non_finite(strip, move.dtype)
        if nan or infinite:
            before = tally.non_finite.get(move.label, (0, 0))
            tally.non_finite[move.label] = (before[0] + nan, before[1] + infinite)
    if move.dtype == move.target_dtype:
        return strip
    made, count = cast(strip, move.dtype, move.target_dtype)
    if count.overflowed and not allow_overflow:
        raise UserError(f"{count.overflowed} values are too large for {LONG_NAMES[move.target_dtype]} and would become "
                        "inf", move.label, "Choose --dtype bfloat16 or float32, or accept it with --allow_overflow.")
    tally.add_cast(move, Count(0, count.values, count.to_zero, count.overflowed))
    return made


def compare(moves: Sequence[Move], results: Dict[int, Checkpoint], advance: Callable[[int], object]) -> int:
    """Read every tensor again, source and result, and compare bit for bit.

    Args:
        moves: what was written.
        results: file number -> the file, opened anew.
        advance: told the bytes of every strip that was compared.

    Returns:
        How many tensors of the results were compared.

    Raises:
        UserError: a tensor is missing, has another dtype or shape, or differs, with the byte.
    """
    lender = _Lender()
    seen = set()
    for move in moves:
        for destination in move.destinations:
            seen.add((destination.file, destination.name))
            info = results[destination.file].infos.get(destination.name)
            elements = destination.region.rows * destination.region.columns
            if info is None or info.dtype != move.target_dtype or element_count(info.shape) != elements:
                raise _unlike(results[destination.file], destination.name, f"is {info or 'missing'}")
        for row, strip in _strips(move, lender):
            ready = strip if move.dtype == move.target_dtype else cast(strip, move.dtype, move.target_dtype)[0]
            for destination, offset, block in _outgoing(move, row, ready):
                found = np.empty(block.nbytes, np.uint8)
                results[destination.file].read_into(destination.name, offset, found)
                wrong = np.flatnonzero(found != _bits(block))
                if wrong.size:
                    raise _unlike(results[destination.file], destination.name,
                                  f"differs at byte {offset + int(wrong[0])}")
            advance(strip.nbytes)
    return len(seen)


def _unlike(result: Checkpoint, name: str, what: str) -> UserError:
    return UserError(f"{name} {what}: the result is not what was converted", result.path,
                     "The disk or the memory is faulty; nothing was put in place.", exit_code=EXIT_FAILED)
