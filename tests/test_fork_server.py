"""A server that forks: a job is a process of its own, all of a run share a server, which ends with the run."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_server import RUN, Job, ServerError

HERE = "test_fork_server"


def warm_up():
    """Of the server of these tests: nothing is slow to import."""


def refuse():
    """Of a server that cannot start."""
    raise RuntimeError("nothing to import")


def say(words):
    """A job: says who its parent is, and what it was given."""
    print(os.getppid(), os.getcwd(), os.environ.get("LIKED"), *words, os.isatty(1))


def end(code):
    """A job that ends so; a negative number is a signal's."""
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def stay():
    """A job that does not end."""
    time.sleep(600)


def job(call, *arguments, where="/", streams=None, **environ):
    """A Job of this file, with nothing to read and nobody who listens unless `streams` says otherwise."""
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        return Job(f"{HERE}.warm_up", f"{HERE}.{call}", arguments, streams=streams or [nothing] * 3, folder=where,
                   environ=environ)
    finally:
        os.close(nothing)


def said(tmp_path, *words, **environ):
    """What the job `say` prints."""
    with open(tmp_path / "said", "w+") as file, open(os.devnull, "rb") as nothing:
        with job("say", words, where=tmp_path, streams=[nothing.fileno(), file.fileno(), file.fileno()],
                 **environ) as started:
            assert started.wait(30) == 0
        file.seek(0)
        return file.read().split()


def test_a_job_has_its_own_streams_folder_and_environment(tmp_path):
    _, where, liked, *words, terminal = said(tmp_path, "a", "b", LIKED="tea")
    assert (where, liked, words, terminal) == (str(tmp_path), "tea", ["a", "b"], "False")


def test_all_jobs_of_a_run_have_one_server_and_those_of_other_processes_too(tmp_path):
    server = said(tmp_path)[0]
    assert said(tmp_path)[0] == server
    code = f"import {HERE}, pathlib; print({HERE}.said(pathlib.Path({str(tmp_path)!r}))[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout.strip() == server, done.stderr


@pytest.mark.parametrize("code", (0, 3, -signal.SIGKILL, -signal.SIGTERM))
def test_how_a_job_ends_is_told(code):
    with job("end", code) as started:
        assert started.wait(30) == code


def test_jobs_run_side_by_side_and_can_be_killed():
    with job("stay") as long, job("end", 1) as short:
        assert short.wait(30) == 1 and long.wait(0) is None
        long.kill()
        assert long.wait(30) == -signal.SIGKILL


def test_a_job_can_have_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    with job("say", ["hello"], where=tmp_path, streams=[theirs]) as started:
        os.close(theirs)
        assert started.wait(30) == 0
    assert os.read(ours, 4096).split()[-2:] == [b"hello", b"True"]
    os.close(ours)


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(ServerError, match="(?s)refuse does not start:.*nothing to import"):
        Job(f"{HERE}.refuse", f"{HERE}.stay", [], streams=[0, 1, 2], folder="/", environ={})


def test_a_server_ends_with_the_process_that_the_run_began_with(tmp_path):
    code = f"import {HERE}, fork_server, pathlib; print({HERE}.said(pathlib.Path({str(tmp_path)!r}))[0]); " \
           "print(fork_server.folder()[1])"
    environ = {name: value for name, value in os.environ.items() if name != RUN}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environ, capture_output=True,
                          text=True)
    server, place = done.stdout.split()
    deadline_s = time.monotonic() + 60
    while os.path.exists(f"/proc/{server}") and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{server}") and not os.path.exists(place)
