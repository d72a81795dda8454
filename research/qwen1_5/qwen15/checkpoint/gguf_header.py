"""The header of a GGUF file: its metadata and where its tensors lie, read within bounds whatever the file says.

Little-endian: "GGUF", uint32 version, uint64 number of tensors, uint64 number of metadata entries, the entries (name,
uint32 type, value), the tensors (name, uint32 number of dimensions, uint64 dimensions with the innermost first, uint32
kind, uint64 offset), padding, contents. A string is a uint64 length and UTF-8; an array a uint32 type, a uint64 count
and so many values.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, NamedTuple, Union

Scalar = Union[int, float, bool, str]
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_ENTRIES = 2 ** 16
_MOST_TENSORS = 2 ** 18
_MOST_ELEMENTS = 2 ** 22  # of an array; a vocabulary has 2^18
_MOST_NAME_BYTES = 2 ** 16
_MOST_DIMENSIONS = 4


class Place(NamedTuple):
    """One tensor: its kind ('F32', 'Q4_0', ...), its shape, outermost first, and its bytes in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    """What a file says before its contents; arrays among the metadata are left out."""

    fields: dict[str, Scalar]
    tensors: dict[str, Place]


def read_header(path: str) -> Header:
    """Read a file's header; the contents stay on the disk.

    Raises:
        ValueError: it is not such a file, or damaged; the message says what.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size)
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = reader.number("<I")
        if version & 0xFFFF == 0:
            raise ValueError("it is written for big-endian machines")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not known, only {' and '.join(map(str, _VERSIONS))}")
        n_tensors = reader.count("tensors", _MOST_TENSORS)
        fields = reader.fields(reader.count("metadata entries", _MOST_ENTRIES))
        return Header(fields, reader.tensors(n_tensors, fields.get("general.alignment", 32)))


class _Reader:
    """Takes a header's parts one after another, none beyond the file's end."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._at = file, size, 0

    def take(self, nbytes: int) -> bytes:
        if nbytes > self._size - self._at:
            raise ValueError(f"something of {nbytes} bytes begins at byte {self._at} of {self._size}")
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise ValueError(f"it has become shorter than {self._size} bytes")
        self._at += nbytes
        return data

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def count(self, what: str, most: int) -> int:
        found = self.number("<Q")
        if found > most:
            raise ValueError(f"it claims {found} {what}, more than the {most} that any model has")
        return found

    def text(self, most: int) -> str:
        at = self._at
        try:
            return self.take(self.count("bytes of a string", most)).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the string at byte {at} is not UTF-8") from None

    def fields(self, count: int) -> dict[str, Scalar]:
        found: dict[str, Scalar] = {}
        names = set()
        for _ in range(count):
            name = self.text(_MOST_NAME_BYTES)
            if name in names:
                raise ValueError(f"{name} is there twice")
            names.add(name)
            kind = self.number("<I")
            if kind == _ARRAY:
                self._skip_array(name)
            elif kind == _STRING:
                found[name] = self.text(self._size)
            else:
                found[name] = self.number(_scalar(kind, name))
        return found

    def _skip_array(self, name: str) -> None:
        kind = self.number("<I")
        count = self.count(f"values of {name}", _MOST_ELEMENTS)
        if kind != _STRING:
            self.take(count * struct.calcsize(_scalar(kind, name)))
            return
        for _ in range(count):
            self.take(self.count("bytes of a string", self._size))

    def tensors(self, count: int, alignment: Scalar) -> dict[str, Place]:
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, which is not a power of two")
        found: dict[str, Place] = {}
        for _ in range(count):
            name = self.text(_MOST_NAME_BYTES)
            if name in found:
                raise ValueError(f"{name} is there twice")
            n_dims = self.number("<I")
            if n_dims > _MOST_DIMENSIONS:
                raise ValueError(f"{name} claims {n_dims} dimensions")
            shape = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims))[::-1]
            kind, nbytes = _extent(self.number("<I"), shape, name)
            offset = self.number("<Q")
            if offset % alignment:
                raise ValueError(f"{name} lies at {offset}, which is not a multiple of {alignment}")
            found[name] = Place(kind, shape, offset, nbytes)
        begin = -(-self._at // alignment) * alignment
        placed = {name: place._replace(offset=begin + place.offset) for name, place in found.items()}
        _check_apart(placed, self._size)
        return placed


def _scalar(kind: int, name: str) -> str:
    """How a value of a type is unpacked."""
    if kind not in _SCALARS:
        raise ValueError(f"{name} has a value of the unknown type {kind}")
    return _SCALARS[kind]


def _extent(number: int, shape: tuple[int, ...], name: str) -> tuple[str, int]:
    """(kind, bytes) of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{name} is of the unknown kind {number}") from None
    block, block_nbytes = GGML_QUANT_SIZES[kind]
    elements = 1
    for size in shape:
        elements *= size
    if shape and shape[-1] % block or not shape or not elements:
        raise ValueError(f"{name} has shape {list(shape)}, and {kind.name} has blocks of {block}")
    return kind.name, elements // block * block_nbytes


def _check_apart(places: dict[str, Place], size: int) -> None:
    """Refuse tensors that end after the file or share bytes."""
    end, before = 0, ""
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if place.offset < end:
            raise ValueError(f"{before} and {name} share bytes")
        end, before = place.offset + place.nbytes, name
        if end > size:
            raise ValueError(f"{name} ends at byte {end}, the file has {size}: truncated")
