"""Load the compiled kernels and give their C functions Python types; says why when they cannot be used."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import List, Mapping, Optional, Sequence, Tuple

import numpy as np

from .. import machine, start
from ..errors import UserError
from .build import LIBRARY_NAME, OUTPUT_DIR

ABI_VERSION = 7
"""What `qwen15_abi_version()` must return: the arguments of the functions below and the operators' inputs."""

KERNELS = ("amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon_dot", "neon", "portable")
"""Instruction sets, best first."""

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}

_MOST_AGREED, _AGREE_STEP_S = 1 << 18, 0.2

_F32 = ctypes.POINTER(ctypes.c_float)
_I32 = ctypes.POINTER(ctypes.c_int32)


def library_path() -> Path:
    """Where the library is looked for: $QWEN15_KERNELS_LIBRARY (a sanitizer's build, say); else where it is built; else
    in the installed package, for a script that is run in a checkout."""
    given = os.environ.get("QWEN15_KERNELS_LIBRARY")
    if given:
        return Path(given)
    own = OUTPUT_DIR / LIBRARY_NAME
    installed = (Path(folder, "qwen15", "kernels", "_lib", LIBRARY_NAME) for folder in sys.path)
    return own if own.is_file() else next((path for path in installed if path.is_file()), own)


class Library:
    """The kernels' C functions on NumPy memory.

    Args:
        path: the shared library.

    Raises:
        UserError: it is missing, cannot be loaded, or is of another version than this package.
    """

    def __init__(self, path: Path):
        build = "Build it with `python -m qwen15.kernels.build` (needs g++ or clang++)."
        if not path.is_file():
            raise UserError("the CPU kernels have not been built", where=path, fix=build)
        try:
            handle = ctypes.CDLL(str(path))
            handle.qwen15_abi_version.restype = ctypes.c_int
            version = handle.qwen15_abi_version()
        except (OSError, AttributeError) as error:
            raise UserError(f"the CPU kernels cannot be loaded ({error})", where=path, fix=build) from error
        if version != ABI_VERSION:
            raise UserError(f"the CPU kernels are version {version}, this package needs {ABI_VERSION}", where=path,
                            fix=build)
        self.path = path
        self._handle = handle
        for name, result, arguments in (
                ("kernels_name", ctypes.c_char_p, ()),
                ("last_error", ctypes.c_char_p, ()),
                ("can_run", ctypes.c_int, (ctypes.c_char_p,)),
                ("use_kernels", ctypes.c_int, (ctypes.c_char_p,)),
                ("threads", ctypes.c_int, ()),
                ("set_threads", None, (ctypes.c_int,)),
                ("working_threads", ctypes.c_int, ()),
                ("spread_over", ctypes.c_int, (ctypes.c_int, _I32, _I32, _I32)),
                ("set_reading", None, (ctypes.c_int, ctypes.c_int, ctypes.c_int)),
                ("probe_reading", ctypes.c_double, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)),
                ("exact_activations", ctypes.c_int, ()),
                ("set_exact_activations", None, (ctypes.c_int,)),
                ("open_binding", ctypes.c_int64, (ctypes.c_int,)),
                ("close_binding", None, (ctypes.c_int64,)),
                ("bound_addresses", ctypes.c_int64, (ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64)),
                ("decode_bound", ctypes.c_int, (ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
                                                ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)),
                ("join_ranks", ctypes.c_int, (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_double)),
                ("agree", ctypes.c_int, (_I32, ctypes.c_int64, ctypes.c_double)),
                ("ranks_complaint", ctypes.c_char_p, ()),
                ("ranks_waited_seconds", ctypes.c_double, ()),
                ("ranks_waits", ctypes.c_int64, ()),
                ("argmax", None, (_F32, ctypes.c_int64, ctypes.c_int64, _I32)),
                ("top_candidates", ctypes.c_int64, (_F32, ctypes.c_int64, ctypes.c_int64, _F32, _I32)),
                ("nucleus", ctypes.c_int64, (_F32, ctypes.c_int64, ctypes.c_float, ctypes.c_double, _F32, _I32,
                                             ctypes.c_int64, ctypes.POINTER(ctypes.c_double))),
                ("probe_bandwidth", ctypes.c_double, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)),
                ("probe_flops", ctypes.c_double, (ctypes.c_int64, ctypes.c_int)),
                ("busy_seconds", ctypes.c_double, ()),
                ("tell_of_lost_files", None, ())):
            try:
                function = getattr(handle, f"qwen15_{name}")
            except AttributeError:
                raise UserError(f"the CPU kernels were compiled from other sources than this package's: they lack "
                                f"qwen15_{name}", where=path, fix=build) from None
            function.restype, function.argtypes = result, arguments

    def can_run(self, kernels: str) -> bool:
        """Whether the library holds these kernels and this CPU runs them."""
        return bool(self._handle.qwen15_can_run(kernels.encode()))

    def use_kernels(self, kernels: str) -> None:
        """Use these kernels from now on. Raises ValueError when they cannot run here."""
        if not self._handle.qwen15_use_kernels(kernels.encode()):
            raise ValueError(f"kernels {kernels!r} cannot run on this machine")

    @property
    def kernels(self) -> str:
        """Name of the kernels in use."""
        return self._handle.qwen15_kernels_name().decode()

    @property
    def last_error(self) -> str:
        """What the last operator that failed complained about."""
        return self._handle.qwen15_last_error().decode()

    @property
    def threads(self) -> int:
        """Threads the kernels run on: `threads = n`, else $QWEN15_THREADS, else what `machine.default_threads` says."""
        return self._handle.qwen15_threads()

    @threads.setter
    def threads(self, count: int) -> None:
        self._handle.qwen15_set_threads(count)

    @property
    def working_threads(self) -> int:
        """Threads that worked at the last call: fewer than `threads` while others take this process' cores."""
        return self._handle.qwen15_working_threads()

    def spread_over(self, nodes: Mapping[int, Sequence[int]]) -> Optional[str]:
        """Keep each thread on one memory node, and let memory that is touched first from now on come from all nodes in
        turn; pages of files that the system has in memory already stay where they are.

        Args:
            nodes: CPUs of each, by its number.

        Returns:
            why memory cannot be placed, None when it can.
        """
        cpus = np.array([cpu for each in nodes.values() for cpu in each], np.int32)
        counts = np.array([len(each) for each in nodes.values()], np.int32)
        numbers = np.array(list(nodes), np.int32)
        code = self._handle.qwen15_spread_over(len(nodes), _i32(numbers), _i32(counts), _i32(cpus))
        return os.strerror(code) if code else None

    def read_by(self, hint: int, ahead: int, places: int) -> None:
        """How weights are asked for that few tokens meet, see reading.py. It changes no result."""
        self._handle.qwen15_set_reading(hint, ahead, places)

    def reading_seconds(self, weights: np.ndarray, tokens: int) -> float:
        """Seconds in which all threads read weights (rows, cols) of 16 bits, as float16, from memory against so many
        tokens."""
        return self._handle.qwen15_probe_reading(weights.ctypes.data, *weights.shape, tokens)

    @property
    def exact_activations(self) -> bool:
        """Whether few activations that meet quantised weights keep 31 bits (as at first) or 16, which is faster."""
        return bool(self._handle.qwen15_exact_activations())

    @exact_activations.setter
    def exact_activations(self, exact: bool) -> None:
        self._handle.qwen15_set_exact_activations(int(exact))

    def open_binding(self, sliced: bool = False, split_vocab: bool = False) -> int:
        """A number under which the operator `decoder` keeps where weights and caches are, for the operator `decode`.

        Args:
            sliced: the layers are a slice of the ranks that were joined.
            split_vocab: table and head are one, too.
        """
        return self._handle.qwen15_open_binding(2 if split_vocab else int(sliced))

    def close_binding(self, number: int) -> None:
        """Forget what is kept under a number, before that memory is given back; `decode` refuses it from then on."""
        self._handle.qwen15_close_binding(number)

    def bound_addresses(self, number: int) -> List[int]:
        """Addresses of what is kept under this number, as decoder's inputs from cos on; empty if nothing."""
        count = self._handle.qwen15_bound_addresses(number, None, 0)
        addresses = (ctypes.c_int64 * count)()
        self._handle.qwen15_bound_addresses(number, addresses, count)
        return list(addresses)

    def bound_step(self, number: int, sequences: int, blocks: int, logits: np.ndarray) -> "BoundStep":
        """Decode calls of so many rows on what is kept under this number, as the operator `decode` makes them.

        Args:
            sequences, blocks: B rows, M of a row's block table.
            logits: (B, V) float32, which every call writes.

        Raises:
            ValueError: logits of another dtype or shape.
        """
        if logits.dtype != np.float32 or logits.ndim != 2 or not logits.flags.c_contiguous:
            raise ValueError("wanted float32 logits with 2 dimensions, row after row")
        if len(logits) != sequences:
            raise ValueError(f"{sequences} rows and {len(logits)} of logits")
        return BoundStep(self, number, np.zeros((sequences, 3 + blocks), np.int32), logits)

    def join_ranks(self, file: int, rank: int, ranks: int, limit_s: float) -> None:
        """Join the other ranks of this machine through memory that all of them share.

        Args:
            file: descriptor of a file in memory, the same for all, empty when the first comes.
            rank, ranks: this process, and how many.
            limit_s: that one may keep the others waiting.

        Raises:
            RuntimeError: the memory cannot be had, or it is another program's.
        """
        if self._handle.qwen15_join_ranks(file, rank, ranks, limit_s):
            raise RuntimeError(self.last_error)

    @property
    def waited(self) -> Tuple[float, int]:
        """(seconds spent waiting for the other ranks in sums so far, how often)."""
        return self._handle.qwen15_ranks_waited_seconds(), self._handle.qwen15_ranks_waits()

    @property
    def ranks_complaint(self) -> str:
        """Which rank has kept the others waiting for too long; "" when none has."""
        return self._handle.qwen15_ranks_complaint().decode()

    def agree(self, ids: np.ndarray) -> np.ndarray:
        """Rank 0's `ids` (N,) int32 on every rank; the others pass an array of the same size.

        Raises:
            RuntimeError: another rank has kept this one waiting for too long.
        """
        agreed = np.array(ids, np.int32)
        for begin in range(0, agreed.size, _MOST_AGREED):
            part = agreed[begin:begin + _MOST_AGREED]
            done = 0
            while not done:  # in steps, so that a signal is answered meanwhile
                done = self._handle.qwen15_agree(_i32(part), part.size, _AGREE_STEP_S)
                if done < 0:
                    raise RuntimeError(self.last_error)
        return agreed

    def argmax(self, logits: np.ndarray) -> np.ndarray:
        """First id of the largest logit of each row: (B, V) float32 -> (B,) int32. Raises ValueError on NaN."""
        logits = _logits(logits, 2)
        ids = np.empty(logits.shape[0], np.int32)
        self._handle.qwen15_argmax(_f32(logits), *logits.shape, _i32(ids))
        if (ids < 0).any():
            raise ValueError(f"NaN among the logits of sequence {int(np.argmin(ids))}")
        return ids

    def top_candidates(self, logits: np.ndarray, k: int) -> Tuple[np.ndarray, np.ndarray]:
        """The k largest of logits (V,) float32: (values, ids), largest first, equal ones in order of their ids.

        Raises ValueError on NaN.
        """
        logits = _logits(logits, 1)
        k = max(0, min(k, logits.size))
        values, ids = np.empty(k, np.float32), np.empty(k, np.int32)
        if self._handle.qwen15_top_candidates(_f32(logits), logits.size, k, _f32(values), _i32(ids)) < 0:
            raise ValueError("NaN among the logits")
        return values, ids

    def nucleus(self, logits: np.ndarray, temperature: float,
                top_p: float) -> Tuple[np.ndarray, np.ndarray, float, float]:
        """The fewest most likely ids of softmax(logits / temperature) whose probabilities sum to at least top_p.

        The id whose probability crosses top_p is included. Probabilities are over the whole vocabulary.

        Args:
            logits: (V,) float32.

        Returns:
            values (N,) float32 (logits, not divided), ids (N,) int32, most likely first, equal ones in order of their
            ids; the largest logit; the sum over the vocabulary of exp((logit - largest) / temperature).

        Raises:
            ValueError: NaN among the logits.
        """
        logits = _logits(logits, 1)
        normaliser = (ctypes.c_double * 2)()
        room = min(4096, logits.size)
        while True:
            values, ids = np.empty(room, np.float32), np.empty(room, np.int32)
            count = self._handle.qwen15_nucleus(_f32(logits), logits.size, temperature, top_p, _f32(values), _i32(ids),
                                                room, normaliser)
            if count == -1:
                raise ValueError("NaN among the logits")
            if count >= 0:
                return values[:count], ids[:count], normaliser[0], normaliser[1]
            room = logits.size

    def bandwidth(self, memory: np.ndarray, split: bool = False) -> float:
        """Bytes per second all threads together read from this memory, in one pass over it.

        Args:
            memory: any array, far larger than the caches.
            split: each thread reads eight places side by side, instead of one after another with prefetches.
        """
        return self._handle.qwen15_probe_bandwidth(memory.ctypes.data, memory.nbytes, split)

    def flops(self, dtype: str, repeats: int) -> float:
        """Multiply-adds on registers by all threads, as prefill does them for `dtype`: operations per second."""
        return self._handle.qwen15_probe_flops(repeats, DTYPES[dtype])

    def tell_of_lost_files(self) -> None:
        """From now on a mapped file that becomes shorter, or whose disk fails, ends this process with a line that names
        the file and exit code 1 instead of SIGBUS; of another SIGBUS the handler before gets to know."""
        self._handle.qwen15_tell_of_lost_files()

    @property
    def busy_seconds(self) -> float:
        """Seconds for which the threads have worked since the process began (searches over logits not counted)."""
        return self._handle.qwen15_busy_seconds()


class BoundStep:
    """A decode call that is made again and again with the same memory: where that is, is asked once. Between two calls
    the caches belong to the weights, and every microsecond of Python takes several.

    Attributes:
        rows: (B, 3 + M) int32, read by every call: id, context_len, slot, then the sequence's block table.
        logits: (B, V) float32, written.
        largest: (B,) int32, written: the first id of each row's largest logit; -1 where that is infinite or a logit is
            NaN.
    """

    def __init__(self, library: Library, number: int, rows: np.ndarray, logits: np.ndarray):
        self._library, self._decode = library, library._handle.qwen15_decode_bound
        self.rows, self.logits, self.largest = rows, logits, np.empty(len(rows), np.int32)
        self._arguments = (number, _address(rows), *rows.shape, _address(logits), logits.shape[1],
                           _address(self.largest))

    def run(self) -> None:
        """Decode.

        Raises:
            RuntimeError: nothing is kept under the number, or a number in rows is out of its range.
        """
        if self._decode(*self._arguments):
            raise RuntimeError(self._library.last_error)


def _logits(logits: np.ndarray, ndim: int) -> np.ndarray:
    if logits.dtype != np.float32 or logits.ndim != ndim or logits.size == 0:
        raise ValueError(f"logits must be float32 with {ndim} dimensions and not empty, got {logits.dtype} "
                         f"{logits.shape}")
    return np.ascontiguousarray(logits)


def _address(array: np.ndarray) -> int:
    """Of its memory."""
    return array.__array_interface__["data"][0]


def _f32(array: np.ndarray):
    return array.ctypes.data_as(_F32)


def _i32(array: np.ndarray):
    return array.ctypes.data_as(_I32)


_loaded: Optional[Library] = None


def load() -> Library:
    """The library of this process, loaded once. Raises UserError, see `Library`."""
    global _loaded
    if _loaded is None or _loaded.path != library_path():
        _loaded = Library(library_path())
        found = machine.processors()
        if not os.environ.get("QWEN15_THREADS"):
            _loaded.threads, _ = machine.default_threads(found, machine.cpu_quota())
        if len(found.nodes) > 1:
            _loaded.spread_over(found.nodes)
        if start.is_command():
            _loaded.tell_of_lost_files()
    return _loaded
