"""A file's bytes reach the disk whole and in order: past the page cache or through it, at once or in several runs."""

import errno
import fcntl
import mmap
import os
import threading
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwen15.checkpoint import file_writer, pages
from qwen15.checkpoint.file_writer import Blocks, FileWriter
from qwen15.checkpoint.tensors import Body, Tail
from qwen15.errors import UserError


def tensors_of(sizes, seed=0):
    """Name -> random bytes."""
    rng = np.random.default_rng(seed)
    return {f"t{i}": rng.integers(0, 256, nbytes, dtype=np.uint8).tobytes() for i, nbytes in enumerate(sizes)}


def steps_of(tensors):
    """A head before every tensor and all their checksums at the end."""
    steps = [b"start"]
    for name, content in tensors.items():
        steps += [name.encode(), Body(name, len(content))]
    return steps + [Tail(8 * len(tensors), lambda crcs: b"".join(b"%08x" % crcs[name] for name in tensors))]


def expected_of(tensors):
    """What `steps_of` makes."""
    return b"start" + b"".join(name.encode() + content for name, content in tensors.items()) + \
        b"".join(b"%08x" % zlib.crc32(content) for content in tensors.values())


@pytest.fixture(params=["past the page cache", "through it", "refused only when it comes to it"])
def way(request, monkeypatch):
    """How the bytes go to the disk."""
    refused = []
    for name in ("_LEAST_BLOCK_BYTES", "_MOST_BLOCK_BYTES"):
        monkeypatch.setattr(file_writer, name, 2 ** 14)
    if request.param == "through it":
        monkeypatch.setattr(file_writer, "_SMALL_FILE_BYTES", 10 ** 12)
    else:
        monkeypatch.setattr(file_writer, "_SMALL_FILE_BYTES", 0)
    if request.param == "refused only when it comes to it":
        original = os.pwrite

        def pwrite(fd, data, at):
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                refused.append(at)
                raise OSError(errno.EINVAL, "Invalid argument")
            return original(fd, data, at)

        monkeypatch.setattr(os, "pwrite", pwrite)
    yield request.param
    if request.param == "refused only when it comes to it":
        assert refused


def open_file(path):
    """A descriptor to write to."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def test_a_large_file_has_its_bytes_in_order(tmp_path, way):
    tensors = tensors_of([10, 5 * 10 ** 6, 0, 4096, 3, 9 * 10 ** 6 + 1, 4 * 2 ** 20])
    fd = open_file(tmp_path / "x")
    with Blocks() as blocks:
        writer = FileWriter(fd, "x", steps_of(tensors), blocks)
        for name, content in tensors.items():
            for start in range(0, len(content), 700_001):
                writer.feed(name, memoryview(content)[start:start + 700_001])
        writer.finish()
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == expected_of(tensors)


@given(sizes=st.lists(st.sampled_from([0, 1, 100, 4095, 4097, 2 ** 14, 70_000, 2 ** 17]), min_size=1, max_size=6),
       runs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_one_run_has_synced_the_next_goes_on_from(tmp_path, way, sizes, runs):
    """Runs that sync after some tensors and are cut off after some more."""
    tensors = tensors_of(sizes)
    names = list(tensors)
    expected = b"start" + b"".join(name.encode() + content for name, content in tensors.items()) + b"the end"
    steps = steps_of(tensors)[:-1] + [b"the end"]
    path = tmp_path / "x"
    path.write_bytes(b"what an earlier conversion left" * 10 ** 4)
    position = first = 0
    for synced, lost in runs + [(len(names), 0)]:
        fd = open_file(path)
        with Blocks() as blocks:
            writer = FileWriter(fd, "x", steps, blocks, position)
            for name in names[first:first + synced]:
                writer.feed(name, memoryview(tensors[name]))
            position, first = writer.sync(), first + synced
            assert path.read_bytes()[:position] == expected[:position]
            for name in names[first:first + lost]:
                writer.feed(name, memoryview(bytes(len(tensors[name]))))  # not even what belongs there
            if first >= len(names):
                writer.finish()
        os.close(fd)
        if first >= len(names):
            break
    assert path.read_bytes() == expected


def test_a_position_inside_of_a_tensor_is_no_place_to_go_on(tmp_path):
    tensors = tensors_of([100])
    fd = open_file(tmp_path / "x")
    with Blocks() as blocks, pytest.raises(RuntimeError, match="inside of a step"):
        FileWriter(fd, "x", steps_of(tensors), blocks, 50)
    os.close(fd)


def test_a_write_that_fails_in_its_thread_is_told_and_no_thread_hangs(tmp_path, monkeypatch):
    tensors = tensors_of([40 * 2 ** 20])
    calls = []

    def pwrite(fd, data, at):
        calls.append(at)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", pwrite)
    fd = open_file(tmp_path / "x")
    with pytest.raises(UserError, match="x: cannot be written: Input/output error") as error:
        with Blocks() as blocks:
            writer = FileWriter(fd, "x", steps_of(tensors), blocks)
            for start in range(0, 40 * 2 ** 20, 2 ** 20):
                writer.feed("t0", memoryview(tensors["t0"])[start:start + 2 ** 20])
            writer.finish()
    os.close(fd)
    assert error.value.exit_code == 1 and 1 <= len(calls) < 10


def test_two_threads_that_are_refused_at_once_both_write_as_usual(tmp_path, monkeypatch):
    monkeypatch.setattr(file_writer, "_SMALL_FILE_BYTES", 0)
    tensors, together, original = tensors_of([20 * 2 ** 20]), threading.Barrier(2, timeout=20), os.pwrite

    def pwrite(fd, data, at):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            together.wait()
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    fd = open_file(tmp_path / "x")
    with Blocks() as blocks:
        writer = FileWriter(fd, "x", steps_of(tensors), blocks)
        writer.feed("t0", memoryview(tensors["t0"]))
        writer.finish()
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == expected_of(tensors)


def test_many_files_at_once_share_little_memory():
    for writers in (1, 4, 16, 64):
        blocks = Blocks(writers)
        assert blocks.nbytes % 4096 == 0 and blocks.nbytes * (writers + 3) <= 24 * 2 ** 20


@pytest.mark.parametrize("refused", [False, True])
def test_memory_for_blocks_begins_at_a_huge_page_also_where_there_is_none(monkeypatch, refused):
    class Mapped(mmap.mmap):
        def madvise(self, *arguments):
            if refused:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().madvise(*arguments)

    monkeypatch.setattr(pages.mmap, "mmap", Mapped)
    for nbytes in (1, 4096, 2 ** 21, 3 * 2 ** 20 + 1):
        memory = pages.huge(nbytes)
        assert memory.size == nbytes and memory.ctypes.data % 2 ** 21 == 0
        memory[...] = 1


def test_blocks_do_not_overlap():
    with Blocks(4) as blocks:
        taken = [blocks.take() for _ in range(7)]
        for i, block in enumerate(taken):
            assert block.size == blocks.nbytes and block.ctypes.data % 4096 == 0
            block[...] = i
        assert all((block == i).all() for i, block in enumerate(taken))
