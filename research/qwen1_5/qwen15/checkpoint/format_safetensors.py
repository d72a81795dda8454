"""The .safetensors format: eight bytes of header length, a JSON header, then every tensor's bytes without a gap.

Format: https://github.com/huggingface/safetensors (README, "Format"). Headers are read with every field checked, since
a file's header is the first thing a broken download or a hostile file gets to say.
"""

import json
import os
import struct
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from ..errors import UserError
from .tensors import (
    LONGEST_NAME_BYTES,
    MOST_DIMENSIONS,
    MOST_TENSORS,
    NUMPY_DTYPES,
    Body,
    Scan,
    Step,
    Stored,
    TensorInfo,
    element_count,
    itemsize,
)

_LENGTH = struct.Struct("<Q")
LARGEST_HEADER_BYTES = 32 * 2 ** 20
"""A header of 32 MiB would describe some 300 000 tensors; the format itself allows 100 MB."""
_ALIGNMENT = 64
_DOWNLOAD_AGAIN = "Download or convert the file again."


class _Malformed(Exception):
    """The header breaks the format; carries what is wrong."""


def scan(fd: int, path: str) -> Scan:
    """Read and check the header of an open file.

    Args:
        fd: file descriptor, readable at any offset.
        path: for messages.

    Raises:
        UserError: truncated, oversized or malformed header, with what is wrong.
    """
    size = os.fstat(fd).st_size
    start = os.pread(fd, _LENGTH.size, 0)
    if len(start) < _LENGTH.size:
        raise UserError(f"only {size} bytes, too short for a safetensors file", path, _DOWNLOAD_AGAIN)
    (length,) = _LENGTH.unpack(start)
    if length > size - _LENGTH.size:
        raise UserError(f"the header claims {length} bytes, the file has {size}: truncated, or not a safetensors file",
                        path, _DOWNLOAD_AGAIN)
    if length > LARGEST_HEADER_BYTES:
        raise UserError(f"the header claims {length} bytes, more than any model needs ({LARGEST_HEADER_BYTES})", path,
                        _DOWNLOAD_AGAIN)
    try:
        return _parse(os.pread(fd, length, _LENGTH.size), data_start=_LENGTH.size + length, size=size)
    except _Malformed as error:
        raise UserError(f"bad safetensors header: {error}", path, _DOWNLOAD_AGAIN) from None


def _parse(text: bytes, data_start: int, size: int) -> Scan:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer, parse_float=_no_float,
                            parse_constant=_no_float)
    except UnicodeDecodeError:
        raise _Malformed("not UTF-8 text") from None
    except RecursionError:
        raise _Malformed("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Malformed(f"not JSON ({error.msg} at byte {error.pos})") from None
    if not isinstance(header, dict):
        raise _Malformed(f"a {type(header).__name__} where an object belongs")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Malformed("__metadata__ is not an object of strings")
    if len(header) > MOST_TENSORS:
        raise _Malformed(f"{len(header)} tensors, more than any model has")
    tensors: Dict[str, Stored] = {}
    for name, entry in header.items():
        info, begin = _entry(name, entry)
        tensors[name] = Stored(info, ((data_start + begin, info.nbytes),))
    _check_cover(tensors, data_start, size)
    return Scan(tensors, {}, metadata)


def _entry(name: str, entry: Any) -> Tuple[TensorInfo, int]:
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME_BYTES:
        raise _Malformed(f"a name of {len(name)} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"{name!r} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise _Malformed(f"{name!r} has dtype {str(dtype)[:40]!r}, known are {', '.join(NUMPY_DTYPES)}")
    if not _is_naturals(shape) or len(shape) > MOST_DIMENSIONS:
        raise _Malformed(f"{name!r} has shape {str(shape)[:80]}")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _Malformed(f"{name!r} has data_offsets {str(offsets)[:80]}")
    expected = element_count(tuple(shape)) * itemsize(dtype)
    if offsets[1] - offsets[0] != expected:
        raise _Malformed(f"{name!r} {dtype} {shape} needs {expected} bytes, its data_offsets span "
                         f"{offsets[1] - offsets[0]}")
    return TensorInfo(name, dtype, tuple(shape), expected), offsets[0]


def _check_cover(tensors: Mapping[str, Stored], data_start: int, size: int) -> None:
    """Tensors follow each other without gap or overlap, and the last one ends where the file ends."""
    end = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].segments[0]):
        begin, nbytes = stored.segments[0]
        if begin != end:
            raise _Malformed(f"{name!r} {'overlaps the tensor before it' if begin < end else 'leaves a gap before it'} "
                             f"({begin - end:+d} bytes)")
        end += nbytes
        if end > size:
            raise _Malformed(f"{name!r} ends at byte {end}, the file has {size}: truncated")
    if end != size:
        raise _Malformed(f"{size - end} bytes after the last tensor")


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for place, name in enumerate(names) if name in names[:place])
        raise _Malformed(f"{repeated[:80]!r} appears twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise _Malformed(f"a number of {len(digits)} digits")
    return int(digits)


def _no_float(text: str) -> float:
    raise _Malformed(f"{text[:40]!r} where only whole numbers belong")


def steps(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> List[Step]:
    """How to write a file of these tensors, in this order.

    Every tensor starts at a multiple of its element's size if those with larger elements come first.
    """
    header: Dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in infos:
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape),
                             "data_offsets": [offset, offset + info.nbytes]}
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)
    return [_LENGTH.pack(len(text)) + text, *(Body(info.name, info.nbytes) for info in infos)]
