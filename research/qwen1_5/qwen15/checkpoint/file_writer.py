"""Write one checkpoint file front to back, at the disk's own speed: past the page cache, with threads."""

import ctypes
import errno
import fcntl
import os
import queue
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional, Sequence

import numpy as np

from ..errors import EXIT_FAILED, UserError
from .pages import huge
from .tensors import Step, Tail, total_bytes

_PAGE_BYTES = 4096
"""What offsets, lengths and addresses of direct writes are multiples of."""
_LEAST_BLOCK_BYTES, _MOST_BLOCK_BYTES = 256 * 2 ** 10, 4 * 2 ** 20
_ALL_BLOCKS_BYTES = 24 * 2 ** 20
_WRITING_THREADS = 2
_SMALL_FILE_BYTES = 2 ** 20
"""Up to this size there is nothing to gain by going past the page cache."""

_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "fallocate"):
    _libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@contextmanager
def told(path: str) -> Iterator[None]:
    """Turn what the operating system says about writing `path` into a line for the user, which also names another
    file where that one is in the way: what is written stands beside its place until it is whole."""
    try:
        yield
    except OSError as error:
        fix = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "Make room, or write to another disk; nothing of the result was put in place."
        elif error.errno == errno.EFBIG:
            fix = "The limit on a file's size is too low (see `ulimit -f`), or the file system allows no such files."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "Write to a folder that you may write to."
        other = f" ({error.filename})" if isinstance(error.filename, str) and error.filename != path else ""
        raise UserError(f"cannot be written: {error.strerror or error}{other}", path, fix,
                        exit_code=EXIT_FAILED) from None


class Blocks:
    """Memory for bytes on their way to the disk, and the threads that write it: one block is filled, others written.

    The end of its `with` block waits for the writes under way; it has to come before the files are closed.

    Args:
        writers: how many files are written at once; each fills a block of its own.

    Attributes:
        nbytes: of a block.
        all_bytes: of all blocks, the most memory that this takes.
    """

    def __init__(self, writers: int = 1):
        self._left = writers + _WRITING_THREADS + 1  # not made yet
        share = min(_MOST_BLOCK_BYTES, max(_LEAST_BLOCK_BYTES, _ALL_BLOCKS_BYTES // self._left))
        self.nbytes = share // _PAGE_BYTES * _PAGE_BYTES
        self.all_bytes = self._left * self.nbytes
        self._memory = huge(self.all_bytes)
        self._free: "queue.SimpleQueue[np.ndarray]" = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(_WRITING_THREADS)

    def take(self) -> np.ndarray:
        """A block to fill, uint8 [nbytes]; waits for one that has been written when all are in use."""
        if self._left:
            self._left -= 1
            return self._memory[self._left * self.nbytes:(self._left + 1) * self.nbytes]
        return self._free.get()

    def write(self, writer: "FileWriter", block: np.ndarray, nbytes: int, at: int) -> "Future[None]":
        """Have a thread write the first `nbytes` of a block at byte `at` and take the block back."""
        return self._pool.submit(self._write, writer, block, nbytes, at)

    def _write(self, writer: "FileWriter", block: np.ndarray, nbytes: int, at: int) -> None:
        try:
            writer.write_at(block.data[:nbytes], at)
        finally:
            self._free.put(block)

    def __enter__(self) -> "Blocks":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)


class FileWriter:
    """Writes one checkpoint file front to back from its steps and the tensors' bytes.

    The file's room is reserved first, so that a disk that is too small says so before anything is written.

    Args:
        fd: open file. The caller closes it, after it has left `blocks`.
        path: for messages.
        steps: what the file consists of.
        blocks: where bytes gather and who writes them.
        start: bytes that an earlier run has written, a position of `sync`; all else in the file is replaced.
    """

    def __init__(self, fd: int, path: str, steps: Sequence[Step], blocks: Blocks, start: int = 0):
        self._fd, self.path, self._blocks = fd, path, blocks
        self._steps = list(steps)
        self.nbytes = total_bytes(self._steps)
        self._next = 0  # step
        self._left = 0  # bytes left of the body being written
        self._at = start
        self._crcs: Optional[Dict[str, int]] = {} if any(isinstance(step, Tail) for step in self._steps) else None
        self._block: Optional[np.ndarray] = None
        self._begin = start // _PAGE_BYTES * _PAGE_BYTES  # where in the file the block goes
        self._writes: List["Future[None]"] = []
        self._direct = False
        with told(path):
            if not start:
                os.ftruncate(fd, 0)
            self._reserve()
            if self._at > self._begin:
                self._block = blocks.take()
                old = os.pread(fd, self._at - self._begin, self._begin)
                self._block[:len(old)] = np.frombuffer(old, np.uint8)
            self._go_direct(self.nbytes > _SMALL_FILE_BYTES)
        self._skip_to(start)

    def _reserve(self) -> None:
        """Have the file system set the file's room aside, where it can."""
        if self.nbytes and hasattr(_libc, "fallocate") and _libc.fallocate(self._fd, 0, 0, self.nbytes):
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise OSError(number, os.strerror(number))

    def _skip_to(self, start: int) -> None:
        """Pass over the steps that make the first `start` bytes, whole tensors."""
        while start > 0:
            step = self._steps[self._next]
            start -= len(step) if isinstance(step, bytes) else step.nbytes
            self._next += 1
        if start:
            raise RuntimeError(f"{self.path}: cannot go on from byte {self._at}, inside of a step")

    def _go_direct(self, direct: bool) -> None:
        """Write past the page cache, or not any more; file systems that cannot are written to as usual."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
            self._direct = direct
        except OSError:
            self._direct = False

    def feed(self, name: str, chunk: memoryview) -> None:
        """Take the next bytes of tensor `name`. Tensors come in the steps' order, their bytes front to back."""
        with told(self.path):
            while len(chunk):
                if not self._left:
                    self._advance(name)
                part = chunk[:self._left]
                if self._crcs is not None:
                    self._crcs[name] = zlib.crc32(part, self._crcs.get(name, 0))
                self._put(part)
                self._left -= len(part)
                chunk = chunk[len(part):]

    def _advance(self, name: Optional[str]) -> None:
        """Write fixed bytes up to the next body, which must be of tensor `name`; up to the end where it is None."""
        while self._next < len(self._steps):
            step = self._steps[self._next]
            self._next += 1
            if isinstance(step, bytes):
                self._put(memoryview(step))
            elif isinstance(step, Tail):
                self._put(memoryview(step.make(self._crcs or {})))
            elif step.nbytes == 0:
                if self._crcs is not None:
                    self._crcs.setdefault(step.name, 0)
            elif step.name == name:
                self._left = step.nbytes
                return
            else:
                raise RuntimeError(f"{self.path}: {step.name} should come now, not {name}")
        if name is not None:
            raise RuntimeError(f"{self.path}: no place for more of {name}")

    def _put(self, data: memoryview) -> None:
        """Add bytes to the block; hand it on when it is full."""
        bytes_left = np.frombuffer(data, np.uint8)
        while bytes_left.size:
            if self._block is None:
                self._block = self._blocks.take()
            filled = self._at - self._begin
            part = bytes_left[:self._blocks.nbytes - filled]
            self._block[filled:filled + part.size] = part
            self._at += part.size
            bytes_left = bytes_left[part.size:]
            if self._at - self._begin == self._blocks.nbytes:
                block, self._block = self._block, None
                self._collect([write for write in self._writes if write.done()])
                self._writes.append(self._blocks.write(self, block, self._blocks.nbytes, self._begin))
                self._begin = self._at

    def _collect(self, writes: Sequence["Future[None]"]) -> None:
        """Wait for some of the writes that are under way, and raise what went wrong with them."""
        for write in writes:
            write.result()
            self._writes.remove(write)

    def write_at(self, data: memoryview, at: int) -> None:
        """Write bytes at a place of the file, all of them."""
        while len(data):
            direct = self._direct  # read now: the other thread may just have found that direct writes fail
            try:
                written = os.pwrite(self._fd, data, at)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._go_direct(False)  # the flag was accepted, writes like this are not
                continue
            data, at = data[written:], at + written

    def sync(self) -> int:
        """Wait until the disk has everything so far.

        Returns:
            How many bytes that is; an interrupted run can start from there.
        """
        with told(self.path):
            self._collect(list(self._writes))
            if self._at > self._begin:
                # Less than a block, so most likely not of whole pages: it goes through the page cache. It stays in
                # memory, and is written again with what follows.
                direct = self._direct
                self._go_direct(False)
                assert self._block is not None
                self.write_at(self._block.data[:self._at - self._begin], self._begin)
                self._go_direct(direct)
            os.fsync(self._fd)
        return self._at

    def finish(self) -> None:
        """Write what comes after the last tensor and wait until the disk has everything."""
        with told(self.path):
            self._advance(None)
        if self._at != self.nbytes or self._left:
            raise RuntimeError(f"{self.path}: {self._at} bytes written where {self.nbytes} belong")
        self.sync()
