"""MindSpore's .ckpt format: a protobuf message `Checkpoint` of (tag, tensor) entries; no MindSpore needed.

    Checkpoint  { repeated Value value = 1 }
    Value       { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

A tensor of more than 512 MiB is several entries of one tag in a row, each with the whole tensor's dims and a part of
its contents. A file may end in the 17 bytes `crc_num` + CRC-32 of all before, big-endian.
"""

import os
import zlib
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from ..errors import UserError
from . import wire
from .tensors import (
    LONGEST_NAME_BYTES,
    MOST_DIMENSIONS,
    MOST_TENSORS,
    Body,
    Scan,
    Step,
    Stored,
    TensorInfo,
    element_count,
    itemsize,
)

TYPE_NAMES = {"F64": "Float64", "F32": "Float32", "F16": "Float16", "BF16": "BFloat16", "I64": "Int64", "I32": "Int32",
              "I16": "Int16", "I8": "Int8", "U64": "UInt64", "U32": "UInt32", "U16": "UInt16", "U8": "UInt8",
              "BOOL": "Bool"}
_DTYPES = {ms: ours for ours, ms in TYPE_NAMES.items()}
SLICE_BYTES = 512 * 2 ** 20
"""Most contents of one entry. MindSpore cuts at the same size; a protobuf message must stay below 2 GiB."""
_CRC_MARK = b"crc_num"
_CRC_TRAILER_BYTES = len(_CRC_MARK) + 10
_HEAD_BYTES = 8192
_FIX = "Copy or convert the file again; a file that MindSpore encrypted must be decrypted first."


class _Cursor:
    """Reads a file's small fields through a window, so that a file of any size needs a few KiB."""

    def __init__(self, fd: int, stop: int):
        self._fd = fd
        self._window = b""
        self._start = 0
        self.stop = stop
        self.at = 0

    def _fill(self) -> None:
        if not self._start <= self.at <= self._start + len(self._window) - 2 * wire.LONGEST_VARINT_BYTES:
            self._start = self.at
            self._window = os.pread(self._fd, min(_HEAD_BYTES, self.stop - self.at), self.at)

    def varint(self) -> int:
        self._fill()
        try:
            value, end = wire.read_varint(self._window, self.at - self._start)
        except wire.WireError:
            raise wire.WireError(f"a number is cut off or too long at byte {self.at}") from None
        self.at = self._start + end
        return value

    def length(self, stop: int, what: str, most: Optional[int] = None) -> int:
        """A length that must fit before `stop` and be at most `most`."""
        begin = self.at
        value = self.varint()
        if value > stop - self.at:
            raise wire.WireError(f"{what} claims {value} bytes at byte {begin}, {max(0, stop - self.at)} are left")
        if most is not None and value > most:
            raise wire.WireError(f"{what} of {value} bytes at byte {begin}")
        return value

    def take(self, nbytes: int) -> bytes:
        data = os.pread(self._fd, nbytes, self.at)
        if len(data) != nbytes:
            raise wire.WireError(f"the file ends at byte {self.at + len(data)}")
        self.at += nbytes
        return data


def has_crc(fd: int) -> bool:
    """Whether the file ends in a CRC-32 of its contents."""
    size = os.fstat(fd).st_size
    return size >= _CRC_TRAILER_BYTES and os.pread(fd, len(_CRC_MARK), size - _CRC_TRAILER_BYTES) == _CRC_MARK


def check_crc(fd: int, path: str) -> None:
    """Compare the file's contents with the CRC-32 at its end, if it has one. Reads the whole file.

    Raises:
        UserError: they differ.
    """
    if not has_crc(fd):
        return
    stop = os.fstat(fd).st_size - _CRC_TRAILER_BYTES
    found, at = 0, 0
    while at < stop:
        chunk = os.pread(fd, min(16 * 2 ** 20, stop - at), at)
        if not chunk:
            raise UserError(f"the file ends at byte {at}: truncated", path, _FIX)
        found = zlib.crc32(chunk, found)
        at += len(chunk)
    wanted = int.from_bytes(os.pread(fd, 10, stop + len(_CRC_MARK)), "big")
    if found != wanted:
        raise UserError(f"the contents' CRC-32 is {found:08x}, the file says {wanted:08x}: damaged", path, _FIX)


def scan(fd: int, path: str) -> Scan:
    """Find every tensor of an open file without reading its contents.

    Args:
        fd: file descriptor, readable at any offset.
        path: for messages.

    Raises:
        UserError: not such a file, truncated, or an entry that contradicts itself, with the byte or the tensor.
    """
    size = os.fstat(fd).st_size
    stop = size - _CRC_TRAILER_BYTES if has_crc(fd) else size
    try:
        return _scan(_Cursor(fd, stop), path)
    except (wire.WireError, UnicodeDecodeError) as error:
        raise UserError(f"not a MindSpore checkpoint, or damaged: {error} (file of {size} bytes)", path, _FIX) from None


def _scan(cursor: _Cursor, path: str) -> Scan:
    parts: Dict[str, List[Tuple[str, Tuple[int, ...], Tuple[int, int]]]] = {}
    others: Dict[str, str] = {}
    last = None
    entries = 0
    while cursor.at < cursor.stop:
        begin = cursor.at
        if cursor.varint() != (1 << 3 | wire.BYTES):
            raise wire.WireError(f"no checkpoint entry at byte {begin}")
        end = cursor.length(cursor.stop, "an entry")
        end += cursor.at
        entries += 1
        if entries > MOST_TENSORS:
            raise wire.WireError(f"more than {MOST_TENSORS} entries")
        tag, tensor, other = _value(cursor, end)
        if tensor is None or tensor[0] not in _DTYPES:
            others[tag] = other if tensor is None else f"{tensor[0]} values"
        elif tag in parts and tag != last:
            raise UserError(f"{tag} appears twice, with other entries between", path, _FIX)
        else:
            parts.setdefault(tag, []).append(tensor)
        last = tag
    if not parts and not others:
        raise wire.WireError("it is empty")
    return Scan({tag: _join(tag, pieces, path) for tag, pieces in parts.items()}, others, {})


def _value(cursor: _Cursor, end: int):
    """One entry: its tag, its (type, dims, segment) if it is a tensor, and what else it is if not."""
    tag, tensor, other = None, None, "empty values"
    while cursor.at < end:
        begin = cursor.at
        field = cursor.varint()
        if field == (1 << 3 | wire.BYTES):
            tag = cursor.take(cursor.length(end, "a name", LONGEST_NAME_BYTES)).decode("utf-8")
        elif field == (2 << 3 | wire.BYTES):
            length = cursor.length(end, "a tensor")
            tensor = _tensor(cursor, cursor.at + length) if length else None
        elif field == (3 << 3 | wire.BYTES):
            other = "hash map parameters"
            cursor.at += cursor.length(end, "a hash map")
        else:
            raise wire.WireError(f"unknown field {field >> 3} (wire type {field & 7}) at byte {begin}")
    if cursor.at != end:
        raise wire.WireError(f"an entry runs over its end at byte {end}")
    if not tag:
        raise wire.WireError(f"an entry without a name before byte {end}")
    return tag, tensor, other


def _tensor(cursor: _Cursor, end: int) -> Tuple[str, Tuple[int, ...], Tuple[int, int]]:
    dims: List[int] = []
    kind, segment = None, None
    while cursor.at < end:
        begin = cursor.at
        field = cursor.varint()
        if field == (1 << 3 | wire.VARINT):
            dims.append(wire.signed(cursor.varint()))
        elif field == (1 << 3 | wire.BYTES):
            packed = cursor.take(cursor.length(end, "dims", MOST_DIMENSIONS * wire.LONGEST_VARINT_BYTES))
            dims.extend(wire.signed(value) for value in wire.integers(memoryview(packed)))
        elif field == (2 << 3 | wire.BYTES):
            kind = cursor.take(cursor.length(end, "a tensor type", 64)).decode("utf-8")
        elif field == (3 << 3 | wire.BYTES):
            length = cursor.length(end, "a tensor's contents")
            segment = (cursor.at, length)
            cursor.at += length
        else:
            raise wire.WireError(f"unknown tensor field {field >> 3} (wire type {field & 7}) at byte {begin}")
        if len(dims) > MOST_DIMENSIONS:
            raise wire.WireError(f"a tensor of more than {MOST_DIMENSIONS} dimensions at byte {begin}")
    if cursor.at != end or kind is None or segment is None or any(size < 0 for size in dims):
        raise wire.WireError(f"an incomplete tensor before byte {end}")
    return kind, tuple(dims), segment


def _join(tag: str, pieces: Sequence[Tuple[str, Tuple[int, ...], Tuple[int, int]]], path: str) -> Stored:
    kind, shape, _ = pieces[0]
    if any(piece[:2] != (kind, shape) for piece in pieces):
        raise UserError(f"the parts of {tag} disagree about its type or shape", path, _FIX)
    nbytes = sum(piece[2][1] for piece in pieces)
    dtype = _DTYPES[kind]
    if shape == (0,) and nbytes == itemsize(dtype):
        shape = ()  # how older MindSpore writes a scalar
    expected = element_count(shape) * itemsize(dtype)
    if nbytes != expected:
        raise UserError(f"{tag} {kind} {list(shape)} needs {expected} bytes, the file holds {nbytes}", path, _FIX)
    return Stored(TensorInfo(tag, dtype, shape, nbytes), tuple(piece[2] for piece in pieces))


def steps(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> List[Step]:
    """How to write a file of these tensors, in this order. The format has no place for metadata."""
    del metadata
    result: List[Step] = []
    for info in infos:
        begin = 0
        while True:
            nbytes = min(SLICE_BYTES, info.nbytes - begin)
            result += [_head(info, nbytes), Body(info.name, nbytes)]
            begin += nbytes
            if begin >= info.nbytes:
                break
    return result


def _head(info: TensorInfo, nbytes: int) -> bytes:
    """Everything of an entry but its contents, which come last."""
    tensor = b"".join(wire.integer_field(1, size) for size in info.shape)
    tensor += wire.bytes_field(2, TYPE_NAMES[info.dtype].encode()) + wire.key(3, wire.BYTES) + wire.varint(nbytes)
    value = wire.bytes_field(1, info.name.encode("utf-8"))
    value += wire.key(2, wire.BYTES) + wire.varint(len(tensor) + nbytes) + tensor
    return wire.key(1, wire.BYTES) + wire.varint(len(value) + nbytes) + value
