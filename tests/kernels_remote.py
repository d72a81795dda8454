"""The kernel library in another process (kernels_driver.cpp): under a sanitizer, or as another machine's code in an
emulator."""

import ctypes
import os
import shlex
import struct
import subprocess
from typing import List, Sequence

from qwen15.kernels.library import ABI_VERSION, Library

COMMAND = "QWEN15_KERNELS_DRIVER"
"""Environment variable with the command that starts the driver; the kernel tests run through it when it is set."""

ITEM_BYTES = {"int32": 4, "int8": 1, "uint8": 1, "float32": 4, "float16": 2, "bfloat16": 2}


def _number(n: int) -> bytes:
    return struct.pack("<q", n)


def _text(text: bytes) -> bytes:
    return _number(len(text)) + text


class _Buffer:
    """Memory of this process that travels to the driver and back."""

    def __init__(self, pointer, nbytes: int):
        self.address, self.nbytes = ctypes.cast(pointer, ctypes.c_void_p).value, nbytes


class RemoteHandle:
    """What `ctypes.CDLL` is to `Library`: its functions are the driver's, called over a pipe."""

    def __init__(self, command: Sequence[str]):
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name: str):
        return lambda *arguments: self._operator(name, *arguments)

    def close(self) -> int:
        """End the driver; its exit code says whether a sanitizer has found anything."""
        self._process.stdin.close()
        return self._process.wait(timeout=60)

    def _call(self, name: str, *arguments):
        message = [_text(name.encode()), _number(len(arguments))]
        for value in arguments:
            if isinstance(value, int):
                message.append(b"i" + _number(value))
            elif isinstance(value, float):
                message.append(b"d" + struct.pack("<d", value))
            elif isinstance(value, bytes):
                message.append(b"s" + _text(value))
            else:
                message.append(b"b" + _text(ctypes.string_at(value.address, value.nbytes)))
        try:
            self._process.stdin.write(b"".join(message))
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: reading says so
        kind = self._read(1)
        if kind == b"s":
            result = self._read(struct.unpack("<q", self._read(8))[0])
        else:
            result = struct.unpack("<q", self._read(8))[0]
        for value in arguments:
            if isinstance(value, _Buffer):
                ctypes.memmove(value.address, self._read(value.nbytes), value.nbytes)
        return result

    def _read(self, n: int) -> bytes:
        data = self._process.stdout.read(n)
        if len(data) != n:
            raise AssertionError(f"the driver has ended with {self._process.wait(timeout=60)}; what it found is on "
                                 f"stderr")
        return data

    def _operator(self, name: str, n, params, ndims, shapes, dtypes, _stream, _extra, callers: int = 1,
                  repeats: int = 1) -> int:
        return self._call(name, callers, repeats, *self._parameters(n, params, ndims, shapes, dtypes))

    def decode_kept(self, rows, logits, largest, n, params, ndims, shapes, dtypes, _stream, _extra) -> int:
        """The operator decoder, then qwen15_decode_bound on what it has kept."""
        return self._call("decode_kept", _Buffer(rows.ctypes.data, rows.nbytes), *rows.shape,
                          _Buffer(logits.ctypes.data, logits.nbytes), logits.shape[1],
                          _Buffer(largest.ctypes.data, largest.nbytes), 1, 1,
                          *self._parameters(n, params, ndims, shapes, dtypes))

    @staticmethod
    def _parameters(n, params, ndims, shapes, dtypes) -> List[object]:
        arguments: List[object] = []
        for i in range(n):
            dims = (ctypes.c_int64 * max(1, ndims[i])).from_address(shapes[i])[:ndims[i]]
            nbytes = ITEM_BYTES[dtypes[i].decode()]
            for size in dims:
                nbytes *= size
            arguments += [dtypes[i], ndims[i], *dims, _Buffer(params[i], nbytes)]
        return arguments

    def qwen15_abi_version(self):
        return self._call("qwen15_abi_version")

    def qwen15_kernels_name(self):
        return self._call("qwen15_kernels_name")

    def qwen15_last_error(self):
        return self._call("qwen15_last_error")

    def qwen15_can_run(self, name):
        return self._call("qwen15_can_run", name)

    def qwen15_use_kernels(self, name):
        return self._call("qwen15_use_kernels", name)

    def qwen15_threads(self):
        return self._call("qwen15_threads")

    def qwen15_set_threads(self, count):
        return self._call("qwen15_set_threads", count)

    def qwen15_exact_activations(self):
        return self._call("qwen15_exact_activations")

    def qwen15_set_exact_activations(self, exact):
        return self._call("qwen15_set_exact_activations", exact)

    def qwen15_argmax(self, logits, rows, vocab, ids):
        return self._call("qwen15_argmax", _Buffer(logits, rows * vocab * 4), rows, vocab, _Buffer(ids, rows * 4))

    def qwen15_top_candidates(self, logits, vocab, k, values, ids):
        return self._call("qwen15_top_candidates", _Buffer(logits, vocab * 4), vocab, k, _Buffer(values, k * 4),
                          _Buffer(ids, k * 4))

    def qwen15_nucleus(self, logits, vocab, temperature, top_p, values, ids, capacity, normaliser):
        return self._call("qwen15_nucleus", _Buffer(logits, vocab * 4), vocab, float(temperature), float(top_p),
                          _Buffer(values, capacity * 4), _Buffer(ids, capacity * 4), capacity, _Buffer(normaliser, 16))


class RemoteLibrary(Library):
    """`Library` over a driver's functions."""

    def __init__(self, command: str):
        self.path = command
        self._handle = RemoteHandle(shlex.split(command))
        version = self._handle.qwen15_abi_version()
        assert version == ABI_VERSION, f"the driver's library is version {version}, this package needs {ABI_VERSION}"


_remote = None


def load():
    """The driver's library when `COMMAND` names one, else this process' own."""
    global _remote
    command = os.environ.get(COMMAND)
    if not command:
        from qwen15.kernels import library

        return library.load()
    if _remote is None:
        _remote = RemoteLibrary(command)
    return _remote


def close() -> None:
    """End the driver; AssertionError when it does not end with 0."""
    global _remote
    if _remote is not None:
        code = _remote._handle.close()
        _remote = None
        assert code == 0, f"the driver has ended with {code}; what it found is on stderr"
