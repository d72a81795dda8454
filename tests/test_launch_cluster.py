"""Real ranks in a real MindSpore cluster under the launcher: they add up, and every fault ends all of them at once."""

import os
import re
import signal
import time

import pytest
from launch_runs import SCHEDULER, Launch, worker

pytest.importorskip("mindspore")
ENDS_WITHIN_S = 10


@pytest.mark.parametrize("workers", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4, 8))])
def test_ranks_join_and_add_up(workers, tmp_path):
    with Launch(worker("add"), workers, folder=tmp_path) as run:
        assert run.wait() == 0, run.err
        total = workers * (workers + 1) // 2
        assert run.out.decode() == f"rank 0 of {workers}: sum {total}\n"
        for rank in range(1, workers):
            assert f"rank {rank} of {workers}: sum {total}\n" in run.log(f"worker_{rank}.log")
        run.assert_nothing_left(run.port)


def test_one_argument_starts_eight(tmp_path):
    with Launch(worker("echo"), folder=tmp_path) as run:
        assert run.wait() == 0 and run.out == b"rank 0 of 8\n"
        assert len(list(tmp_path.glob("rank_*.json"))) == 8


def to_phase(run, phase):
    """Bring a launch of the task `phases` to the start, to loading or to decoding."""
    if phase == "start":
        run.until(lambda run: {SCHEDULER, 0, 1} <= set(run.processes()))
        time.sleep(0.3)  # somewhere in the imports
        return
    run.read_until(b"loading")
    run.until(lambda run: "loading" in run.log("worker_1.log"))
    if phase == "decoding":
        (run.folder / "load").touch()
        run.read_until(b"step 3 ")


def assert_ended(run, begin, code):
    assert run.wait(60) == code, run.err
    assert time.monotonic() - begin < ENDS_WITHIN_S
    run.assert_nothing_left(run.port)


def name_of(victim):
    return "the scheduler" if victim == SCHEDULER else f"rank {victim}"


@pytest.mark.slow  # the usual tests have the same with the real program: test_launch_faults.py
@pytest.mark.parametrize("phase", ["start", "loading", "decoding"])
@pytest.mark.parametrize("victim", [0, 1, SCHEDULER])
def test_a_killed_process_is_named_and_ends_all(victim, phase, tmp_path):
    with Launch(worker("phases", "400"), 2, folder=tmp_path) as run:
        to_phase(run, phase)
        begin = time.monotonic()
        os.kill(run.processes()[victim], signal.SIGKILL)
        assert_ended(run, begin, 137)
        assert f"error: {name_of(victim)}: killed by SIGKILL." in run.err
        assert "not the kernel's out-of-memory killer" in run.err or "run out of memory" in run.err
        if victim == 1 and phase == "decoding":
            assert re.search(r"last lines of \S*worker_1\.log\n(.*\n)*step 3 sum 2\n", run.err)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_an_exception_in_one_rank_ends_all_and_its_last_words_are_shown(rank, tmp_path):
    (tmp_path / "load").touch()
    with Launch(worker("phases", "400", f"raise:{rank}:3"), 2, folder=tmp_path) as run:
        run.until(lambda run: "a defect in step 3" in run.log(f"worker_{rank}.log"))
        assert_ended(run, time.monotonic(), 1)
        assert "RuntimeError: a defect in step 3" in run.err
        assert f"error: rank {rank}: ended with exit code 1." in run.err


@pytest.mark.slow
@pytest.mark.parametrize("rank, workers", [(1, 2), (0, 2), (2, 4)])
def test_a_rank_that_does_not_come_to_a_collective_is_named(rank, workers, tmp_path):
    (tmp_path / "load").touch()
    with Launch(worker("phases", "400", f"hang:{rank}:3"), workers, folder=tmp_path, QWEN15_HANG_TIMEOUT_S="8") as run:
        run.until(lambda run: f"step {2} " in run.log("worker_1.log"))
        begin = time.monotonic()
        assert run.wait(60) == 1
        assert 7 <= time.monotonic() - begin < 8 + ENDS_WITHIN_S
        assert f"error: rank {rank}: kept the other ranks waiting for 8 s (rank {rank} in state S)." in run.err
        assert "QWEN15_HANG_TIMEOUT_S" in run.err
        run.assert_nothing_left(run.port)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, SCHEDULER])
@pytest.mark.parametrize("phase", ["start", "loading", "decoding"])
def test_a_stopped_process_is_named_after_the_usual_half_minute(victim, phase, tmp_path):
    with Launch(worker("phases", "4000"), 2, folder=tmp_path) as run:
        to_phase(run, phase)
        begin = time.monotonic()
        os.kill(run.processes()[victim], signal.SIGSTOP)
        assert run.wait(90) in (1, 143), run.err
        assert 25 <= time.monotonic() - begin < 30 + 5 + ENDS_WITHIN_S
        assert f"error: {name_of(victim)}: stopped (" in run.err
        run.assert_nothing_left(run.port)


@pytest.mark.slow
def test_ctrl_c_while_decoding(tmp_path):
    with Launch(worker("phases", "4000"), 2, folder=tmp_path) as run:
        to_phase(run, "decoding")
        begin = time.monotonic()
        run.popen.send_signal(signal.SIGINT)
        assert_ended(run, begin, 130)


@pytest.mark.slow
def test_ranks_that_take_their_time_to_load_are_waited_for(tmp_path):
    """MindSpore's own limit, 30 s, is less than two ranks may differ in loading."""
    (tmp_path / "load").touch()
    with Launch(worker("late", "1", "40"), 2, folder=tmp_path) as run:
        assert run.wait(150) == 0, run.err
        assert b"sum 2\n" in run.out


@pytest.mark.slow
def test_a_cluster_that_does_not_get_complete_names_who_is_missing(tmp_path):
    with Launch(worker("join_all_but", "1"), 2, 0, "logs", "True", 12, folder=tmp_path) as run:
        assert run.wait(10) == 2  # port 0 is none
    from launch_runs import free_port
    with Launch(worker("join_all_but", "1"), 2, free_port(), "logs", "True", 12, folder=tmp_path) as run:
        assert run.wait(90) != 0
        assert "rank 1 did not join within 12 s; rank 0 did" in run.err
        run.assert_nothing_left(run.port)


def test_two_launches_at_once_do_not_disturb_each_other(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Launch(worker("add"), 1, folder=tmp_path / "a") as one, Launch(worker("add"), 1, folder=tmp_path / "b") as two:
        assert one.wait() == 0 and two.wait() == 0, one.err + two.err
        assert one.port != two.port
