"""Ranks of one machine add in shared memory: the right sums, the same bits for all, and an end when one is lost."""

import ctypes
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from kernels_cases import Stored, bound_decode, call
from qwen15.errors import UserError
from qwen15.kernels import library
from test_kernels import StackCase, decode_rows, first_of_the_largest, weight

if not hasattr(os, "memfd_create"):
    pytest.skip("this system makes no files in memory", allow_module_level=True)
try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

SIZES = (1, 5, 1000, 1 << 14, (1 << 14) + 17, (1 << 18) + 3, 3 * (1 << 18))
"""Of sums: of few numbers everyone adds all, of more each its part, and more than fits goes in pieces."""


def partial(rank, turn, size):
    return np.random.default_rng(1000 * turn + rank).standard_normal(size).astype(np.float32)


def start(ranks, target, *arguments, limit_s=20.0):
    """Processes that join one memory, each then at `target(kernels, rank, ranks, results, *arguments)`; and a queue."""
    context = multiprocessing.get_context("fork")
    memory = os.memfd_create("ranks")
    results = context.Queue()

    def run(rank):
        try:
            kernels = library.load()
            kernels.threads = 1 + rank % 2
            kernels.join_ranks(memory, rank, ranks, limit_s)
            results.put((rank, target(kernels, rank, ranks, *arguments)))
        except RuntimeError as error:
            results.put((rank, str(error)))

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    os.close(memory)
    return processes, results


def collect(processes, results, count=None):
    found = dict(results.get(timeout=60) for _ in range(len(processes) if count is None else count))
    for process in processes:
        process.join(timeout=10)
    return [found[rank] for rank in sorted(found)]


def add_over_ranks(kernels, part, x):
    """x += the ranks' `part`: one sum of those that a layer makes, by the entry that the library has for tests."""
    part_, x_ = (array.ctypes.data_as(ctypes.c_void_p) for array in (part, x))
    if kernels._handle.qwen15_add_over_ranks(part_, ctypes.c_int64(x.size), x_):
        raise RuntimeError(kernels.last_error)


def add_all(kernels, rank, ranks, rounds):
    sums = []
    for turn in range(rounds):
        for size in SIZES:
            x = np.full(size, turn, np.float32)
            add_over_ranks(kernels, partial(rank, turn, size), x)
            sums.append(x)
    return sums


@pytest.mark.parametrize("ranks", (2, 3, 5))
def test_sums_are_those_of_the_ranks_in_order_and_equal_on_all(ranks):
    found = collect(*start(ranks, add_all, 2))
    index = 0
    for turn in range(2):
        for size in SIZES:
            wanted = partial(0, turn, size)
            for rank in range(1, ranks):
                wanted = wanted + partial(rank, turn, size)
            wanted = np.float32(turn) + wanted
            for sums in found:
                np.testing.assert_array_equal(sums[index], wanted)
            index += 1


def agree_often(kernels, rank, ranks, rounds):
    told = []
    for turn in range(rounds):
        size = (1, 40, (1 << 18) + 5)[turn % 3] if turn < 3 else 1 + turn % 7
        if rank == turn % ranks:
            time.sleep(0.003 * (turn % 4))  # now this one is late, now that one
        told.append(int(kernels.agree(np.full(size, turn if rank == 0 else -1, np.int32)).sum()))
        x = np.zeros(3, np.float32)
        add_over_ranks(kernels, np.full(3, rank, np.float32), x)
        told.append(float(x[0]))
    return told


def test_every_rank_learns_the_ids_of_rank_0_between_sums():
    ranks, rounds = 3, 30
    found = collect(*start(ranks, agree_often, rounds))
    assert found[1] == found[0] == found[2]
    assert found[0][1::2] == [3.0] * rounds
    assert found[0][6::2][:4] == [3 * (1 + 3), 4 * (1 + 4), 5 * (1 + 5), 6 * (1 + 6)]


def leave(kernels, rank, ranks, how):
    x = np.zeros(10, np.float32)
    for turn in range(4):
        if rank == 1 and turn == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(30)
        if how == "agree":
            kernels.agree(np.zeros(1, np.int32))
        else:
            add_over_ranks(kernels, np.ones(10, np.float32), x)
    return "all four sums"


@pytest.mark.parametrize("how", ("killed", "silent", "agree"))
def test_a_rank_that_does_not_come_is_named_by_all_within_the_limit(how):
    processes, results = start(3, leave, how, limit_s=1.0)
    begin_s = time.monotonic()
    found = dict(results.get(timeout=30) for _ in range(2))
    assert time.monotonic() - begin_s < 10
    assert set(found) == {0, 2}
    for said in found.values():
        assert "rank 1 has kept rank" in said or "another rank has given up waiting for rank 1" in said
    for process in processes:
        process.kill()
        process.join()


def test_two_runs_at_a_time_do_not_meet():
    first, second = start(2, add_all, 1), start(3, add_all, 1)
    assert len(collect(*first)) == 2 and len(collect(*second)) == 3


def decode_sliced(kernels, rank, ranks, split_vocab, spoilt):
    """One rank's decode of a network whose layers every rank holds whole, and whose head is cut among them."""
    case = StackCase("bfloat16", "float32", (1, 1, 1), (5, 9, 20))
    head = weight(np.random.default_rng(4 if not split_vocab else rank % 2), (600, case.hidden), "bfloat16").values
    if spoilt and (rank == ranks - 1 or not split_vocab):
        head[-1] = np.nan
    case.head = Stored(head, "bfloat16")
    vocab = 600 * ranks if split_vocab else 600
    if split_vocab:
        case.ids = case.ids % 101
    number = kernels.open_binding(True, split_vocab)
    parts = np.full(ranks if split_vocab else 1, number, np.int32)
    call("decoder", [*case.inputs[:7], parts, *case.inputs[8:]], (3, vocab))
    logits = np.full((3, vocab), np.nan, np.float32)
    return logits, bound_decode(kernels, number, decode_rows(case), logits)


@pytest.mark.parametrize("spoilt", (False, True))
@pytest.mark.parametrize("split_vocab", (False, True))
@pytest.mark.parametrize("ranks", (2, 3))
def test_the_largest_logit_is_found_among_all_ranks_columns(ranks, split_vocab, spoilt):
    """With a split vocabulary every second rank has the same rows, so that the largest is there twice."""
    found = collect(*start(ranks, decode_sliced, split_vocab, spoilt))
    for logits, largest in found:
        np.testing.assert_array_equal(logits, found[0][0])
        np.testing.assert_array_equal(largest, first_of_the_largest(logits))
        assert spoilt == (largest == -1).any()


def join_as(kernels, rank, ranks, other):
    if rank == 1:
        time.sleep(0.1)
    return "joined"


def test_another_number_of_ranks_is_refused(tmp_path):
    memory = os.memfd_create("ranks")
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(ranks):
        try:
            library.load().join_ranks(memory, 0, ranks, 1.0)
            results.put("joined")
        except RuntimeError as error:
            results.put(str(error))

    said = []
    for ranks in (2, 3, 1, 100000):
        process = context.Process(target=run, args=(ranks,))
        process.start()
        said.append(results.get(timeout=30))
        process.join()
    assert said[0] == "joined"
    assert said[1].startswith("ranks: the ranks' memory is of version 1 for 2 ranks, not of version 1 for 3")
    assert all("2 to 1024 ranks can share memory" in line for line in said[2:])
