"""Protocol Buffers' wire format: varints and fields, read with bounds and written by hand. No generated classes.

Format: https://protobuf.dev/programming-guides/encoding/. MindSpore's checkpoint and strategy files are such messages;
its own classes for them come with the whole of MindSpore and hold a file in memory twice.
"""

from typing import Iterator, List, Tuple, Union

VARINT, BYTES = 0, 2
LONGEST_VARINT_BYTES = 10


class WireError(ValueError):
    """The bytes are no such message; says what and at which byte."""


def varint(value: int) -> bytes:
    """Encode an integer; negative ones as 64-bit two's complement."""
    value &= 2 ** 64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: Union[bytes, memoryview], at: int) -> Tuple[int, int]:
    """Decode the unsigned integer at byte `at`; returns it and the position after it."""
    value = 0
    for i in range(LONGEST_VARINT_BYTES):
        if at + i >= len(data):
            raise WireError(f"a number is cut off at byte {at}")
        byte = data[at + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value & (2 ** 64 - 1), at + i + 1
    raise WireError(f"a number of more than {LONGEST_VARINT_BYTES} bytes at byte {at}")


def signed(value: int) -> int:
    """A 64-bit unsigned integer read as two's complement, as int32 and int64 fields are."""
    return value - 2 ** 64 if value >= 2 ** 63 else value


def key(number: int, kind: int) -> bytes:
    """What stands in front of a field."""
    return varint(number << 3 | kind)


def integer_field(number: int, value: int) -> bytes:
    """An integer field, as it is written."""
    return key(number, VARINT) + varint(value)


def bytes_field(number: int, content: bytes) -> bytes:
    """A string, bytes or message field, as it is written."""
    return key(number, BYTES) + varint(len(content)) + content


def fields(data: Union[bytes, memoryview]) -> Iterator[Tuple[int, Union[int, memoryview]]]:
    """The (field number, value) pairs of a whole message in memory; nothing is copied.

    Raises:
        WireError: a field is cut off, or of a kind these messages do not use.
    """
    view = memoryview(data)
    at = 0
    while at < len(view):
        tag, at = read_varint(view, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"field number 0 before byte {at}")
        if kind == VARINT:
            value, at = read_varint(view, at)
            yield number, value
        elif kind == BYTES:
            length, at = read_varint(view, at)
            if length > len(view) - at:
                raise WireError(f"field {number} claims {length} bytes at byte {at}, {len(view) - at} are left")
            yield number, view[at:at + length]
            at += length
        else:
            raise WireError(f"field {number} has wire type {kind} before byte {at}")


def integer(value: Union[int, memoryview]) -> int:
    """The value of a field that has to be a number."""
    if not isinstance(value, int):
        raise WireError("bytes where a number belongs")
    return value


def message(value: Union[int, memoryview]) -> memoryview:
    """The value of a field that has to be a message, text or bytes."""
    if isinstance(value, int):
        raise WireError("a number where a message belongs")
    return value


def integers(value: Union[int, memoryview]) -> List[int]:
    """The integers of one occurrence of a repeated field, packed or not."""
    if isinstance(value, int):
        return [value]
    result, at = [], 0
    while at < len(value):
        item, at = read_varint(value, at)
        result.append(item)
    return result
