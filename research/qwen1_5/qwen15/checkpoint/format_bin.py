"""PyTorch's .bin format: a ZIP archive of a pickle and one uncompressed entry per tensor; no torch needed.

The pickle is never executed. Its instructions are read one by one, and only those that a state dict consists of are
known: dicts, tuples, numbers, strings, and the handful of names that rebuild a tensor. Everything else is refused, so a
file can neither run code nor ask for memory it does not itself contain. The tensors' bytes are found in the archive and
read from there, never the archive as a whole.
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
import zlib
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple, cast

from ..errors import UserError
from .tensors import (
    LONGEST_NAME_BYTES,
    MOST_DIMENSIONS,
    MOST_TENSORS,
    Body,
    Scan,
    Step,
    Stored,
    Tail,
    TensorInfo,
    element_count,
    itemsize,
)

STORAGES = {"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
            "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
            "BOOL": "BoolStorage"}
_DTYPES = {torch: ours for ours, torch in STORAGES.items()}
_LARGEST_PICKLE_BYTES = 64 * 2 ** 20
# A tensor takes about 25 instructions and 200 bytes; reading a million instructions takes about a second.
_OPERATORS_EACH, _BYTES_EACH = 100, 4096
_OPERATORS_BESIDE, _BYTES_BESIDE = 100_000, 2 ** 20
_FIX = "Download it again, or save it as safetensors with the program that made it."


class _Refused(ValueError):
    """The archive or its pickle is not a plain state dict; says why."""


class _Global(NamedTuple):
    module: str
    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: Tuple[int, ...]


def scan(fd: int, path: str) -> Scan:
    """Find every tensor of an open file without reading its contents.

    Raises:
        UserError: not such a file, damaged, or a pickle that holds more than a state dict.
    """
    try:
        return _scan(fd)
    except _Refused as error:
        raise UserError(f"not a plain PyTorch checkpoint: {error}", path, _FIX) from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeError, EOFError, OSError, OverflowError,
            ValueError) as error:
        raise UserError(f"not a PyTorch checkpoint, or damaged: {error}", path, _FIX) from None


def _scan(fd: int) -> Scan:
    size = os.fstat(fd).st_size
    start = os.pread(fd, 4, 0)
    if start[:1] == b"\x80":
        raise _Refused("it is in the format of PyTorch before 1.6, which cannot be read in parts")
    with open(fd, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MOST_TENSORS:
            raise _Refused(f"{len(entries)} entries")
        by_name = {entry.filename: entry for entry in entries}
        if len(by_name) != len(entries):
            raise _Refused("an entry appears twice")
        pickles = [name for name in by_name if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("it holds no data.pkl")
        root = pickles[0][:-len("data.pkl")]
        order = by_name.get(root + "byteorder")
        if order is not None and _small(archive, order, 16).strip() != b"little":
            raise _Refused("its numbers are big-endian")
        most_bytes = min(_LARGEST_PICKLE_BYTES, _BYTES_BESIDE + _BYTES_EACH * len(entries))
        state = _read_state(_small(archive, by_name[pickles[0]], most_bytes),
                            _OPERATORS_BESIDE + _OPERATORS_EACH * len(entries))
    tensors, others = {}, {}
    spans: Dict[str, Tuple[int, int]] = {}
    for name, value in state.items():
        if not isinstance(name, str) or len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME_BYTES:
            raise _Refused("a key that is not a name")
        if isinstance(value, _Tensor):
            entry = by_name.get(f"{root}data/{value.storage.key}")
            if entry is None:
                raise _Refused(f"the contents of {name} are missing")
            if entry.filename not in spans:
                spans[entry.filename] = _span(fd, entry, size)
            tensors[name] = _stored(name, value, spans[entry.filename])
        else:
            others[name] = f"{type(value).__name__} values"
    return Scan(tensors, others, {})


def _small(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most_bytes: int) -> bytes:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise _Refused(f"{entry.filename} is compressed or encrypted")
    if entry.file_size > most_bytes:
        raise _Refused(f"{entry.filename} has {entry.file_size} bytes; so few tensors need at most {most_bytes}")
    return archive.read(entry)


_LOCAL = struct.Struct("<4s5H3I2H")


def _span(fd: int, entry: zipfile.ZipInfo, size: int) -> Tuple[int, int]:
    """(offset, bytes) of an uncompressed entry's contents."""
    header = os.pread(fd, _LOCAL.size, entry.header_offset)
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise _Refused(f"{entry.filename} is not where the archive says")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise _Refused(f"{entry.filename} is compressed or encrypted")
    fields = _LOCAL.unpack(header)
    offset = entry.header_offset + _LOCAL.size + fields[9] + fields[10]
    if offset + entry.file_size > size:
        raise _Refused(f"{entry.filename} ends at byte {offset + entry.file_size}, the file has {size}: truncated")
    return offset, entry.file_size


def _stored(name: str, tensor: _Tensor, span: Tuple[int, int]) -> Stored:
    storage, width = tensor.storage, itemsize(tensor.storage.dtype)
    if storage.elements * width != span[1]:
        raise _Refused(f"the contents of {name} have {span[1]} bytes where {storage.elements * width} belong")
    info = TensorInfo.of(name, storage.dtype, tensor.shape)
    if tensor.offset * width + info.nbytes > span[1]:
        raise _Refused(f"{name} runs over the end of its contents")
    return Stored(info, ((span[0] + tensor.offset * width, info.nbytes),))


_MARK = object()
_REBUILD_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = _Global("collections", "OrderedDict")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"}


def _read_state(pickle: bytes, most_operators: int) -> Dict[Any, Any]:
    """What the pickle of a state dict builds, with `_Tensor` where tensors belong. Executes nothing.

    Args:
        pickle: protocol 2 or later.
        most_operators: instructions to look at; a longer one is refused.
    """
    stack: List[Any] = []
    memo: Dict[int, Any] = {}
    operators = 0

    def pop() -> Any:
        if not stack or stack[-1] is _MARK:
            raise _Refused("a pickle that takes more than it has")
        return stack.pop()

    def pop_to_mark() -> List[Any]:
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is _MARK:
                items = stack[i + 1:]
                del stack[i:]
                return items
        raise _Refused("a pickle without a mark")

    for opcode, found, _ in pickletools.genops(pickle):
        name, argument = opcode.name, cast(Any, found)
        operators += 1
        if operators > most_operators:
            raise _Refused(f"its pickle has more than {most_operators} instructions, which its tensors do not need")
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            state = pop()
            if stack or not isinstance(state, dict):
                raise _Refused(f"it holds a {type(state).__name__}, not a dict of tensors")
            return state
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(_known(*argument.split(" ", 1)))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([pop() for _ in range(int(name[-1]))])))
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else pop()
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1] if stack else pop()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise _Refused("a pickle that refers to nothing")
            stack.append(memo[argument])
        elif name == "BINPERSID":
            stack.append(_storage(pop()))
        elif name == "REDUCE":
            arguments, function = pop(), pop()
            stack.append(_call(function, arguments))
        elif name in ("SETITEM", "SETITEMS"):
            items = [pop(), pop()][::-1] if name == "SETITEM" else pop_to_mark()
            _update(stack[-1] if stack else None, items)
        elif name == "BUILD":
            pop()  # attributes of the dict, such as _metadata: no tensors there
            if not stack or not isinstance(stack[-1], dict):
                raise _Refused("it sets attributes of something that is not a dict")
        else:
            raise _Refused(f"its pickle uses {name}, which no state dict needs")
    raise _Refused(f"a pickle that does not end ({operators} instructions)")


def _known(module: str, name: str) -> _Global:
    found = _Global(module, name)
    if found in (_REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT) or (module == "torch" and name in _DTYPES):
        return found
    raise _Refused(f"its pickle names {module}.{name}"[:120])


def _storage(reference: Any) -> _Storage:
    if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"
            and isinstance(reference[1], _Global) and reference[1].name in _DTYPES and isinstance(reference[2], str)
            and type(reference[4]) is int and reference[4] >= 0):
        raise _Refused("a reference that is not to a storage")
    return _Storage(_DTYPES[reference[1].name], reference[2], reference[4])


def _call(function: Any, arguments: Any) -> Any:
    if function == _ORDERED_DICT and arguments == ():
        return {}
    if function == _REBUILD_PARAMETER and isinstance(arguments, tuple) and arguments \
            and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if function == _REBUILD_TENSOR and isinstance(arguments, tuple) and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        if isinstance(storage, _Storage) and type(offset) is int and offset >= 0 and _sizes(shape) and _sizes(strides):
            if strides != _row_major(shape) and element_count(shape) > 1:
                raise _Refused(f"a tensor of shape {list(shape)} with strides {list(strides)} is not row-major")
            return _Tensor(storage, offset, shape)
    raise _Refused("it builds something that is not a tensor")


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= MOST_DIMENSIONS and all(type(n) is int and 0 <= n < 2 ** 63
                                                                            for n in value)


def _row_major(shape: Tuple[int, ...]) -> Tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _update(target: Any, items: Sequence[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise _Refused("it sets items of something that is not a dict")
    for i in range(0, len(items), 2):
        key = items[i]
        if not isinstance(key, (str, int)):
            raise _Refused("a key that is not a name")
        if key in target:
            raise _Refused(f"{str(key)[:80]!r} appears twice")
        target[key] = items[i + 1]


# ---- writing ----

_ROOT = "archive"
_ALIGNMENT = 64
_STREAMED = 1 << 3 | 1 << 11  # sizes follow the contents; names are UTF-8
_ZIP64 = 0xFFFFFFFF


def steps(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> List[Step]:
    """How to write a file of these tensors, in this order, as `torch.save` of a dict would. There is no metadata."""
    del metadata
    archive = _Archive()
    archive.small("data.pkl", _pickle(infos))
    archive.small("byteorder", b"little")
    for i, info in enumerate(infos):
        archive.tensor(f"data/{i}", info)
    archive.small("version", b"3\n")
    return archive.finish()


class _Archive:
    """The steps of writing a ZIP archive front to back, each entry's CRC-32 after its contents."""

    def __init__(self) -> None:
        self._steps: List[Step] = []
        self._at = 0
        self._entries: List[Tuple[str, int, int, Any]] = []  # name, offset of its header, bytes, CRC-32 or tensor name

    def _add(self, step: Step) -> None:
        self._steps.append(step)
        self._at += len(step) if isinstance(step, bytes) else step.nbytes

    def _head(self, name: str, nbytes: int, crc: Any) -> None:
        """A local header whose extra field pads the contents to a multiple of 64 bytes, for those who map the file."""
        encoded = f"{_ROOT}/{name}".encode()
        self._entries.append((f"{_ROOT}/{name}", self._at, nbytes, crc))
        padding = -(self._at + _LOCAL.size + len(encoded) + 4) % _ALIGNMENT
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        head = _LOCAL.pack(b"PK\x03\x04", 45, _STREAMED, 0, 0, 0, 0, 0, 0, len(encoded), len(extra))
        self._add(head + encoded + extra)

    def small(self, name: str, content: bytes) -> None:
        crc = zlib.crc32(content)
        self._head(name, len(content), crc)
        self._add(content)
        self._add(_descriptor(crc, len(content)))

    def tensor(self, name: str, info: TensorInfo) -> None:
        self._head(name, info.nbytes, info.name)
        self._add(Body(info.name, info.nbytes))
        length = len(_descriptor(0, info.nbytes))
        self._add(Tail(length, lambda crcs: _descriptor(crcs[info.name], info.nbytes)))

    def finish(self) -> List[Step]:
        entries, at = list(self._entries), self._at
        nothing = {entry[3]: 0 for entry in entries if isinstance(entry[3], str)}
        length = len(_directory(entries, at, nothing))
        self._add(Tail(length, lambda crcs: _directory(entries, at, crcs)))
        return self._steps


def _descriptor(crc: int, nbytes: int) -> bytes:
    form = "<4sIQQ" if nbytes >= _ZIP64 else "<4sIII"
    return struct.pack(form, b"PK\x07\x08", crc, nbytes, nbytes)


def _directory(entries: Sequence[Tuple[str, int, int, Any]], at: int, crcs: Mapping[str, int]) -> bytes:
    """The central directory of an archive whose entries end at byte `at`, always with the ZIP64 records."""
    out = bytearray()
    for name, offset, nbytes, crc in entries:
        encoded = name.encode()
        extra = struct.pack("<HHQQQ", 1, 24, nbytes, nbytes, offset)
        out += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 45, 45, _STREAMED, 0, 0, 0,
                           crcs[crc] if isinstance(crc, str) else crc, _ZIP64, _ZIP64, len(encoded), len(extra), 0, 0,
                           0, 0, _ZIP64)
        out += encoded + extra
    size, end = len(out), at + len(out)
    out += struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, len(entries), len(entries), size, at)
    out += struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    out += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, min(len(entries), 0xFFFF), min(len(entries), 0xFFFF),
                       min(size, _ZIP64), _ZIP64, 0)
    return bytes(out)


def _pickle(infos: Sequence[TensorInfo]) -> bytes:
    """The pickle of `{name: tensor, ...}` in protocol 2, the one torch.save writes."""
    out = bytearray(b"\x80\x02}(")
    for i, info in enumerate(infos):
        out += _text(info.name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += _text("storage") + f"ctorch\n{STORAGES[info.dtype]}\n".encode() + _text(str(i)) + _text("cpu")
        out += _number(element_count(info.shape)) + b"tQ" + _number(0) + _numbers(info.shape)
        out += _numbers(_row_major(info.shape)) + b"\x89ccollections\nOrderedDict\n)RtR"
    return bytes(out + b"u.")


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(value: int) -> bytes:
    if value < 256:
        return b"K" + bytes([value])
    if value < 2 ** 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_number(value) for value in values) + b"t"
